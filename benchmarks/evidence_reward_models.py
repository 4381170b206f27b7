"""Runs that train their own reward model: what the recipes reach, and what refresh and replay are worth.

`make evidence-reward-models` runs every cell (variant, seed) that has no file in `results/reward-models/` yet, and
writes the tables of `docs/iterative.md` from those that have. A cell that is interrupted is run again from its start;
to measure a cell anew, remove its file.

The bar of a recipe: held-out accuracy, by the verifier, at least doubles and gains 40 points, and the job with its
warm-up takes at most eight minutes on two cores. The other variants change one thing of `arithmetic-iterative`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.cells import Result, rows, run_missing, stored, train, where, with_spread, write_page
from benchmarks.evidence import machine, meets_bar

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "reward-models"
PAGE = ROOT / "docs" / "iterative.md"
BEGIN = "<!-- evidence: written by benchmarks/evidence_reward_models.py -->"

MINUTES = 8.0
SEEDS = (0, 1, 2)
RECIPES = {"iterative": "arithmetic-iterative", "prm": "arithmetic-prm"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "labels": {"reward_model.labels": "verifier"},
    "no refresh": {"train.iterations": 1, "train.steps": 6},
    "no replay": {"reward_model.replay": 0.0},
}
"""What each changes in `arithmetic-iterative`."""
WINDOW = 2
"""Steps that a mean over training outputs is taken over: those of one iteration of `arithmetic-iterative`."""


class Cell(NamedTuple):
    """One run."""

    variant: str
    seed: int

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return RESULTS / f"{self.variant.replace(' ', '-')}-{self.seed}.json"


def cells() -> list[Cell]:
    """Every cell; a seed of all of them comes before the next seed."""
    return [Cell(variant, seed) for seed in SEEDS for variant in (*RECIPES, *VARIANTS)]


def run(cell: Cell) -> Result:
    """Train a cell as a user would, its warm-up included, and return its result."""
    recipe = RECIPES.get(cell.variant, RECIPES["iterative"])
    settings = {"seed": cell.seed, "eval.every": WINDOW, **VARIANTS.get(cell.variant, {})}
    with tempfile.TemporaryDirectory() as cache:
        events, result = train(recipe, settings, {"GROUPWISE_CACHE": cache})
    kept = {name: result[name] for name in ("seconds", "commit", "version", "eval_before", "eval_after")}
    return {**cell._asdict(), **kept, "machine": machine(), "met": meets_bar(result, MINUTES), **curves(events)}


def curves(events: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Of a run's events: evaluations, training outputs by the reward model and by the verifier, rounds."""
    told = list(events)
    steps = [event for event in told if "reward_model/verified" in event]
    return {
        "evals": [{"step": e["step"], "accuracy": e["eval/accuracy"]} for e in told if "eval/accuracy" in e],
        "steps": [
            {"step": e["step"], "score": _score(e), "verified": e["reward_model/verified"],
             "ranked": e.get("reward_model/ranked_right"), "scoring": e["time/reward"],
             "seconds": e["time/step"] - e.get("time/eval", 0.0)}
            for e in steps
        ],
        "rounds": [
            {name: e[f"reward_model/{key}"] for name, key in _ROUND.items() if e.get(f"reward_model/{key}") is not None}
            for e in told
            if "reward_model/round" in e
        ],
    }  # fmt: skip


def _score(event: Mapping[str, Any]) -> float:
    """The mean that the reward model gave, to outputs or to steps."""
    score: float = next(
        event[f"{s}rewards/reward_model/mean"] for s in ("", "step_") if f"{s}rewards/reward_model/mean" in event
    )
    return score


_ROUND = {
    "round": "round", "new": "new", "replayed": "replayed", "before": "before/accuracy", "after": "eval/accuracy",
    "auc": "eval/auc",
}  # fmt: skip
"""What is kept of a round."""


def tables(results: Sequence[Result]) -> str:
    """All results as Markdown."""
    if not results:
        return "No cell has been measured yet: `make evidence-reward-models` runs them.\n"
    named = [name for name in (*RECIPES, *VARIANTS) if any(result["variant"] == name for result in results)]
    lines = ["**Held-out accuracy by the verifier.**", "", *_reached(results, named), ""]
    lines += ["**Held-out accuracy over the steps.**", "", *_over(results, named, _evals, "step"), ""]
    lines += ["**Right training outputs, by the verifier, over the steps.**", ""]
    lines += [*_over(results, named, lambda result: _windows(result, "verified"), "steps up to"), ""]
    lines += ["**The reward model's mean score of the same outputs**, in its own unit.", ""]
    lines += [*_over(results, named, lambda result: _windows(result, "score"), "steps up to"), ""]
    lines += ["**Pairs of a right and a wrong output of a group that the reward model ranks so**; 0.5 is chance.", ""]
    lines += [*_over(results, named, lambda result: _windows(result, "ranked"), "steps up to"), ""]
    lines += ["**Held-out accuracy of the reward model after each round.**", ""]
    lines += [*_over(results, named, _rounds, "round"), ""]
    shares = [sum(s["scoring"] for s in r["steps"]) / sum(s["seconds"] for s in r["steps"]) for r in results]
    lines.append(f"Scoring by the reward model took {fmean(shares):.1%} of the steps' time, {max(shares):.1%} at most.")
    return "\n".join([*lines, "", where(results, len(cells()))]) + "\n"


def _reached(results: Sequence[Result], named: Sequence[str]) -> list[str]:
    lines = []
    for result in sorted(results, key=lambda one: (named.index(one["variant"]), one["seed"])):
        bar = ("met" if result["met"] else "missed") if result["variant"] in RECIPES else ""
        change = f"{result['eval_before']:.3f} -> {result['eval_after']:.3f}"
        lines.append([result["variant"], str(result["seed"]), change, f"{result['seconds']:.0f} s", bar])
    return rows(["variant", "seed", "before and after", "whole job", "bar"], lines)


def _over(results: Sequence[Result], named: Sequence[str], points: Any, header: str) -> list[str]:
    """A row per variant, a column per place at which any of them has a value."""
    found = [(result["variant"], points(result)) for result in results]
    places = sorted({place for _, of_result in found for place in of_result})
    lines = []
    for name in named:
        own = [of_result for variant, of_result in found if variant == name]
        lines.append([name, *(with_spread([one[place] for one in own if place in one]) for place in places)])
    return rows([header, *map(str, places)], lines)


def _evals(result: Result) -> dict[int, float]:
    return {point["step"]: point["accuracy"] for point in result["evals"]}


def _rounds(result: Result) -> dict[int, float]:
    return {int(point["round"]): point["after"] for point in result["rounds"] if "after" in point}


def _windows(result: Result, measure: str) -> dict[int, float]:
    """Means over every so many steps, by the last of them."""
    windows: dict[int, list[float]] = {}
    for point in result["steps"]:
        if point[measure] is not None:
            windows.setdefault(-(-point["step"] // WINDOW) * WINDOW, []).append(point[measure])
    return {last: fmean(values) for last, values in windows.items()}


def told(result: Result) -> str:
    """A cell in a line."""
    bar = f", bar {'met' if result['met'] else 'MISSED'}" if result["variant"] in RECIPES else ""
    return f"accuracy {result['eval_before']:.3f} -> {result['eval_after']:.3f}{bar}"


def main() -> None:
    """Run what is missing, a line per cell, and write the page after each."""
    run_missing(cells(), run, told, lambda: write_page(tables(stored(cells())), PAGE, BEGIN), __doc__)


if __name__ == "__main__":
    main()
