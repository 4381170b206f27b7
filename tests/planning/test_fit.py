"""What a job leaves open about memory is settled from a plan, once, and stands in the run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import BUILTIN, Job
from groupwise.errors import ModelError
from groupwise.jobfile import load_job
from groupwise.planning import fit
from groupwise.planning import plan as plans
from groupwise.planning.plan import Plan
from groupwise.planning.trace import UntraceableError
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.settings import BUDGET
from tests.run.tiny import save_model

PLAN = Plan(
    model="m", device="cpu", dtype="float32", layout="shared", prompts="", longest_prompt=9, memory={}, passes={},
    activations={}, needed=9_000_000, free=7_000_000, verdict="fits", fits=True, tokens_per_micro_batch=BUDGET,
    gradient_checkpointing=False, seconds={},
)  # fmt: skip
TIGHT = replace(
    PLAN, verdict="fits with gradient checkpointing and tokens_per_micro_batch = 512", fits=False,
    tokens_per_micro_batch=512, gradient_checkpointing=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("fit") / "model")


def chosen(monkeypatch: pytest.MonkeyPatch, folder: Path, plan: Plan | None, *changes: str) -> tuple[Job, list[str]]:
    """The job as `choose_budget` leaves it when it plans so, and what it said; None: it must not plan."""
    said: list[str] = []
    monkeypatch.setattr(plans, "plan_of", lambda *_, **__: plan or pytest.fail("it planned"))
    if plan is not None:
        monkeypatch.setattr(fit, "available_memory", lambda device: 0)
    job = load_job(None, changes, {"model": str(folder), "data": BUILTIN}).job
    return fit.choose_budget(job, PythonObjects(), said.append), said


def numbers(job: Job) -> tuple[Any, Any]:
    return job.train.tokens_per_micro_batch, job.model.gradient_checkpointing


def test_where_there_is_room_many_times_over_nothing_is_traced(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    job, said = chosen(monkeypatch, folder, None)
    assert (numbers(job), said) == ((BUDGET, False), [])


def test_an_output_fits_into_the_budget_that_nobody_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    job, _ = chosen(monkeypatch, folder, None, "sampling.max_completion_length=20000")
    assert numbers(job) == (20000, False)


def test_where_there_is_room_nothing_is_said(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    job, said = chosen(monkeypatch, folder, PLAN)
    assert (numbers(job), said) == ((BUDGET, False), ["planning memory"])


def test_where_there_is_little_the_plan_is_followed_and_told(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    job, said = chosen(monkeypatch, folder, TIGHT)
    assert numbers(job) == (512, True)
    assert said[1:] == ["memory: fits with gradient checkpointing and tokens_per_micro_batch = 512"]


def test_what_the_job_names_is_kept(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    named = ("train.tokens_per_micro_batch=300", "model.gradient_checkpointing=true")
    assert numbers(chosen(monkeypatch, folder, None, *named)[0]) == (300, True)


@pytest.mark.parametrize(
    ("plan", "changes"),
    [(replace(PLAN, verdict=fit.NOTHING_FITS, fits=False), ()), (TIGHT, ("train.tokens_per_micro_batch=300",))],
    ids=["nothing fits", "what is named does not fit"],
)
def test_what_cannot_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, folder: Path, plan: Plan, changes: tuple[str, ...]
) -> None:
    with pytest.raises(ModelError, match=r"9\.0 MB of the 7\.0 MB that are free; it .*fit.* `groupwise plan`"):
        chosen(monkeypatch, folder, plan, *changes)


def test_a_class_that_cannot_be_planned_is_trained_with_the_budget_of_those_that_name_none(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def cannot(*_: object, **__: object) -> Plan:
        raise UntraceableError("It cannot be told.")

    monkeypatch.setattr(plans, "plan_of", cannot)
    monkeypatch.setattr(fit, "available_memory", lambda device: 0)
    said: list[str] = []
    job = load_job(None, (), {"model": str(folder), "data": BUILTIN}).job
    assert numbers(fit.choose_budget(job, PythonObjects(), said.append)) == (BUDGET, False)
    half = "Micro-batches have 16,384 tokens, and half as many where memory runs out."
    assert said == ["planning memory", f"It cannot be told. {half}"]


def test_a_plan_is_that_of_the_numbers_that_would_be_taken(folder: Path) -> None:
    """No weights are read: a real plan of the tiny model settles it."""
    job = load_job(None, ["sampling.max_completion_length=16"], {"model": str(folder), "data": BUILTIN}).job
    plan = plans.plan_of(job, memory_only=True)
    assert (plan.seconds, plan.activations) == ({}, {})
    assert (plan.tokens_per_micro_batch, plan.gradient_checkpointing, plan.verdict) == (BUDGET, False, "fits")
