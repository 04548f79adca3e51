"""Modules from outside of the package, as users name them in settings."""

from pathlib import Path

import pytest


def importable(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with this ``source`` in ``folder``; the one called ``broken_`` and that name raises."""
    name = f"outside_{folder.name}"
    (folder / f"{name}.py").write_text(source)
    (folder / f"broken_{name}.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(folder)
    return name
