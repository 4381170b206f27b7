"""The benchmark of step labels: what agreement means, and that every way of drawing draws the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import monte_carlo
from benchmarks.monte_carlo import asked_as, compared, continuations

RIGHT = ("1+2=3\n", "3+4=7\n", "7")


def test_agreement_is_counted_by_line_and_up_to_a_line() -> None:
    """A wrong second line: the third repeats it, which is right by itself, and cannot lead anywhere."""
    wrong = ("1+2=3\n", "3+4=8\n", "8")
    found = compared([("1+2+4=\n", RIGHT, (1.0, 0.5, 1.0)), ("1+2+4=\n", wrong, (0.0, 0.25, 0.0))])
    assert found["steps"] == 6
    assert found["line"] == pytest.approx(3 / 6)  # the first output's
    assert found["so_far"] == pytest.approx(4 / 6)  # and the last line of the second
    assert found["missed"] == pytest.approx(1 / 4)
    assert found["lucky"] == pytest.approx(1 / 2)
    assert found["soft_error"] == pytest.approx((0.5 + 1.0 + 0.25) / 6)


def test_steps_without_a_label_are_not_counted() -> None:
    found = compared([("1+2+4=\n", RIGHT, (1.0, None, 1.0))])
    assert (found["steps"], found["line"]) == (2, 1.0)


def test_a_break_at_the_end_is_no_step() -> None:
    assert compared([("1+2+4=\n", (*RIGHT[:2], "7\n"), (1.0, 1.0, 1.0))])["steps"] == 3


def test_each_way_asks_for_the_same_continuations() -> None:
    requests = continuations(prompt=5, prompts=2, vocabulary=20)
    assert len(requests) == 2 * (monte_carlo.STEPS - 1)
    seeds = {(r.token_ids, r.seed + i, r.sampling.max_tokens) for r in requests for i in range(r.n)}
    for way in monte_carlo.WAYS:
        asked = asked_as(way, requests)
        assert {(r.token_ids, r.seed + i, r.sampling.max_tokens) for r in asked for i in range(r.n)} == seeds
        assert len({r.uid for r in asked}) == len(asked)
        assert all((r.branch is not None) == (way == "tree") for r in asked)


def test_the_ways_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monte_carlo, "PROMPTS", {"short": 6})
    monkeypatch.setattr(monte_carlo, "STEP_TOKENS", 2)
    found = monte_carlo.speed("micro", tmp_path / "micro", prompts=1, pairs=1)
    case = found["cases"]["short"]
    assert case["same_outputs"] == {"step": 1.0, "each": 1.0}
    assert case["over_each"] == pytest.approx(case["tokens_per_second"]["tree"] / case["tokens_per_second"]["each"])
