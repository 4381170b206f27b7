"""The table of metrics, and the page made from it."""

from __future__ import annotations

from pathlib import Path

from groupwise.watch.metrics import METRICS, document, unknown

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_says_what_the_table_says() -> None:
    assert PAGE.read_text() == document(), "write groupwise.watch.metrics.document() to docs/metrics.md"


def test_every_metric_has_its_own_name_a_unit_and_a_sentence() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.unit
        assert metric.meaning.endswith(".")
        assert "|" not in metric.meaning, "it would end the table's cell"


def test_unknown_names_are_found_in_their_order() -> None:
    names = ["reward", "rewards/score/mean", "rewards/score", "eval/pass@4", "eval/pass@", "rewards/a/b/mean", "kl2"]
    assert unknown(names) == ["rewards/score", "eval/pass@", "rewards/a/b/mean", "kl2"]


def test_every_name_of_the_table_is_known_with_its_placeholder_filled_in() -> None:
    assert unknown(metric.name.replace("<name>", "file.py:score").replace("<k>", "8") for metric in METRICS) == []
