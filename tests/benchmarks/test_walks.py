"""walks.py: the functions that walks begin with are there."""

import ast
from collections.abc import Iterator

import pytest
from walks import DEMAND, LOAD, PACKAGE, PREDICTION, RECORD, ROUTING, Walk


def qualified_names(scope: ast.AST, prefix: str = "") -> Iterator[str]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name
            yield from qualified_names(node, f"{prefix}{node.name}.<locals>.")
        elif isinstance(node, ast.ClassDef):
            yield from qualified_names(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("walk", [RECORD, LOAD, ROUTING, PREDICTION, DEMAND])
def test_a_walk_begins_with_a_function_of_the_package(walk: Walk) -> None:
    assert walk.function in qualified_names(ast.parse((PACKAGE / walk.file).read_text()))
