"""Means and deviations of numbers of any finite size."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest

from groupwise.averages import mean, std


def test_usual_numbers_are_averaged_to_the_bit_as_everywhere() -> None:
    values = [0.1, 0.7, -3.3, 12.0]
    assert (mean(values), std(values)) == (fmean(values), stdev(values))
    assert std([3.0]) == std([]) == 0.0


@pytest.mark.parametrize("size", [1e200, 1.7e308])
def test_sums_and_squares_do_not_overflow(size: float) -> None:
    assert mean([size, size, size]) == pytest.approx(size)
    assert mean([size, -size]) == 0.0
    assert std([size, -size, size, -size]) == pytest.approx(size * stdev([1, -1, 1, -1]))


def test_what_is_not_finite_stays_so() -> None:
    assert mean([math.inf, 1.0]) == math.inf
    assert math.isnan(mean([math.inf, -math.inf]))
    assert math.isnan(mean([math.nan, 1.0]))
