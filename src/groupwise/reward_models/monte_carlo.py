"""Labels of steps by Monte Carlo (Math-Shepherd, arXiv:2312.08935): how often a completer that goes on from the end of
a step still reaches the right answer.

No model of rewards is asked: what is right is said by the reward of whole outputs, a verifier. Continuations of one
prompt are one tree for the engine (see `Tree`), so nothing that they share is computed or held twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from groupwise.data.messages import template_columns
from groupwise.engines.mailbox import Sampler, generate
from groupwise.rewards.base import RewardContext
from groupwise.rewards.steps import Cuts, Segmenter
from groupwise.rewards.stepwise import StepValues
from groupwise.seeds import stable_hash
from groupwise.tokenizer.codec import Codec
from groupwise.types import Branch, Completion, Finish, Group, Request, Sampling, Score, Scored, ScoredGroup, Tree

TREE_TOKENS = 16384
"""A tree is computed in one pass: what has more tokens is two trees, each with the prompt."""

Verifier = Callable[[Sequence[Group]], Scored]
"""Scores whole outputs."""


@dataclass(frozen=True)
class Completer:
    """How continuations are drawn: `n` from the end of each step, each as long as `sampling` allows and the `context`
    (tokens of a row, None: no bound) leaves room for. Seeds are a function of `seed`, output and step."""

    n: int
    sampling: Sampling
    seed: int = 0
    context: int | None = None


class Tries(NamedTuple):
    """What came of a step: of `tried` continuations that were scored, `right` were right."""

    right: int
    tried: int


class Labelled(NamedTuple):
    """An output, the texts of its steps, a label for each, and what the labels come from.

    A label is in [0, 1], or None where nothing could be tried.
    """

    group: Group
    output: int
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    tries: tuple[Tries, ...]
    reward: float | None

    def row(self, soft: bool) -> dict[str, Any]:
        """As TRL's stepwise format has it, and where it comes from; hard labels are booleans there."""
        labels = [label if soft or label is None else bool(label) for label in self.labels]
        key = self.group.key
        return {
            "prompt": self.group.prompt.content, "completions": list(self.steps), "labels": labels,
            "right": [tries.right for tries in self.tries], "tried": [tries.tried for tries in self.tries],
            "reward": self.reward,
            "prompt_id": key.prompt_id, "step": key.step, "slot": key.slot, "output": self.output,
            **template_columns(self.group.prompt),
        }  # fmt: skip


class _Place(NamedTuple):
    """A step's end to go on from: number `step` of output `output` of group `group`, after `end` tokens."""

    group: int
    output: int
    step: int
    end: int


