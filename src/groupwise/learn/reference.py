"""The reference policy: what the KL penalty keeps the policy near, refreshed at the start of each outer iteration."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import Protocol

import torch
from torch import Tensor

from groupwise.averages import mean
from groupwise.learn.budget import TokenBudget
from groupwise.learn.forward import score_outputs
from groupwise.learn.pack import Batch
from groupwise.models.policy import Policy
from groupwise.objective import k1_per_output, less_kl
from groupwise.types import Score, Scored


class _Learner(Protocol):
    policy: Policy
    room: TokenBudget

    def pack(self, scored: Scored, credit: Sequence[Sequence[float]]) -> Batch: ...
    def logprobs(self, batch: Batch, members: Sequence[int] | None = None) -> Tensor: ...


class Reference:
    """A frozen copy of the policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = copy.deepcopy(policy).requires_grad_(False)
        self.iteration = -1

    @torch.no_grad()
    def refresh(self, learner: _Learner, iteration: int) -> None:
        """Become the learner's current policy (Algorithm 1, line 3), once per iteration: not again after a resume."""
        if iteration == self.iteration:
            return
        self.iteration = iteration
        new = learner.policy.model.state_dict()
        for name, tensor in self.policy.model.state_dict().items():
            tensor.copy_(new[name])

    def logprobs(self, batch: Batch, budget: int, members: Sequence[int] | None = None) -> Tensor:
        """Log-probs `[T]` of a batch's output tokens under the reference, at the batch's temperature.

        Outputs that are not among `members` (all by default) get 0.
        """
        return score_outputs(self.policy, batch, budget, members)

    def state_dict(self) -> dict[str, Tensor]:
        """The reference's weights."""
        return dict(self.policy.model.state_dict())

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], iteration: int) -> None:
        """Take up the weights that `state_dict` gave, of this iteration."""
        self.iteration = iteration
        for name, tensor in self.policy.model.state_dict().items():
            tensor.copy_(tensors[name])


class NoReference:
    """Stands where no KL penalty is asked for: holds nothing, computes nothing."""

    iteration = -1

    def refresh(self, learner: _Learner, iteration: int) -> None:
        """Nothing to copy to."""

    def logprobs(self, batch: Batch, budget: int, members: Sequence[int] | None = None) -> Tensor:
        """Never asked for: the objective has no KL term."""
        raise AssertionError("log-probs of a reference were asked for, but the job has none")

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], iteration: int) -> None:
        """No state."""


class RewardPenalty:
    """The KL penalty inside the reward, before credit: `r_i - beta * sum_t (old - ref)` over the output's tokens, and
    the same of each step over the step's tokens."""

    def __init__(self, learner: _Learner, reference: Reference, beta: float) -> None:
        self.learner, self.reference, self.beta = learner, reference, beta

    def charge(self, scored: Scored, metrics: dict[str, float]) -> Scored:
        """The same groups with other rewards; each function's own value stays as it was.

        An output that is kept out of the loss pays too: its reward is in the group's mean all the same. Raises
        ModelError where memory is not enough.
        """
        batch, room = self.learner.pack(scored, [[0.0] * len(group.scores) for group in scored]), self.learner.room
        now_T = room.run(lambda: self.learner.logprobs(batch))
        both = now_T, room.run(lambda: self.reference.logprobs(batch, room.budget))
        pieces = [p for group in scored for p in map(_pieces, group.scores, group.lengths)]
        sizes = torch.tensor([size for of_output in pieces for size in of_output], dtype=torch.long)
        piece_T = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(batch.completion_T.device)
        by_output = iter(k1_per_output(*both, batch.completion_T, outputs=len(batch.outputs)).tolist())
        by_piece = iter(k1_per_output(*both, piece_T, outputs=len(sizes)).tolist())
        kl = iter([(next(by_output), list(islice(by_piece, len(of_output)))) for of_output in pieces])
        charged, taken = [], []
        for group in scored:
            scores = tuple(self._charged(score, *next(kl)) for score in group.scores)
            charged.append(replace(group, scores=scores))
            pairs = zip(group.rewards, charged[-1].rewards, strict=True)
            taken += [before - after for before, after in pairs if before is not None and after is not None]
        metrics["reward/kl_penalty"] = mean(taken) if taken else 0.0
        return charged

    def _charged(self, score: Score, kl: float, of_pieces: Sequence[float]) -> Score:
        """`of_pieces` begins with the penalty of each step."""
        [reward] = less_kl([score.reward], [kl], self.beta)
        rewards = less_kl([step.reward for step in score.steps], of_pieces[: len(score.steps)], self.beta)
        steps = tuple(step._replace(reward=own) for step, own in zip(score.steps, rewards, strict=True))
        return replace(score, reward=reward, steps=steps)


def _pieces(score: Score, length: int) -> list[int]:
    """How many tokens each step of an output has; last, if any, those after the last step."""
    ends = [0, *(step.end for step in score.steps), length]
    return [end - start for start, end in pairwise(ends)]


class NoPenalty:
    """Stands where the reward carries no KL penalty."""

    def charge(self, scored: Scored, metrics: dict[str, float]) -> Scored:
        """The groups as they are."""
        return scored
