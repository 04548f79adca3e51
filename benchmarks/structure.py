"""What the code's structure is: who imports whom, and how long things are.

    python benchmarks/structure.py

Prints import circles, imports against the order of the rooms, functions and files over their limits, and asserts per
function. Whatever imports counts: for type checkers only, inside of functions, and by a string that names a module.
"""

import ast
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vllm_moe_offload"

FLOORS = (
    ("__main__",),
    ("plugin", "cli"),
    ("integration",),
    ("plan",),
    ("replay", "client", "daemon", "bench"),
    ("runtime", "learning"),
    ("ipc", "page"),
    ("windows",),
    ("pool",),
    ("prefetch", "config"),
    ("predict",),
    ("trace", "cache", "report"),
    ("store",),
    ("device", "stats", "running_mean", "sizes", "extensions", "threads", "users"),
    ("load_report", "errors"),
)
"""The rooms of the package, highest first. A room imports from itself and from floors below its own, never sideways."""

MOST_FUNCTION_LINES = 60
MOST_FILE_LINES = 400

_IMPORTERS = frozenset({"import_module", "__import__"})


class Package:
    """The modules of a package and what they import.

    Modules are named by their path in the package ("store.reader"); the package itself is "".
    """

    def __init__(self, folder: Path):
        self.name = folder.name
        self.files = {_module_name(path.relative_to(folder)): path for path in sorted(folder.rglob("*.py"))}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """For each module the modules of the package that it imports."""
        return {
            module: {self._module_of(name) for name in names if self._is_own(name)}
            for module, names in self._names.items()
        }

    @cached_property
    def outside(self) -> dict[str, set[str]]:
        """For each module the packages it imports besides this one."""
        return {
            module: {_first(name) for name in names if not self._is_own(name)} for module, names in self._names.items()
        }

    @cached_property
    def _names(self) -> dict[str, set[str]]:
        return {module: set(self._names_in(module)) for module in self.files}

    def _names_in(self, module: str) -> Iterator[str]:
        """Absolute names of what a module imports: of modules, or of something in one."""
        here = f"{self.name}.{module}".rstrip(".")
        if self.files[module].name != "__init__.py":
            here = _parent(here)
        for node in ast.walk(ast.parse(self.files[module].read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = _absolute("." * node.level + (node.module or ""), here)
                yield from (f"{base}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from self._named_by(node.value, here)
            elif isinstance(node, ast.Call) and _called(node) in _IMPORTERS:
                yield from _given(node, here)

    def _named_by(self, text: str, here: str) -> Iterator[str]:
        """Modules of the package that a string names: "package.module", ".module:Class", or "neighbour:Class"."""
        if match := re.fullmatch(r"(\.*[\w.]+)(:[\w.]+)?", text):
            neighbour = f"{here}.{match[1]}"
            if match[2] and neighbour.partition(".")[2] in self.files:
                yield neighbour
            elif match[2] or match[1].startswith(f"{self.name}."):
                yield from filter(self._is_own, [_absolute(match[1], here)])

    def _is_own(self, name: str) -> bool:
        return _first(name) == self.name

    def _module_of(self, name: str) -> str:
        """The module that an absolute name stands for or is in."""
        module = name.partition(".")[2]
        while module not in self.files:
            module = _parent(module)
        return module


def _absolute(name: str, here: str) -> str:
    """``name`` as it is understood in package ``here``."""
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    for _ in range(level - 1):
        here = _parent(here)
    return f"{here}.{name[level:]}".rstrip(".")


def _given(call: ast.Call, here: str) -> Iterator[str]:
    """The module that ``import_module`` is given. Of an f-string the package before its first gap counts."""
    match call.args:
        case [_, ast.Constant(value=str(anchor))]:
            here = anchor
    match call.args:
        case [ast.Constant(value=str(name)), *_]:
            yield _absolute(name, here)
        case [ast.JoinedStr(values=[ast.Constant(value=str(start)), *_]), *_]:
            yield _absolute(start if not start.strip(".") else _parent(start), here)


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _first(name: str) -> str:
    return name.partition(".")[0]


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of modules each of which imports, perhaps through others, every other of its set."""
    reach = {module: _reachable(module, imports) for module in imports}
    together = {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in imports
        if module in reach[module]
    }
    return sorted(sorted(circle) for circle in together)


def _reachable(module: str, imports: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = imports[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def against_the_order(imports: Mapping[str, set[str]], floors: Sequence[Collection[str]] = FLOORS) -> list[str]:
    """Rooms that have no place in the order, and imports from rooms that are not below."""
    floor_of = {room: number for number, rooms in enumerate(floors) for room in rooms}
    rooms = {_first(module) for module in imports} - {""}
    wrong = [f"{room} has no place in the order" for room in sorted(rooms - floor_of.keys())]
    for module, imported in imports.items():
        for other in sorted(imported):
            here, there = _first(module), _first(other)
            if {here, there} <= floor_of.keys() and here != there and floor_of[there] <= floor_of[here]:
                wrong.append(f"{module} imports {other}")
    return wrong


class Function(NamedTuple):
    file: Path
    name: str
    lines: int
    asserts: int


def functions(files: list[Path]) -> list[Function]:
    """Functions and methods, nested ones too."""
    return [
        Function(file, node.name, node.end_lineno - node.lineno + 1, _asserts(node))
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]


def _asserts(function: ast.AST) -> int:
    return sum(isinstance(node, ast.Assert) for node in ast.walk(function))


def source_files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def main() -> int:
    package = Package(PACKAGE)
    own = source_files(PACKAGE)
    everything = source_files(*(ROOT / folder for folder in ("vllm_moe_offload", "benchmarks", "examples", "tests")))
    lengths = {file: len(file.read_text().splitlines()) for file in own}
    found = {
        "import circles": [" - ".join(circle) for circle in circles(package.imports)],
        "imports against the order of the rooms": against_the_order(package.imports),
        f"functions of more than {MOST_FUNCTION_LINES} lines": [
            f"{function.file.relative_to(ROOT)} {function.name}: {function.lines}"
            for function in functions(everything)
            if function.lines > MOST_FUNCTION_LINES
        ],
        f"files of the package of more than {MOST_FILE_LINES} lines": [
            f"{file.relative_to(ROOT)}: {lines}" for file, lines in lengths.items() if lines > MOST_FILE_LINES
        ],
    }
    for what, where in found.items():
        print(f"{len(where):5} {what}")
        for line in where:
            print(f"      {line}")
    in_package = functions(own)
    asserts = sum(_asserts(ast.parse(file.read_text())) for file in own)
    print(f"{len(own):5} files of the package, {sum(lengths.values())} lines, {len(in_package)} functions")
    print(f"{asserts:5} asserts in it, {asserts / len(in_package):.3f} per function")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
