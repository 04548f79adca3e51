"""A module of the package by its place in this checkout, for interpreters that have another one or none installed."""

import importlib.util
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent.parent / "vllm_moe_offload"


def module_at(path: str) -> ModuleType:
    """The module at `path` in the package; it must not import from the package itself."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, PACKAGE / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
