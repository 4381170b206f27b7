"""What every reward does: look at the groups of a step, say what each output earned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from groupwise.types import Group

Values = list[list[float | None]]
"""Per group, per output: a reward, or None where the output was not scored."""


@dataclass(frozen=True)
class Outcome:
    """What one call for all outputs of a step came to.

    `key` names the reward, or what else was called, among all; `who` in messages. `scored`: whether any output or step
    got a value; `fault` is why the first one did not, empty where that was not for a failure. `covered`: whether each
    output got a value from another reward.
    """

    key: str
    who: str
    scored: bool
    fault: str = ""
    covered: bool = False


@dataclass
class RewardContext:
    """What a reward may know and report beside its values.

    `step` counts optimizer batches that are over, of `total_steps`, and `epoch` passes over the prompts, of `epochs`
    where that is known.
    `metrics` collects numbers for the step's event, `extras` columns for `rollouts.jsonl` (one entry per output, in the
    order of the groups): what two rewards report under one name stands under the second one's own name too, and of what
    a function logs several times the mean. `faults` says why outputs have no value (the first one suffices), `outcomes`
    what calls came to.
    `warn` shows a sentence to the user.
    """

    step: int
    total_steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    warn: Callable[[str], None] = lambda message: None
    epoch: float = 0.0
    epochs: int | None = None
    faults: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)


@runtime_checkable
class Reward(Protocol):
    """Scores the outputs of a step, of which it sees all."""

    name: str

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Values:
        """One value per output of each group. Raises RewardError where values cannot be used (NaN, a string)."""

    def close(self) -> None:
        """Give back what the reward holds (a worker process)."""
