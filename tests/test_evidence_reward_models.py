"""The evidence on runs that train a reward model: what is run, what is kept, and the tables made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import evidence_reward_models as evidence
from benchmarks.cells import END, stored
from benchmarks.evidence_reward_models import Cell
from groupwise.jobfile import load_job, recipe_names


def event(step: int, **metrics: float) -> dict[str, Any]:
    return {"step": step, **{name.replace("__", "/"): value for name, value in metrics.items()}}


def step(n: int, **metrics: float) -> dict[str, Any]:
    return event(n, rewards__reward_model__mean=-2.5, reward_model__verified=n / 100, time__reward=1.0, **metrics)


EVENTS = [
    event(0, eval__accuracy=0.25),
    event(0, reward_model__round=0.0, reward_model__new=90.0, reward_model__eval__accuracy=0.75),
    *(step(n, time__step=10.0) for n in range(1, 8)),
    step(8, time__step=12.0, time__eval=2.0, eval__accuracy=0.5, reward_model__ranked_right=0.75),
]  # fmt: skip


def result(cell: Cell, after: float) -> dict[str, Any]:
    about = {"seconds": 60.0, "commit": "abcdef0123", "machine": {"processor": "P", "cores": 2}, "met": after > 0.6}
    return {**cell._asdict(), **about, "eval_before": 0.25, "eval_after": after, **evidence.curves(EVENTS)}


def test_every_variant_is_run_on_three_seeds_and_a_seed_is_finished_before_the_next() -> None:
    found = evidence.cells()
    assert len({cell.file for cell in found}) == len(found) == 15
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)


@pytest.mark.parametrize("variant", [*evidence.RECIPES, *evidence.VARIANTS])
def test_a_variant_is_a_job_that_can_run(variant: str) -> None:
    recipe = evidence.RECIPES.get(variant, evidence.RECIPES["iterative"])
    assert recipe in recipe_names()
    sets = [f"{name}={json.dumps(value)}" for name, value in evidence.VARIANTS.get(variant, {}).items()]
    job, whole = load_job(recipe, sets).job, load_job(recipe).job
    assert job.train.iterations * job.train.steps == whole.train.iterations * whole.train.steps, "the same samples"
    if variant in evidence.VARIANTS:
        assert job != whole
    if recipe == evidence.RECIPES["iterative"]:
        assert whole.train.steps == evidence.WINDOW
        assert whole.train.iterations >= 3


def test_events_become_curves() -> None:
    found = evidence.curves(EVENTS)
    assert found["evals"] == [{"step": 0, "accuracy": 0.25}, {"step": 8, "accuracy": 0.5}]
    assert found["rounds"] == [{"round": 0.0, "new": 90.0, "after": 0.75}]
    assert len(found["steps"]) == 8
    assert found["steps"][-1]["seconds"] == 10.0, "an evaluation is no part of a step"


def test_tables_have_mean_and_spread_over_seeds() -> None:
    several = [result(Cell("iterative", seed), after) for seed, after in enumerate((0.5, 0.7, 0.9))]
    text = evidence.tables([*several, result(Cell("no refresh", 0), 0.3)])
    assert "| iterative | 0 | 0.250 -> 0.500 | 60 s | missed |" in text
    assert "| iterative | 2 | 0.250 -> 0.900 | 60 s | met |" in text
    assert "| no refresh | 0 | 0.250 -> 0.300 | 60 s |  |" in text
    assert "| iterative | 0.250 ± 0.000 | 0.500 ± 0.000 |" in text
    assert "| iterative | 0.015 ± 0.000 | 0.035 ± 0.000 |" in text, "means of two steps"
    assert "| iterative | -2.500 ± 0.000 |" in text, "the score"
    assert "| iterative | 0.750 ± 0.000 |" in text, "where there was anything to rank"
    assert "took 10.0% of the steps' time" in text
    assert "4 of 15 cells, 4 minutes in all; P, 2 cores; commit abcdef0." in text
    assert "No cell has been measured" in evidence.tables([])


def test_the_committed_page_shows_the_committed_results() -> None:
    text = evidence.PAGE.read_text(encoding="utf-8")
    assert evidence.tables(stored(evidence.cells())).strip() in text.partition(evidence.BEGIN)[2].partition(END)[0]
