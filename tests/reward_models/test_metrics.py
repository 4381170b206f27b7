"""Held-out metrics against brute force and by hand."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from groupwise.reward_models.metrics import (
    against_verifier,
    auc,
    calibration_error,
    label_metrics,
    preference_metrics,
    step_metrics,
)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order(seed: int) -> None:
    draw = random.Random(seed)
    positive = [draw.randrange(6) / 5 for _ in range(7)]
    negative = [draw.randrange(6) / 5 for _ in range(9)]
    pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    assert auc(positive, negative) == pytest.approx(fmean(pairs), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_is_the_weighted_gap_of_ten_bins(seed: int) -> None:
    draw = random.Random(seed)
    p = [draw.random() for _ in range(50)] + [0.0, 1.0, 0.1, 0.3]
    y = [float(draw.random() < 0.5) for _ in p]
    total = 0.0
    for low in range(10):
        inside = [i for i, v in enumerate(p) if low <= v * 10 < low + 1 or (low == 9 and v == 1.0)]
        if inside:
            gap = abs(fmean(p[i] for i in inside) - fmean(y[i] for i in inside))
            total += gap * len(inside) / len(p)
    assert calibration_error(p, y) == pytest.approx(total, abs=1e-12)


def test_labels_by_hand() -> None:
    found = label_metrics([0.9, 0.6, 0.4, 0.2], [1.0, 0.0, 1.0, 0.0])
    assert found["accuracy"] == 0.5
    assert found["auc"] == 0.75
    assert found["calibration_error"] == pytest.approx((0.1 + 0.6 + 0.6 + 0.2) / 4)
    assert "auc" not in label_metrics([0.9, 0.1], [1.0, 0.75])


def test_pairs_by_hand() -> None:
    found = preference_metrics([2.0, 0.0, 1.0], [1.0, 0.0, 3.0])
    assert found["accuracy"] == pytest.approx(0.5)
    pairs = [(a > b) + 0.5 * (a == b) for a in (2, 0, 1) for b in (1, 0, 3)]
    assert found["auc"] == pytest.approx(fmean(pairs))
    # sure by 0.731 and right, by 0.5 of a tie, by 0.881 and wrong: three bins
    assert found["calibration_error"] == pytest.approx((1 - 0.7310586 + 0.0 + 0.8807971) / 3, abs=1e-6)


def test_steps_by_hand() -> None:
    probabilities = [[0.9, 0.2, 0.1], [0.4, 0.2], [0.9, 0.8], [0.3], [0.1, 0.9]]
    labels = [[1.0, 0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0], [None, 0.0]]
    found = step_metrics(probabilities, labels)
    # called wrong: 2, 2, 0, 1, 0 of the labelled; wrong: 2, 1, 0, 0, 1; both: 2, 1, 0, 0, 0
    assert found["step_f1"] == pytest.approx(2 * 3 / (5 + 4))
    assert found["accuracy"] == pytest.approx(6 / 9)
    assert found["first_error_found"] == pytest.approx(1 / 3), "of three outputs with a wrong step the first alone"
    assert found["false_alarms"] == 0.5
    assert step_metrics([[0.3]], [[None]]) == {}
    clean = step_metrics([[0.9]], [[1.0]])
    assert "first_error_found" not in clean
    assert "step_f1" not in clean


def test_against_a_verifier_by_hand() -> None:
    """Groups of 3, 2 and 3: two pairs, of which one is ranked right and one is a tie; none; one, ranked wrong."""
    predicted = [0.9, 0.4, 0.9, 0.2, 0.3, 0.6, None, 0.7]
    right = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    found = against_verifier(predicted, right, [3, 2, 3], probable=True)
    assert found["ranked_right"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["verified"] == pytest.approx(4 / 7)
    assert found["predicted"] == pytest.approx(4.0 / 7)
    assert found["gap"] == pytest.approx(0.0)
    assert found["unverified"] == 0
    assert against_verifier(predicted, right, [3, 2, 3], probable=False).keys() == {
        "unverified", "verified", "ranked_right",
    }  # fmt: skip


def test_against_a_verifier_what_it_did_not_score_is_counted() -> None:
    assert against_verifier([0.9, 0.1], [None, 1.0], [2], probable=False) == {"unverified": 1.0, "verified": 1.0}
    assert against_verifier([None], [None], [1], probable=True) == {"unverified": 1.0}


def test_a_ranking_does_not_see_what_tells_prompts_apart() -> None:
    """A judge that knows only how hard each question is has an AUC far above chance, and teaches nothing."""
    predicted = [0.9] * 4 + [0.1] * 4
    right = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert label_metrics(predicted, right)["auc"] == 0.75
    assert against_verifier(predicted, right, [4, 4], probable=True)["ranked_right"] == 0.5
