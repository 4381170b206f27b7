"""Outcome against process supervision on the embedded task, at the same number of sampled outputs.

`make evidence-process` runs every cell (task, credit, seed) that has no file in `results/process/` yet, and writes the
tables of `docs/process-supervision.md` from those that have. A cell that is interrupted is run again from its start;
to measure a cell anew, remove its file.

Two tasks. `carry` is the embedded job: most demonstrations forget the carry, so a wrong line makes a wrong answer.
`luck` has demonstrations in which a carry that the first line forgets is added in the second: two wrong lines, and the
right answer. There a reward of the answer cannot tell sound solutions from lucky ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cells import Result, rows, run_missing, stored, train, where, with_spread, write_page
from benchmarks.evidence import machine

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "process"
PAGE = ROOT / "docs" / "process-supervision.md"
BEGIN = "<!-- evidence: written by benchmarks/evidence_process.py -->"

STEPS, EVERY = 80, 10
"""Steps of a cell, and between two evaluations: with 128 outputs a step, a point every 1,280 outputs."""
OUTPUTS_PER_STEP = 128
HELD_OUT = 256
SEEDS = (0, 1, 2)
TASKS: Mapping[str, Mapping[str, float]] = {"carry": {}, "luck": {"careless": 0.2, "lucky": 0.6}}
"""What the demonstrations of the warm-up are like, beside the defaults."""
PROCESS = {"outcome_weight": 0.0, "process_weight": 1.0}
CREDITS: Mapping[str, Mapping[str, Any]] = {
    "outcome": {"outcome_weight": 1.0, "process_weight": 0.0},
    "process": PROCESS,
    "combined": {"outcome_weight": 0.5, "process_weight": 0.5},
    "process, mean": {**PROCESS, "step_return": "mean"},
    "process, index": {**PROCESS, "step_normalization": "index"},
}
"""Names of the tables, and what they set under [objective]."""
MEASURED = {
    "accuracy": "right answers",
    "step_accuracy": "right lines",
    "right_by_luck": "right answers that have a wrong line",
    "mean_length": "tokens of an output",
}
"""What an evaluation says that is kept, and the titles of its tables."""


class Cell(NamedTuple):
    """One run."""

    task: str
    credit: str
    seed: int

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return RESULTS / f"{self.task}-{self.credit.replace(', ', '-')}-{self.seed}.json"


def cells() -> list[Cell]:
    """Every cell; a seed of all of them comes before the next seed. The options are measured on `carry` alone."""
    both = ("outcome", "process", "combined")
    return [Cell(t, c, s) for s in SEEDS for t in TASKS for c in CREDITS if t == "carry" or c in both]


def run(cell: Cell) -> Result:
    """Train a cell in a process of its own and return its result."""
    from groupwise.demo.warmup import WarmUp, ensure_warm
    from groupwise.store.folder import git_commit  # here, so that the tables need no torch

    model = ensure_warm(cell.seed, settings=WarmUp(**TASKS[cell.task]))  # type: ignore[arg-type]
    events, result = train("arithmetic-process", {
        "model.path": str(model), "data.path": "builtin:arithmetic", "seed": cell.seed, "train.steps": STEPS,
        "eval.every": EVERY, "eval.limit": HELD_OUT,
        "checkpoint.every": 0, "checkpoint.best": False, "watch.rollouts": False,
        **{f"objective.{name}": value for name, value in CREDITS[cell.credit].items()},
    })  # fmt: skip
    kept = {name: result[name] for name in ("seconds", "commit", "version")}
    about = {**cell._asdict(), **kept, "commit": result["commit"] or git_commit(), "machine": machine()}
    objective = dict(CREDITS[cell.credit])
    return {**about, "demonstrations": dict(TASKS[cell.task]), "objective": objective, "curve": curve(events)}


def curve(events: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """A run's evaluations by the number of outputs that were sampled before them."""
    return [
        {"outputs": event["step"] * OUTPUTS_PER_STEP}
        | {name: event[f"eval/{name}"] for name in MEASURED if event.get(f"eval/{name}") is not None}
        for event in events
        if "eval/accuracy" in event
    ]


def tables(results: Sequence[Result]) -> str:
    """All results as Markdown: per task and measure, a row per credit, a column per number of outputs."""
    if not results:
        return "No cell has been measured yet: `make evidence-process` runs them.\n"
    lines = []
    for task in dict.fromkeys(result["task"] for result in results):
        own = [result for result in results if result["task"] == task]
        for measure, title in MEASURED.items():
            lines += [f"**Task `{task}`: {title}.**", "", *_table(own, measure), ""]
    lines.append(where(results, len(cells())))
    return "\n".join(lines) + "\n"


def _table(results: Sequence[Result], measure: str) -> list[str]:
    outputs = sorted({point["outputs"] for result in results for point in result["curve"]})
    lines = []
    for credit in [name for name in CREDITS if any(result["credit"] == name for result in results)]:
        own = [result["curve"] for result in results if result["credit"] == credit]
        found = [[p[measure] for c in own for p in c if p["outputs"] == n and measure in p] for n in outputs]
        seeds = "1 seed" if len(own) == 1 else f"{len(own)} seeds"
        lines.append([f"{credit} ({seeds})", *map(with_spread, found)])
    return rows(["outputs sampled", *(f"{n:,}" for n in outputs)], lines)


def told(result: Result) -> str:
    """A cell in a line."""
    first, last = result["curve"][0], result["curve"][-1]
    return ", ".join(f"{name} {first[name]:.3f} -> {last[name]:.3f}" for name in ("accuracy", "step_accuracy"))


def main() -> None:
    """Run what is missing, a line per cell, and write the page after each."""
    run_missing(cells(), run, told, lambda: write_page(tables(stored(cells())), PAGE, BEGIN), __doc__)


if __name__ == "__main__":
    main()
