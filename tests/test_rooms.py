"""docs/structures.md says which room may import which; the code keeps to it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import vllm_moe_offload

PACKAGE = Path(vllm_moe_offload.__file__).parent
DOCS = Path(__file__).parent.parent / "docs" / "structures.md"


def documented() -> list[str]:
    """The rooms in the order of the docs, highest first."""
    rooms = DOCS.read_text().partition("\n## Rooms\n")[2].partition("\n## ")[0]
    return [name.removesuffix(".py").removesuffix("/") for name in re.findall(r"\*\*`([\w./]+)`\*\*", rooms)]


def room_of(module: list[str]) -> str:
    return module[0] if module else "__init__"


def imports(file: Path) -> Iterator[str]:
    """The rooms that a file of the package imports from, also those for type checkers only."""
    here = list(file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = [*here[: len(here) - node.level + 1], *base]
            elif base[:1] == [PACKAGE.name]:
                base = base[1:]
            else:
                continue
            yield from [room_of(base)] if base else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{PACKAGE.name}."):
                    yield room_of(alias.name.split(".")[1:])


def test_every_room_is_in_the_docs() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(documented())


def test_a_room_imports_only_from_rooms_further_down() -> None:
    order = documented()
    wrong = {
        f"{file.relative_to(PACKAGE)} imports {room}"
        for file in PACKAGE.rglob("*.py")
        if file.parent != PACKAGE or file.stem != "__init__"
        for room in imports(file)
        if room in order
        and order.index(room) < order.index(room_of([file.relative_to(PACKAGE).parts[0].removesuffix(".py")]))
    }
    assert not wrong, sorted(wrong)
