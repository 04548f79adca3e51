"""Rooms import only from floors below their own, however an import is written, and docs/structures.md has them all."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks.structure import FLOORS, PACKAGE, ROOT, Package, against_the_order, circles

DOCS = ROOT / "docs" / "structures.md"


def documented() -> str:
    """What the docs say of the rooms."""
    return DOCS.read_text().partition("\n## Rooms\n")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(PACKAGE)


def test_the_docs_have_every_room_in_the_order_of_the_floors(package: Package) -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    assert floor_of.keys() == {module.partition(".")[0] for module in package.imports} - {""}
    described = re.findall(r"\*\*`(\w+)(?:\.py|/)`\*\*", documented())
    assert set(described) == floor_of.keys()
    assert described == sorted(described, key=floor_of.__getitem__)
    order = " > ".join(", ".join(f"`{room}`" for room in floor) for floor in FLOORS)
    assert order in " ".join(documented().split())


def test_the_docs_have_every_module(package: Package) -> None:
    docs = documented() + (ROOT / "docs" / "daemon.md").read_text()
    named = set(re.findall(r"`(\w+)\.py`", docs))
    assert {module.rpartition(".")[2] for module, file in package.files.items() if file.stem != "__init__"} <= named


def test_a_room_imports_only_from_floors_below_its_own(package: Package) -> None:
    assert not against_the_order(package.imports)


def test_no_module_imports_itself_through_others(package: Package) -> None:
    assert not circles(package.imports)


def test_only_the_integration_imports_vllm(package: Package) -> None:
    importers = {module for module, names in package.outside.items() if names & {"vllm", "transformers"}}
    assert {module for module in importers if not module.startswith("integration.")} == set()


def test_only_the_integration_devices_and_the_memory_of_slots_import_torch(package: Package) -> None:
    importers = {module for module, names in package.outside.items() if "torch" in names}
    rooms = ("integration.", "device.", "windows.")
    assert {module for module in importers if not module.startswith(rooms)} == {"pool.memory"}


@pytest.mark.parametrize("room", ["cache", "predict", "prefetch", "replay"])
def test_decisions_have_neither_clock_nor_devices(room: str, package: Package) -> None:
    imported = set().union(*(names for module, names in package.outside.items() if module.partition(".")[0] == room))
    assert not imported & {"time", "socket", "subprocess", "mmap", "tempfile", "shutil", "torch", "vllm"}


def test_every_room_says_what_it_must_never_do(package: Package) -> None:
    for room, file in package.files.items():
        if file.name == "__init__.py" and room and "." not in room:
            assert "must never" in (ast.get_docstring(ast.parse(file.read_text())) or ""), room


TOP = {
    "statement": "from ..low.base import Base",
    "absolute": "import planted.low.base",
    "in a function": "def later() -> None:\n    from ..low import base",
    "for type checkers": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..low.base import Base",
    "through the package": "from .. import low",
    "importlib": "import importlib\nimportlib.import_module('planted.low.base')",
    "relative importlib": "import importlib\nimportlib.import_module('.base', 'planted.low')",
    "a name put together": "import importlib\nname = 'base'\nimportlib.import_module(f'planted.low.{name}')",
    "a registry": "CLASSES = {'base': 'planted.low.base:Base'}",
    "a relative registry": "CLASSES = {'base': '..low.base:Base'}",
    "another process": "import subprocess\nsubprocess.run(['python', '-m', 'planted.low.base'])",
}


def planted(folder: Path, files: dict[str, str]) -> Package:
    for name, text in files.items():
        path = folder / "planted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Package(folder / "planted")


@pytest.mark.parametrize("how", TOP)
def test_a_planted_import_is_found_however_it_is_written(how: str, tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "high/__init__.py": "",
        "high/user.py": TOP[how],
        "low/__init__.py": "",
        "low/base.py": "",
    }
    package = planted(tmp_path, files)
    assert against_the_order(package.imports, [["high"], ["low"]]) == []
    wrong = against_the_order(package.imports, [["low"], ["high"]])
    assert wrong
    assert {line.removesuffix(".base") for line in wrong} == {"high.user imports low"}
    assert against_the_order(package.imports, [["low", "high"]]) == wrong


def test_a_registry_of_neighbours_imports_them(tmp_path: Path) -> None:
    package = planted(tmp_path, {"__init__.py": "", "a/b.py": "CLASSES = {'x': 'c:Class'}", "a/c.py": ""})
    assert package.imports["a.b"] == {"a.c"}


def test_a_room_without_a_place_is_found(tmp_path: Path) -> None:
    package = planted(tmp_path, {"__init__.py": "", "attic/__init__.py": ""})
    assert against_the_order(package.imports, []) == ["attic has no place in the order"]


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "a.py": "from . import b",
        "b.py": "def f():\n    from .c import g",
        "c.py": "import planted.a",
    }
    assert circles(planted(tmp_path, files).imports) == [["a", "b", "c"]]
    assert circles(planted(tmp_path, files | {"c.py": "import planted"}).imports) == []


def test_what_comes_from_outside_is_found(tmp_path: Path) -> None:
    package = planted(
        tmp_path, {"__init__.py": "", "a.py": "def f():\n    import torch.nn\n    from numpy import array"}
    )
    assert package.outside["a"] == {"torch", "numpy"}
