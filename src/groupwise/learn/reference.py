"""The reference policy: what the KL penalty keeps the policy near, refreshed at the start of each outer iteration."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor

from groupwise.learn.forward import score_outputs
from groupwise.learn.pack import Batch
from groupwise.models.policy import Policy
from groupwise.objective import k1_per_output, less_kl
from groupwise.types import Scored


class _Learner(Protocol):
    policy: Policy

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
    """The KL penalty inside the reward: `r_i - beta * sum_t (old - ref)`, before credit (RLOO's place for it)."""

    def __init__(self, learner: _Learner, reference: Reference, beta: float, budget: int) -> None:
        self.learner, self.reference, self.beta, self.budget = learner, reference, beta, budget

    def charge(self, scored: Scored, metrics: dict[str, float]) -> Scored:
        """The same groups with other rewards; each function's own value stays as it was.

        An output that is kept out of the loss pays too: its reward is in the group's mean all the same.
        """
        nothing = [[0.0] * len(group.scores) for group in scored]
        batch = self.learner.pack(scored, nothing)
        k1_S = k1_per_output(
            self.learner.logprobs(batch), self.reference.logprobs(batch, self.budget), batch.completion_T,
            outputs=len(batch.outputs),
        )  # fmt: skip
        k1 = iter(k1_S.tolist())
        charged, taken = [], []
        for group in scored:
            rewards = less_kl(group.rewards, [next(k1) for _ in group.scores], self.beta)
            scores = [replace(score, reward=reward) for score, reward in zip(group.scores, rewards, strict=True)]
            charged.append(replace(group, scores=tuple(scores)))
            pairs = zip(group.rewards, rewards, strict=True)
            taken += [before - after for before, after in pairs if before is not None and after is not None]
        metrics["reward/kl_penalty"] = fmean(taken) if taken else 0.0
        return charged


class NoPenalty:
    """Stands where the reward carries no KL penalty."""

    def charge(self, scored: Scored, metrics: dict[str, float]) -> Scored:
        """The groups as they are."""
        return scored
