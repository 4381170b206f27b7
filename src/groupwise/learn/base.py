"""What the loop asks of who learns: from scored groups to a batch, and from a batch to new weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from groupwise.learn.pack import Credit
from groupwise.state import State
from groupwise.types import Scored

Metrics = dict[str, float]


class Learner(Protocol):
    """Owns the policy, its reference, the KL penalty, the token budget and how it is spread over processes: whoever
    needs a forward pass of the policy asks it. A batch is the learner's own affair."""

    @property
    def version(self) -> int:
        """How many updates have changed the weights."""

    @property
    def updates(self) -> int:
        """How many were made, those that were refused included."""

    def refresh(self, iteration: int) -> None:
        """Let the reference become the policy (Algorithm 1, line 3), once per iteration: not again after a resume."""

    def subtract_kl(self, scored: Scored, metrics: Metrics) -> Scored:
        """The groups with a KL penalty in their rewards, where the objective asks for it; else as they are."""

    def prepare(self, scored: Scored, credit: Credit) -> Any:
        """A step's batch: packed, with old and reference log-probs where they are needed."""

    def update(self, batch: Any, passes_done: int = 0) -> Metrics:
        """One pass over the batch; `passes_done` were made before. Metrics of all passes over it so far."""

    def check(self) -> None:
        """Raise what was found in the step, and ends the run now that it is whole."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that the policy computes with, by name."""

    def master_weights(self) -> dict[str, Tensor]:
        """The float32 weights that are trained, by name: a checkpoint's."""

    def state(self) -> State:
        """See `Stateful`."""

    def restore(self, state: State) -> None:
        """See `Stateful`."""