class MonteCarlo:
    """Labels the steps of outputs, and is a `StepReward`: a step's label is its reward.

    A hard label is 1 where any continuation of the step is right, a soft one (`soft`) the share that is. Right is what
    `verifier` gives at least `threshold`. The last step of a finished output needs no continuation: its label is
    whether the output is right. `continuations` and `tokens` count what was drawn.
    """

    name = "monte_carlo"

    def __init__(
        self, sampler: Sampler, verifier: Verifier, codec: Codec, segmenter: Segmenter, completer: Completer,
        *, soft: bool = False, threshold: float = 1.0,
    ) -> None:  # fmt: skip
        self.sampler, self.verifier, self.codec, self.segmenter = sampler, verifier, codec, segmenter
        self.completer, self.soft, self.threshold = completer, soft, threshold
        self.continuations, self.tokens = 0, 0

    def label(self, scored: Scored, context: RewardContext | None = None) -> list[Labelled]:
        """Every output with its steps and their labels, in order; none for an output that could not be cut.

        Raises RewardError where the verifier's or the segmenter's values cannot be used.
        """
        groups = [one.group for one in scored]
        cuts = self.segmenter(groups, context or RewardContext(0, 1))
        tries = self._tries(scored, cuts)
        return [
            Labelled(group, i, cut.texts, tuple(map(self._label, found)), tuple(found), one.scores[i].reward)
            for one, of_group, of_tries in zip(scored, cuts, tries, strict=True)
            for group in [one.group]
            for i, (cut, found) in enumerate(zip(of_group, of_tries, strict=True))
            if cut.ends and not cut.failed
        ]

    def __call__(self, groups: Sequence[Group], cuts: Cuts, context: RewardContext) -> StepValues:
        """See `StepReward`."""
        tries = self._tries(self.verifier(groups), cuts)
        return [[[self._label(one) for one in of_output] for of_output in of_group] for of_group in tries]

    def close(self) -> None:
        """Nothing is held: sampler and verifier belong to whoever made them."""

    def _label(self, tries: Tries) -> float | None:
        if not tries.tried:
            return None
        return tries.right / tries.tried if self.soft else float(tries.right > 0)

    def _tries(self, scored: Scored, cuts: Cuts) -> list[list[list[Tries]]]:
        """Per group, output and step."""
        tries = [[[Tries(0, 0)] * len(cut.ends) for cut in of_group] for of_group in cuts]
        places: list[_Place] = []
        for g, (one, of_group) in enumerate(zip(scored, cuts, strict=True)):
            for i, (cut, score) in enumerate(zip(of_group, one.scores, strict=True)):
                finished = one.group.completions[i].finish == "stop"
                if finished and cut.ends:
                    tries[g][i][-1] = self._count([score])
                ends = list(enumerate(cut.ends))[: -1 if finished else None]
                places += [_Place(g, i, j, end) for j, end in ends if not cut.failed and self._room(one.group, end) > 0]
        for place, found in zip(places, self._tried([one.group for one in scored], places), strict=True):
            tries[place.group][place.output][place.step] = self._count(found.scores)
        return tries

    def _count(self, scores: Sequence[Score]) -> Tries:
        rewards = [score.reward for score in scores if score.reward is not None]
        return Tries(sum(reward >= self.threshold for reward in rewards), len(rewards))

    def _room(self, group: Group, end: int) -> int:
        """Tokens that a continuation may have."""
        longest, context = self.completer.sampling.max_tokens, self.completer.context
        return longest if context is None else min(longest, context - len(group.prompt.token_ids) - end)

    def _tried(self, groups: Sequence[Group], places: Sequence[_Place]) -> Sequence[ScoredGroup]:
        """Per place, its continuations as whole outputs, scored."""
        if not places:
            return []
        requests = [self._request(groups[place.group], place, branch) for place, branch in _branches(groups, places)]
        drawn = generate(self.sampler, requests)
        self.continuations += sum(map(len, drawn))
        self.tokens += sum(len(completion.token_ids) for found in drawn for completion in found)
        whole = [
            replace(groups[place.group], completions=tuple(self._joined(groups[place.group], place, c) for c in found))
            for place, found in zip(places, drawn, strict=True)
        ]
        return self.verifier(whole)

    def _request(self, group: Group, place: _Place, branch: Branch) -> Request:
        key, completer = group.key, self.completer
        sampling = replace(completer.sampling, max_tokens=self._room(group, place.end))
        seed = stable_hash(completer.seed, self.name, key.step, key.slot, place.output, place.step) >> 1
        uid = f"{self.name}/{key.step}/{key.slot}/{place.output}/{place.step}"
        return Request(uid, branch.token_ids, completer.n, sampling, seed, branch)

    def _joined(self, group: Group, place: _Place, tail: Completion) -> Completion:
        """The output up to the place and the continuation, as one output."""
        head = group.completions[place.output]
        token_ids = (*head.token_ids[: place.end], *tail.token_ids)
        logprobs = (*head.sampled_logprobs[: place.end], *tail.sampled_logprobs)
        return Completion(token_ids, self.codec.decode(token_ids), logprobs, tail.finish)


def _branches(groups: Sequence[Group], places: Sequence[_Place]) -> Iterator[tuple[_Place, Branch]]:
    """Each place, in order, as a branch of a tree: a group's outputs as far as their last place, in as few trees as
    hold them."""
    longest: dict[tuple[int, int], int] = {}
    for place in places:
        longest[place.group, place.output] = max(place.end, longest.get((place.group, place.output), 0))
    tree_of: dict[tuple[int, int], tuple[Tree, int]] = {}
    for g, group in enumerate(groups):
        ends = [(i, longest[g, i]) for i in range(len(group.completions)) if (g, i) in longest]
        for number, part in enumerate(_parts(ends, TREE_TOKENS - len(group.prompt.token_ids))):
            outputs = tuple(group.completions[i].token_ids[:end] for i, end in part)
            tree = Tree(f"{group.key.step}/{group.key.slot}/{number}", group.prompt.token_ids, outputs)
            tree_of |= {(g, i): (tree, at) for at, (i, _) in enumerate(part)}
    for place in places:
        tree, at = tree_of[place.group, place.output]
        yield place, Branch(tree, at, place.end)


def _parts(ends: Sequence[tuple[int, int]], room: int) -> Iterator[list[tuple[int, int]]]:
    """Outputs whose tokens fit into `room` together, at least one at a time."""
    part: list[tuple[int, int]] = []
    for one in ends:
        if part and sum(end for _, end in part) + one[1] > room:
            yield part
            part = []
        part.append(one)
    if part:
        yield part


def read_by(codec: Codec, text: str, finish: Finish) -> Completion:
    """An output whose text is known, as a model reads it: its log-probs are not known, and 0 here."""
    token_ids = codec.encode_text(text)
    if finish == "stop":
        # It was sampled, if only as a token without text: the last step has it.
        token_ids = (*token_ids, *sorted(codec.end_token_ids)[:1])
    return Completion(token_ids, text, (0.0,) * len(token_ids), finish)
