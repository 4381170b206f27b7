"""Outcome against process supervision on the embedded task, at the same number of sampled outputs.

`make evidence-process` runs every cell (task, credit, seed) that has no file in `results/process/` yet, and writes the
tables of `docs/process-supervision.md` from those that have. A cell that is interrupted is run again from its start;
to measure a cell anew, remove its file.

Two tasks. `carry` is the embedded job: most demonstrations forget the carry, so a wrong line makes a wrong answer.
`luck` has demonstrations in which a carry that the first line forgets is added in the second: two wrong lines, and the
right answer. There a reward of the answer cannot tell sound solutions from lucky ones."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from benchmarks.evidence import machine

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "process"
PAGE = ROOT / "docs" / "process-supervision.md"
BEGIN, END = "<!-- evidence: written by benchmarks/evidence_process.py -->", "<!-- end of evidence -->"

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
Result = dict[str, Any]


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
    from groupwise.run.folder import git_commit  # here, so that the tables need no torch
    from groupwise.run.warmup import WarmUp, ensure_warm

    model = ensure_warm(cell.seed, settings=WarmUp(**TASKS[cell.task]))  # type: ignore[arg-type]
    settings = {
        "model.path": str(model), "seed": cell.seed, "train.steps": STEPS, "eval.every": EVERY, "eval.limit": HELD_OUT,
        "checkpoint.every": 0, "checkpoint.best": False, "watch.rollouts": False,
        **{f"objective.{name}": value for name, value in CREDITS[cell.credit].items()},
    }  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / "run"
        command = [sys.executable, "-m", "groupwise", "train", "arithmetic-process", "--run", str(at), "--quiet"]
        subprocess.run([*command, *sets], check=True)
        events = [json.loads(line) for line in (at / "events.jsonl").read_text().splitlines()]
        result = json.loads((at / "result.json").read_text())
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


def stored() -> list[Result]:
    """The results of the cells that have been run."""
    return [json.loads(cell.file.read_text()) for cell in cells() if cell.file.exists()]


def tables(results: Sequence[Result]) -> str:
    """All results as Markdown: per task and measure, a row per credit, a column per number of outputs."""
    if not results:
        return "No cell has been measured yet: `make evidence-process` runs them.\n"
    lines = []
    for task in dict.fromkeys(result["task"] for result in results):
        own = [result for result in results if result["task"] == task]
        for measure, title in MEASURED.items():
            lines += [f"**Task `{task}`: {title}.**", "", *_table(own, measure), ""]
    done = {(result["task"], result["credit"], result["seed"]) for result in results}
    commits = sorted({str(result["commit"])[:7] for result in results})
    where = sorted({f"{result['machine']['processor']}, {result['machine']['cores']} cores" for result in results})
    minutes = sum(result["seconds"] for result in results) / 60
    lines.append(
        f"{len(done)} of {len(cells())} cells, {minutes:.0f} minutes in all; {'; '.join(where)}; "
        f"commit {', '.join(commits)}. Mean over seeds ± their sample standard deviation."
    )
    return "\n".join(lines) + "\n"


def _table(results: Sequence[Result], measure: str) -> list[str]:
    outputs = sorted({point["outputs"] for result in results for point in result["curve"]})
    rows = ["| outputs sampled | " + " | ".join(f"{n:,}" for n in outputs) + " |", "|---" * (len(outputs) + 1) + "|"]
    for credit in [name for name in CREDITS if any(result["credit"] == name for result in results)]:
        own = [result["curve"] for result in results if result["credit"] == credit]
        found = [[p[measure] for c in own for p in c if p["outputs"] == n and measure in p] for n in outputs]
        seeds = "1 seed" if len(own) == 1 else f"{len(own)} seeds"
        rows.append(f"| {credit} ({seeds}) | " + " | ".join(map(_with_spread, found)) + " |")
    return rows


def _with_spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; no spread from a single value, a dash from none."""
    if not values:
        return "–"
    digits = 1 if max(values) > 2 else 3
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


def write_page(text: str, page: Path = PAGE) -> None:
    """Put the tables into their place in the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{page} has no place for the tables"
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Run what is missing, a line per cell, and write the page after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", default=[], help="only cells whose file's name contains one of these")
    parser.add_argument("--page", action="store_true", help="only write the page from what is stored")
    options = parser.parse_args()
    # Warm-ups run in this process: threads that spin long for each other are slow beside anything else (LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    RESULTS.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells() if not cell.file.exists() and not options.page]
    for cell in missing:
        if options.cells and not any(part in cell.file.stem for part in options.cells):
            continue
        result = run(cell)
        cell.file.write_text(json.dumps(result, indent=2) + "\n")
        first, last = result["curve"][0], result["curve"][-1]
        change = ", ".join(f"{name} {first[name]:.3f} -> {last[name]:.3f}" for name in ("accuracy", "step_accuracy"))
        print(f"{cell.file.stem}: {change} in {result['seconds']:.0f} s", flush=True)
        write_page(tables(stored()))
    write_page(tables(stored()))


if __name__ == "__main__":
    main()
