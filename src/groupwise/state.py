"""What a part of a run needs to go on from a checkpoint, and who has such a thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

_NONE: Mapping[str, Any] = MappingProxyType({})


class Lazily(Mapping[str, str]):
    """Texts that are made when they are asked for: most states are looked at for their values alone."""

    def __init__(self, made_by: Mapping[str, Callable[[], str]]) -> None:
        self._made_by = made_by

    def __getitem__(self, name: str) -> str:
        return self._made_by[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made_by)

    def __len__(self) -> int:
        return len(self._made_by)


@dataclass(frozen=True)
class State:
    """Everything that decides what a part does next.

    `tensors` by the file that they go to and their name, `values` as JSON can hold them, `lines` by file name. `source`
    says in messages where it was read.
    """

    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: _NONE)
    values: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    lines: Mapping[str, str] = field(default_factory=lambda: _NONE)
    source: str = "the checkpoint"


class Stateful(Protocol):
    """A part of a run that a checkpoint must hold."""

    def state(self) -> State:
        """What it is like now. Tensors are its own, not copies."""

    def restore(self, state: State) -> None:
        """Take up where `state` left off. Raises GroupwiseError where that was of something else."""
