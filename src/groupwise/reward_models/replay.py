"""Examples of earlier rounds, a share of which is learned again in each round (arXiv:2402.03300, section 4.1.4)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from groupwise.seeds import stable_hash

Example = Mapping[str, Any]
"""A row that JSON has a form for, in one of the formats that reward models learn from."""


class _Kept(NamedTuple):
    """An example, and the round and number that name it."""

    round: int
    number: int
    row: Example


class ReplayStore:
    """At most `capacity` examples: a choice of all that were ever added, each equally likely, decided by `seed`."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seed = capacity, seed
        self._kept: list[_Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def compares(self) -> bool:
        """Whether examples are pairs of which one output is the better."""
        return bool(self._kept) and "chosen" in self._kept[0].row

    def add(self, rows: Sequence[Example], round_number: int) -> None:
        """Put in the new examples of a round; what the store has no room for goes, be it old or new."""
        kept = [*self._kept, *(_Kept(round_number, number, row) for number, row in enumerate(rows))]
        if len(kept) > self.capacity:
            kept = sorted(kept, key=lambda one: self._rank("replay", one))[: self.capacity]
        self._kept = sorted(kept, key=lambda one: (one.round, one.number))

    def draw(self, new: int, fraction: float, round_number: int) -> list[Example]:
        """Old examples to be learned beside `new` new ones, so that they are `fraction` of the mixture: `round(h / (1 -
        h) * new)` of them, or all there are. Each round draws anew."""
        wanted = round(fraction / (1.0 - fraction) * new)
        drawn = sorted(self._kept, key=lambda one: self._rank(f"mixture {round_number}", one))[:wanted]
        return [one.row for one in sorted(drawn, key=lambda one: (one.round, one.number))]

    def _rank(self, purpose: str, one: _Kept) -> int:
        return stable_hash(self.seed, purpose, one.round, one.number)

    def lines(self) -> list[str]:
        """The store as lines of JSON."""
        return [json.dumps(one) for one in self._kept]

    def load(self, lines: Iterable[str]) -> None:
        """Become what `lines` gave."""
        self._kept = [_Kept(*json.loads(line)) for line in lines]
