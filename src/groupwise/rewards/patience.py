"""When rewards end a run: nothing can be learned from one that fails, or scores nothing, step after step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from groupwise.errors import RewardError
from groupwise.rewards.base import Outcome
from groupwise.state import State

BOUNDARY_STEPS = 10
"""After so many steps in a row without a single boundary the segmenter is taken to be wrong."""
_BOUNDARIES = "boundaries"


@dataclass
class _Streak:
    """Steps in a row without a value, and the first failure among them."""

    steps: int = 0
    fault: str = ""


class Patience:
    """Counts the steps in a row in which a reward, segmenter or judge gave no value for any output, each by itself.

    `steps` of them end a run (by default none do), and as many as it has steps where those are fewer. One that never
    fails, and whose outputs others score, may be meant for other prompts than those of some steps: it ends a run only
    while it has never scored anything. The counts are part of a checkpoint.
    """

    def __init__(self, steps: int = sys.maxsize, total_steps: int = sys.maxsize) -> None:
        self.steps, self.total_steps = steps, total_steps
        self._streaks: dict[str, _Streak] = {}
        self._ever: set[str] = set()
        self._ending: RewardError | None = None

    def count(self, outcomes: Sequence[Outcome]) -> None:
        """Count a step. Raises RewardError where it was one too many."""
        self.count_quietly(outcomes)
        self.check()

    def count_quietly(self, outcomes: Sequence[Outcome]) -> None:
        """Count a step; `check` raises where it was one too many."""
        for one in outcomes:
            if one.scored:
                self._ever.add(one.key)
                self._streaks.pop(one.key, None)
            else:
                self._missed(one)

    def end(self, error: RewardError) -> None:
        """Have `check` raise this."""
        self._ending = self._ending or error

    def check(self) -> None:
        """Raise what ends the run, if anything does."""
        if self._ending is not None:
            raise self._ending

    def boundaries(self, found: bool, said: str, warn: Callable[[str], None]) -> None:
        """Count a step in which the segmenter found boundaries, or none, of which `said` tells.

        Raises RewardError after `BOUNDARY_STEPS` in a row while there never was one; later that is a warning, since a
        policy may have learned to answer in one step.
        """
        if found:
            self._ever.add(_BOUNDARIES)
            self._streaks.pop(_BOUNDARIES, None)
            return
        streak = self._streaks.setdefault(_BOUNDARIES, _Streak())
        streak.steps += 1
        if _BOUNDARIES in self._ever:
            if streak.steps == BOUNDARY_STEPS:
                warn(f"For {streak.steps} steps in a row {said}\nBefore that there were some, so the run goes on.")
        elif streak.steps == 1:
            warn(f"{said}\nAfter {BOUNDARY_STEPS} steps in a row this is an error. See [process].")
        elif streak.steps >= BOUNDARY_STEPS:
            raise RewardError(
                f"For {streak.steps} steps in a row {said}\nSet `process.segmenter` to what this model's steps end "
                "with, or score outputs (reward.functions)."
            )

    def _missed(self, one: Outcome) -> None:
        streak = self._streaks.setdefault(one.key, _Streak())
        streak.steps, streak.fault = streak.steps + 1, streak.fault or one.fault
        for_others = one.covered and not streak.fault
        limit = self.steps if for_others else min(self.steps, self.total_steps)
        if streak.steps >= limit and not (for_others and one.key in self._ever):
            self.end(RewardError(_sentence(one.who, streak)))

    def state(self) -> State:
        """See `Stateful`."""
        streaks = {key: asdict(one) for key, one in self._streaks.items()}
        return State(values={"streaks": streaks, "ever": sorted(self._ever)})

    def restore(self, state: State) -> None:
        """See `Stateful`."""
        self._streaks = {key: _Streak(**one) for key, one in state.values["streaks"].items()}
        self._ever = set(state.values["ever"])


def _sentence(who: str, streak: _Streak) -> str:
    steps = f"{streak.steps} steps in a row" if streak.steps > 1 else "the only step"
    if streak.fault:
        return (
            f"{who} failed on every output of {steps}, so that nothing is learned from it. "
            f"The first failure was\n{streak.fault}"
        )
    return (
        f"{who} gave no value (None) for any output of {steps}, so that nothing is learned from it. Look at the "
        "outputs in rollouts.jsonl, and at what it compares them with; reward.patience sets how many such steps a run "
        "may have."
    )
