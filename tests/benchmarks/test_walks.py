"""walks.py: the functions that walks begin with are there."""

import ast
from collections.abc import Iterator

import pytest
from walks import PACKAGE, WALKS, Walk


def qualified_names(scope: ast.AST, prefix: str = "") -> Iterator[str]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name
            yield from qualified_names(node, f"{prefix}{node.name}.<locals>.")
        elif isinstance(node, ast.ClassDef):
            yield from qualified_names(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_begins_with_functions_of_the_package(walk: Walk) -> None:
    for file, function in walk.starts:
        assert function in qualified_names(ast.parse((PACKAGE / file).read_text()))
