"""``g++`` that compiles what it has compiled before in this test session by copying it.

torch.compile keeps its kernels in a folder per graph, and most kernels of a model are the same in the graphs of all its
budgets and of plain vLLM. What is compiled, with which arguments, decides alone.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

COMPILER = "g++"


def use_compiler_cache(folder: Path) -> dict[str, str]:
    """The environment in which torch compiles through a cache in ``folder``, which must exist."""
    command = folder / COMPILER  # torch looks at the name to know the options
    written = command.with_suffix(f".{os.getpid()}")
    written.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {folder} "$@"\n')
    written.chmod(0o755)
    written.replace(command)
    return {"CXX": str(command)}


def main(folder: Path, arguments: list[str]) -> int:
    output = next((Path(name) for flag, name in pairwise(arguments) if flag == "-o"), None)
    if output is None or "-E" in arguments:
        return subprocess.call([COMPILER, *arguments])
    key = hashlib.sha256()
    for argument in arguments:
        if argument != str(output):
            file = Path(argument)
            key.update(hashlib.sha256(file.read_bytes() if file.is_file() else argument.encode()).digest())
    kept = folder / key.hexdigest()
    if not kept.exists():
        status = subprocess.call([COMPILER, *arguments])
        if status:
            return status
        written = kept.with_suffix(f".{os.getpid()}")
        shutil.copy2(output, written)
        written.replace(kept)
    else:
        shutil.copy2(kept, output)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
