"""How good a reward model is on what it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from statistics import fmean

import numpy as np

BINS = 10
"""Of equal width, in the calibration error."""
PREFIX = "reward_model/"
"""What metrics of a reward model's training begin with, also where it is trained inside a policy's run."""
Metrics = dict[str, float]


def label_metrics(probabilities: Sequence[float], labels: Sequence[float]) -> Metrics:
    """Accuracy, AUC and calibration error of probabilities of being right, against labels in [0, 1].

    A label of 0.5 or more counts as right. No AUC where all labels are on one side.
    """
    right = [label >= 0.5 for label in labels]
    found = {"accuracy": fmean((p >= 0.5) == truth for p, truth in zip(probabilities, right, strict=True))}
    positive = [p for p, truth in zip(probabilities, right, strict=True) if truth]
    negative = [p for p, truth in zip(probabilities, right, strict=True) if not truth]
    if positive and negative:
        found["auc"] = auc(positive, negative)
    return found | {"calibration_error": calibration_error(probabilities, labels)}


def preference_metrics(chosen: Sequence[float], rejected: Sequence[float]) -> Metrics:
    """The same of pairs of scores: how often the chosen one is higher (a tie counts half), how well scores tell
    chosen from rejected across pairs, and how often a preference is right beside how sure of it the model is."""
    margins = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    hits = np.where(margins == 0, 0.5, margins > 0)
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    return {
        "accuracy": float(hits.mean()),
        "auc": auc(chosen, rejected),
        "calibration_error": calibration_error(sure.tolist(), hits.tolist()),
    }


def against_verifier(
    probabilities: Sequence[float | None], right: Sequence[float | None], groups: Sequence[int], *, probable: bool
) -> Metrics:
    """What a reward model says of outputs in training beside what a verifier says of the same ones, group after group;
    `groups` are their sizes. None: not scored by the model, or not by the verifier (`unverified` counts these).

    `verified` is the share of right ones, `predicted` the model's mean probability and `gap` by how much that is more;
    the two are left out where scores have no such meaning (not `probable`). `ranked_right` is the share of the pairs of
    a right and a wrong output of a group in which the right one scores higher, ties counting half.
    """
    found = {"unverified": float(sum(truth is None for truth in right))}
    known = [(p, r) for p, r in zip(probabilities, right, strict=True) if p is not None and r is not None]
    if known:
        found["verified"] = fmean(r for _, r in known)
        if probable:
            found["predicted"] = fmean(p for p, _ in known)
            found["gap"] = found["predicted"] - found["verified"]
    both, hits, pairs = zip(probabilities, right, strict=True), 0.0, 0
    for size in groups:
        group = [(p, r) for p, r in islice(both, size) if p is not None and r is not None]
        sides = [p for p, r in group if r], [p for p, r in group if not r]
        if all(sides):
            count = len(sides[0]) * len(sides[1])
            hits, pairs = hits + auc(*sides) * count, pairs + count
    return found | ({"ranked_right": hits / pairs} if pairs else {})


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a positive scores above a negative, ties counting half; from ranks (Mann and Whitney)."""
    scores = np.concatenate([np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)])
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    above = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(above / (len(positive) * len(negative)))


def calibration_error(probabilities: Sequence[float], labels: Sequence[float]) -> float:
    """Expected calibration error: `|mean probability - mean label|` per bin, weighted by how many are in it."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = [abs((p[bins == b] - y[bins == b]).sum()) for b in range(BINS)]
    return float(sum(gaps) / len(p))


def step_metrics(probabilities: Sequence[Sequence[float]], labels: Sequence[Sequence[float | None]]) -> Metrics:
    """Of outputs' steps: `label_metrics` over all labelled steps, and how well wrong ones are found.

    `step_f1` is the F1 of finding wrong steps. `first_error_found` is the share of outputs with a wrong step in which
    the first step that the model calls wrong is the first wrong one; `false_alarms` the share of outputs without a
    wrong step in which it calls one wrong. Steps without a label are left out. What has no case is absent.
    """
    known = [
        [(p, label) for p, label in zip(*of_output, strict=True) if label is not None]
        for of_output in zip(probabilities, labels, strict=True)
    ]
    flat = [pair for of_output in known for pair in of_output]
    if not flat:
        return {}
    found = label_metrics([p for p, _ in flat], [label for _, label in flat])
    called = sum(p < 0.5 for p, _ in flat)
    wrong = sum(label < 0.5 for _, label in flat)
    if called + wrong:
        found["step_f1"] = 2 * sum(p < 0.5 and label < 0.5 for p, label in flat) / (called + wrong)
    firsts = [(_first(p for p, _ in one), _first(label for _, label in one)) for one in known if one]
    errors = [guess == truth for guess, truth in firsts if truth is not None]
    clean = [guess is not None for guess, truth in firsts if truth is None]
    found |= {"first_error_found": fmean(errors)} if errors else {}
    return found | ({"false_alarms": fmean(clean)} if clean else {})


def _first(values: Iterable[float]) -> int | None:
    """The number of the first step that is, or is called, wrong."""
    return next((number for number, value in enumerate(values) if value < 0.5), None)
