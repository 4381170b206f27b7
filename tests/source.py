"""The package's source as syntax trees, for the tests that hold its shape."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "src" / "groupwise"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Import(NamedTuple):
    """An imported name, and whether that waits for a call or is for the type checker only."""

    name: str
    deferred: bool


def modules() -> dict[str, str]:
    """The text of every module by its name: `{"groupwise.learn.pack": ...}`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")
    return found


@cache
def imports(text: str) -> list[Import]:
    """What a module imports. `from a import b` counts as `a.b`, since `b` may be a module."""
    return list(_imports(ast.parse(text), deferred=False))


def _imports(node: ast.AST, deferred: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are absolute"
            yield from (Import(f"{child.module}.{alias.name}", deferred) for alias in child.names)
        else:
            types_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            yield from _imports(child, deferred or types_only or isinstance(child, FUNCTIONS))


def functions(text: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a module, nested ones too."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, FUNCTIONS)]
