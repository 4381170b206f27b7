"""Where a pass on tensors without data may leave out what it has seen: rounds of a loop, and attention."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Protocol, TypeVar

from torch import Tensor

from groupwise.models.layout import Forest
from groupwise.models.tiles import Options

Item = TypeVar("Item")


class Counter(Protocol):
    """Runs what is alike once and counts it as often as it is there: see `groupwise.planning.repeats`."""

    def rounds(self, items: Sequence[Item], kind: Callable[[Item], Hashable]) -> Sequence[Item]:
        """What a loop over `items` goes through: those of one `kind` allocate and compute alike."""

    def attention(
        self, forest: Forest, kind: tuple[int, int, bool], inputs: Sequence[Tensor | None], options: Options
    ) -> Tensor:
        """What `TiledAttention` returns for queries, keys, values and sinks. `kind`: see `Forest.tiles`."""


counter: ContextVar[Counter | None] = ContextVar("counter", default=None)
"""None wherever tensors have data."""
