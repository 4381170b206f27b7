"""The cores of this machine: work dealt out to them evenly, and torch's threads for a part of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

LARGEST = 1 << 27
"""Parameters of a model that several cores compute with apart: larger matmuls keep all of them busy together, and what
each needs of its own, such as gradients, would be felt."""
UNEVEN = 1.25
"""How much more than the mean the largest share may be: beyond that, threads inside each operation finish earlier."""


def even_shares(sizes: Sequence[float], most: int) -> list[list[int]]:
    """Indexes of `sizes` in as many shares of nearly equal sums as there can be, at most `most`; one where none are.

    Within a share they keep their order.
    """
    for count in range(min(most, len(sizes)), 1, -1):
        shares: list[list[int]] = [[] for _ in range(count)]
        loads = [0.0] * count
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            least = loads.index(min(loads))
            shares[least].append(index)
            loads[least] += sizes[index]
        if max(loads) <= UNEVEN * sum(loads) / count:
            return [sorted(share) for share in shares]
    return [list(range(len(sizes)))]


def threads_each(parts: int) -> int:
    """How many of torch's threads each of `parts` has that run at once."""
    return max(1, torch.get_num_threads() // parts)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Operations of this thread use `count` of torch's threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
