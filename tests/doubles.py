"""Parts of a run that do as they are told, and write down what they were asked to do."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from groupwise.engines.base import InFlight
from groupwise.learn.pack import Credit
from groupwise.rewards.base import RewardContext, Values
from groupwise.state import State
from groupwise.store.checkpoint import Checkpoint
from groupwise.types import Completion, Finish, Group, GroupKey, Prompt, Request, Sampled, Score, Scored, ScoredGroup

Log = list[tuple[Any, ...]]


class ScriptedEngine:
    """Writes a number that its seed decides, and gives outputs back in the wrong order."""

    def __init__(self, log: Log | None = None) -> None:
        self.log: Log = [] if log is None else log
        self.requests: list[Request] = []
        self.version = 0
        self._waiting: list[Request] = []

    def submit(self, request: Request) -> None:
        self.log.append(("sample", request.uid, f"version {self.version}"))
        self.requests.append(request)
        self._waiting.append(request)

    def poll(self, timeout: float | None = None) -> list[Sampled]:
        found = [
            Sampled(request.uid, index, completion(str(random.Random(request.seed + index).randrange(10**6))))
            for request in reversed(self._waiting)
            for index in reversed(range(request.n))
        ]
        self._waiting.clear()
        return found

    def cancel(self, uid: str) -> None:
        raise AssertionError("nothing is cancelled in this test")

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, *, in_flight: InFlight = "finish") -> None:
        self.log.append(("load", f"version {version}"))
        self.version = version

    def close(self) -> None:
        pass


class ScriptedReward:
    """Scores an output by a function of its text."""

    def __init__(self, value: Callable[[str], float | None], name: str = "scripted", log: Log | None = None) -> None:
        self.value, self.name = value, name
        self.log: Log = [] if log is None else log
        self.metrics: dict[str, float] = {}

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Values:
        self.log.append(("score", [group.key for group in groups]))
        context.metrics |= self.metrics
        return [[self.value(output.text) for output in group.completions] for group in groups]

    def close(self) -> None:
        pass


class ScriptedLearner:
    """Counts updates; a batch is whatever it was prepared from, and the reference the version that it was copied at.

    `prepared` holds what batches were made from.
    """

    def __init__(self, log: Log | None = None) -> None:
        self.log: Log = [] if log is None else log
        self.version, self.updates, self.reference = 0, 0, -1
        self.prepared: list[tuple[Scored, Credit]] = []

    def refresh(self, iteration: int) -> None:
        self.reference = self.version
        self.log.append(("reference", iteration, f"version {self.version}"))

    def subtract_kl(self, scored: Scored, metrics: dict[str, float]) -> Scored:
        self.log.append(("subtract kl",))
        return scored

    def prepare(self, scored: Scored, credit: Credit) -> dict[str, Any]:
        self.log.append(("prepare", f"version {self.version}"))
        self.prepared.append((scored, credit))
        return {"credit": credit, "old": self.version, "reference": self.reference}

    def update(self, batch: dict[str, Any], passes_done: int = 0) -> dict[str, float]:
        self.version += 1
        self.updates += 1
        self.log.append(("update", passes_done, f"old {batch['old']}", f"reference {batch['reference']}"))
        return {"loss": float(passes_done)}

    def check(self) -> None:
        """Every update was applied."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def master_weights(self) -> dict[str, Tensor]:
        return {"w": torch.full((2,), float(self.version))}

    def state(self) -> State:
        return State({"model": self.master_weights()}, {"version": self.version, "updates": self.updates})

    def restore(self, state: State) -> None:
        self.version, self.updates = state.values["version"], state.values["updates"]


class MemorySink:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def write(self, event: Mapping[str, Any]) -> None:
        self.events.append(dict(event))

    def close(self) -> None:
        pass


def completion(text: str, finish: Finish = "stop") -> Completion:
    """An output of one token per character."""
    return Completion(tuple(map(ord, text)), text, tuple([-1.0] * len(text)), finish)


def prompts(*contents: str) -> list[Prompt]:
    """Prompts of three tokens."""
    return [Prompt(str(index), content, (2, 3, 4)) for index, content in enumerate(contents)]


def scored(*rewards: Sequence[float | None], texts: Sequence[str] = ("ab",)) -> list[ScoredGroup]:
    """Groups with these rewards; output `i` has the text `texts[i % len(texts)]`."""
    groups = []
    for slot, values in enumerate(rewards):
        outputs = tuple(completion(texts[i % len(texts)]) for i in range(len(values)))
        group = Group(GroupKey(1, slot, str(slot)), Prompt(str(slot), "?", (2,)), outputs)
        groups.append(ScoredGroup(group, tuple(Score(value) for value in values)))
    return groups


def through_a_file(state: State) -> State:
    """The state as a checkpoint gives it back."""
    return State(state.tensors, json.loads(json.dumps(dict(state.values))), dict(state.lines))


def a_checkpoint(state: Mapping[str, Any], step: int = 12) -> Checkpoint:
    """A checkpoint's state, with no files behind it."""
    from pathlib import Path

    return Checkpoint(Path("nowhere"), step, dict(state), {})
