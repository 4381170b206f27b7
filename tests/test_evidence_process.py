"""The evidence on process supervision: what is run, what is kept, and the tables made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence_process as evidence
from benchmarks.cells import END, stored
from benchmarks.evidence_process import Cell
from groupwise.jobfile import load_job

MACHINE = {"processor": "P", "cores": 2}


def result(cell: Cell, last: float, **more: Any) -> dict[str, Any]:
    points = [{"outputs": 0, "accuracy": 0.25, "step_accuracy": 0.25}]
    points += [{"outputs": 1280, "accuracy": last, "step_accuracy": 0.5, **more}]
    return {**cell._asdict(), "seconds": 60.0, "commit": "abcdef0123", "machine": MACHINE, "curve": points}


def test_every_credit_is_measured_on_three_seeds_and_a_seed_is_finished_before_the_next() -> None:
    found = evidence.cells()
    assert len(found) == len(set(found)) == len({cell.file for cell in found}) == 24
    assert [cell.seed for cell in found] == [0] * 8 + [1] * 8 + [2] * 8
    assert {cell.credit for cell in found if cell.task == "luck"} == {"outcome", "process", "combined"}


@pytest.mark.parametrize("credit", evidence.CREDITS)
def test_a_credit_is_a_job_that_can_run(credit: str) -> None:
    sets = [f"objective.{name}={json.dumps(value)}" for name, value in evidence.CREDITS[credit].items()]
    job = load_job("arithmetic-process", sets).job
    assert job.train.prompts_per_step * job.sampling.num_generations == evidence.OUTPUTS_PER_STEP
    assert job.reward.functions == job.reward.step_functions == ["builtin:arithmetic"]


def test_a_cell_that_has_a_file_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, ran = tmp_path / "page.md", []
    page.write_text(f"before\n{evidence.BEGIN}\nold\n{END}\nafter\n")

    def run(cell: Cell) -> dict[str, Any]:
        ran.append(cell)
        return result(cell, 0.75)

    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "run", run)
    monkeypatch.setattr(evidence, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["evidence", "--cells", "luck-process-0", "luck-outcome-0"])
    evidence.main()
    evidence.main()
    assert ran == [Cell("luck", "outcome", 0), Cell("luck", "process", 0)]
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    assert "2 of 24 cells, 2 minutes in all; P, 2 cores; commit abcdef0" in page.read_text()
    assert "old" not in page.read_text()


@pytest.mark.slow
def test_a_cell_trains_and_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"hidden": 32, "layers": 1, "demonstrations": 64, "batch_size": 8}
    quick |= {"ready_loss": 9.0, "tail_steps": 3, "max_steps": 9, "lucky": 0.3}
    monkeypatch.setenv("GROUPWISE_CACHE", str(tmp_path))
    for name, value in {"TASKS": {"luck": quick}, "STEPS": 10, "EVERY": 5, "HELD_OUT": 4}.items():
        monkeypatch.setattr(evidence, name, value)
    found = evidence.run(Cell("luck", "process, mean", 1))
    assert [point["outputs"] for point in found["curve"]] == [0, 640, 1280]
    assert all({"accuracy", "step_accuracy", "mean_length"} <= point.keys() for point in found["curve"])
    assert (found["task"], found["credit"], found["seed"]) == ("luck", "process, mean", 1)
    assert found["objective"]["step_return"] == "mean"
    assert json.loads(json.dumps(found)) == found
    assert "(1 seed)" in evidence.tables([found])


def test_a_table_has_mean_and_spread_over_seeds() -> None:
    text = evidence.tables([result(Cell("carry", "outcome", seed), last) for seed, last in enumerate((0.5, 0.7, 0.9))])
    assert "| outcome (3 seeds) | 0.250 ± 0.000 | 0.700 ± 0.200 |" in text
    assert "| outcome (3 seeds) | 0.250 ± 0.000 | 0.500 ± 0.000 |" in text
    assert "| outputs sampled | 0 | 1,280 |" in text
    one = evidence.tables([result(Cell("luck", "process", 0), 0.5, mean_length=24.25)])
    assert "| process (1 seed) | – | 24.2 |" in one
    assert "No cell has been measured" in evidence.tables([])


def test_evaluations_become_points() -> None:
    events = [
        {"step": 0, "eval/accuracy": 0.25, "eval/step_accuracy": 0.5},
        {"step": 1, "reward": 0.5},
        {"step": 10, "eval/accuracy": 0.5, "eval/right_by_luck": None},
    ]
    assert evidence.curve(events) == [
        {"outputs": 0, "accuracy": 0.25, "step_accuracy": 0.5},
        {"outputs": 1280, "accuracy": 0.5},
    ]


def test_the_committed_page_shows_the_committed_results() -> None:
    text = evidence.PAGE.read_text(encoding="utf-8")
    assert evidence.tables(stored(evidence.cells())).strip() in text.partition(evidence.BEGIN)[2].partition(END)[0]
