"""Keeps numpy's matrix products on the calling thread.

They are small and run between the layers of a step. Split over threads they would wait for processors that the model's
own compute threads occupy: microseconds become milliseconds.
"""

import ctypes
from pathlib import Path


def use_one_thread() -> bool:
    """Whether numpy's BLAS was found and told so. PyTorch brings its own and is not touched."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split()[-1] for line in maps if "numpy" in line and "openblas" in line}
    told = False
    for path in sorted(libraries):
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads", "openblas_set_num_threads"):
            if hasattr(library, name):
                getattr(library, name)(1)
                told = True
                break
    return told
