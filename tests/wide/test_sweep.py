"""Every causal class that transformers has does what docs/models.json says of it; see `tests.wide.sweep`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from tests.wide.sweep import CHECKS, KINDS, RESULTS, one

STORED: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
KNOWN = STORED["classes"] if STORED["transformers"] == transformers.__version__ else {}
_TOLD = ("layout", "direct", "head", "cached", "refused")


@pytest.mark.wide
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_does_what_is_said_of_it(kind: str) -> None:
    """In another version of transformers than the stored one: it holds, or is refused or not built with a reason."""
    found = one(kind)
    known = KNOWN.get(kind, {})
    assert found["failed"].keys() <= known.get("failed", {}).keys(), found["failed"]
    if known:
        assert {name: found.get(name) for name in _TOLD} == {name: known.get(name) for name in _TOLD}
        assert ("not_built" in found) == ("not_built" in known)


def test_the_stored_results_are_whole() -> None:
    """Quick, so always run: each class of this version is there, and nothing was checked that is no check."""
    for kind, found in STORED["classes"].items():
        assert found["class"], kind
        assert set(found["failed"]) <= {*CHECKS, "load", "time"}
        assert "layout" not in found or set(CHECKS) <= set(found["checked"]), f"{kind} was not checked whole"
        cut_short = bool({"load", "time"} & found["failed"].keys())
        assert ("layout" in found) + ("refused" in found) + ("not_built" in found) + cut_short == 1
    if STORED["transformers"] == transformers.__version__:
        assert STORED["classes"].keys() == set(KINDS)
