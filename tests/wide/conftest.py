"""The sweep over all classes runs only where it is asked for, whole or in part."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="which part of the sweep to run, as 2/8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is `wide`, unless `-m` names it; then keep every n-th of its tests."""
    wide = [item for item in items if item.get_closest_marker("wide")]
    part, parts = map(int, config.getoption("--part", "1/1").split("/"))
    chosen = wide[part - 1 :: parts] if "wide" in config.getoption("markexpr") else []
    left_out = set(wide) - set(chosen)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
