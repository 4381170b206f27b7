"""Mean and standard deviation of numbers of any finite size, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

LARGE = 1e100
"""Beyond this, squares and sums of a few thousand numbers may leave float64; what is smaller is computed as it is."""


def scale_of(*largest: float) -> float:
    """What to divide numbers by before they are summed or squared, from the largest of their sizes: mostly 1."""
    size = max(map(abs, largest), default=0.0)
    return size if size > LARGE else 1.0


def mean(values: Sequence[float]) -> float:
    """The mean; finite where the values are, and NaN or infinite where one of them is."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values)
    scale = scale_of(*values)
    return fmean(values) if scale == 1 else scale * fmean([value / scale for value in values])


def std(values: Sequence[float]) -> float:
    """The sample standard deviation (n - 1), 0 of fewer than two values; infinite where it is beyond float64."""
    if len(values) < 2:
        return 0.0
    scale = scale_of(*values)
    return stdev(values) if scale == 1 else scale * stdev([value / scale for value in values])
