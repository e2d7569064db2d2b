"""Files and functions stay readable. When a room gets crowded, split the room, not the rule."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from statistics import median, quantiles

from tests.architecture.checkout import ROOT, modules

FILE_LINES = 400
FUNCTION_LINES = 80
MEDIAN_LINES = 12
P90_LINES = 40


def functions() -> Iterator[tuple[str, int]]:
    """(file:line name, lines from `def` to the end) of every function and method."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                yield where, node.end_lineno - node.lineno + 1


def test_files() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert len(sizes) >= 20, f"found {len(sizes)} modules"
    assert {path: lines for path, lines in sizes.items() if lines > FILE_LINES} == {}


def test_functions() -> None:
    sizes = dict(functions())
    assert len(sizes) >= 150, f"found {len(sizes)} functions"
    assert {where: lines for where, lines in sizes.items() if lines > FUNCTION_LINES} == {}
    assert median(sizes.values()) <= MEDIAN_LINES
    assert quantiles(sizes.values(), n=10)[-1] <= P90_LINES
