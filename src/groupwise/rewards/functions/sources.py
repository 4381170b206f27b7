"""The source files behind a function that is named `file.py:name` or `package.module:name`; nothing is imported."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

MOST = 200
"""So many files are followed: who imports more is reading a library."""


def sources_of(spec: str) -> dict[str, Path]:
    """`{"rewards.py": Path(...), "helpers.py": Path(...)}`: the file, and what it imports of its own folder; of a
    module also what it imports of its own package. What cannot be found is left to whoever loads it."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        named = Path(place).expanduser()
        return _followed(named, named.parent, str(Path(place).parent), within="") if named.is_file() else {}
    package = place.partition(".")[0]
    for root in [Path.cwd(), *(Path(entry or os.curdir) for entry in sys.path)]:
        if file := _file_of(root, place):
            return _followed(file, root, "", within=package)
    found = PathFinder.find_spec(package)  # an editable installation has a finder's answer, and no folder on the path
    if found is None or not found.origin or found.origin == "built-in":
        return {}
    top = Path(found.origin)
    root = top.parent.parent if top.name == "__init__.py" else top.parent
    whole = _file_of(root, place)
    return _followed(whole, root, "", within=package) if whole else {}


def _followed(first: Path, root: Path, named: str, within: str) -> dict[str, Path]:
    """A file and those that it imports from below `root`, of the package `within` where one is named."""
    found: dict[str, Path] = {}
    waiting = [first]
    while waiting and len(found) < MOST:
        file = waiting.pop(0)
        name = os.path.normpath(Path(named) / os.path.relpath(file, root))
        if name in found:
            continue
        found[name] = file
        own = (one for one in _imported(file, root) if not within or one.partition(".")[0] == within)
        waiting.extend(other for one in own if (other := _file_of(root, one)))
    return found


def _imported(file: Path, root: Path) -> Iterator[str]:
    """The modules that a file imports, by their whole names; a name may be that of something inside a module."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # whoever loads it says so
        return
    package = Path(os.path.relpath(file, root)).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)


def _file_of(root: Path, module: str) -> Path | None:
    if not module:
        return None
    place = root.joinpath(*module.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)
