"""The outputs of an iteration that its reward-model round will be trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from groupwise.errors import DataError
from groupwise.seeds import stable_hash
from groupwise.types import Completion, Group, GroupKey, Prompt, Score, Scored, ScoredGroup


class RoundSamples:
    """At most `capacity` groups of those that were added, each equally likely, decided by `seed`.

    Scores are the verifier's. Of equal outputs of a group one is kept; log-probs are not, as nothing asks for them.
    """

    def __init__(self, capacity: int, seed: int, prompts: Mapping[str, Prompt]) -> None:
        self.capacity, self.seed, self.prompts = capacity, seed, prompts
        self._groups: list[ScoredGroup] = []

    @property
    def scored(self) -> Scored:
        """The groups, in the order of their steps."""
        return self._groups

    def add(self, verified: Scored) -> None:
        """Take in a step's groups."""
        chosen = sorted([*self._groups, *map(distinct, verified)], key=self._rank)[: self.capacity]
        self._groups = sorted(chosen, key=lambda one: one.group.key)

    def clear(self) -> None:
        """Begin anew."""
        self._groups = []

    def _rank(self, one: ScoredGroup) -> int:
        return stable_hash(self.seed, "collected", one.group.key.step, one.group.key.slot)

    def lines(self) -> list[str]:
        """The groups as lines of JSON; prompts by their names."""
        return [json.dumps(_to_json(one)) for one in self._groups]

    def load(self, lines: Iterable[str]) -> None:
        """Become what `lines` gave. Raises DataError where a prompt is not there any more."""
        self._groups = [self._from_json(json.loads(line)) for line in lines]

    def _from_json(self, found: Sequence[Any]) -> ScoredGroup:
        key, outputs = GroupKey(*found[0]), found[1]
        if key.prompt_id not in self.prompts:
            raise DataError(f"The checkpoint has outputs of prompt {key.prompt_id}, which the data set lacks.")
        completions = tuple(Completion(tuple(ids), text, (0.0,) * len(ids), end) for ids, text, end, _ in outputs)
        group = Group(key, self.prompts[key.prompt_id], completions)
        return ScoredGroup(group, tuple(Score(reward) for *_, reward in outputs))


def _to_json(one: ScoredGroup) -> list[Any]:
    outputs = zip(one.group.completions, one.rewards, strict=True)
    return [one.group.key, [[c.token_ids, c.text, c.finish, reward] for c, reward in outputs]]


def distinct(one: ScoredGroup) -> ScoredGroup:
    """A verified group as a round is made of it: of equal outputs the first that was scored, without log-probs.

    Many outputs of a group are the same text, as often as that text is likely: a reward model that is to tell outputs
    apart learns no more from the third copy than from the first, and labels and updates would be paid for it.
    """
    outputs, rewards = one.group.completions, one.rewards
    best_last = sorted(range(len(outputs)), key=lambda i: (rewards[i] is None, i), reverse=True)
    kept = sorted({outputs[i].token_ids: i for i in best_last}.values())
    bare = [replace(outputs[i], sampled_logprobs=(0.0,) * len(outputs[i].token_ids), policy_versions=()) for i in kept]
    return ScoredGroup(replace(one.group, completions=tuple(bare)), tuple(Score(rewards[i]) for i in kept))
