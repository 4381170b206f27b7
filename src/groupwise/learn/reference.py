"""The reference policy: what the KL penalty keeps the policy near, refreshed at the start of each outer iteration."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise

import torch
from torch import Tensor

from groupwise.averages import mean
from groupwise.learn.pack import Batch
from groupwise.models.policy import Policy
from groupwise.objective import k1_per_output, less_kl
from groupwise.types import Score, Scored


class Reference:
    """A frozen copy of the policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = copy.deepcopy(policy).requires_grad_(False)
        self.iteration = -1

    @torch.no_grad()
    def refresh(self, policy: Policy, iteration: int) -> None:
        """Become the policy as it is now, once per iteration."""
        if iteration == self.iteration:
            return
        self.iteration = iteration
        new = policy.model.state_dict()
        for name, tensor in self.policy.model.state_dict().items():
            tensor.copy_(new[name])

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

    @property
    def policy(self) -> Policy:
        """Never asked for: the objective has no KL term."""
        raise AssertionError("log-probs of a reference were asked for, but the job has none")

    def refresh(self, policy: Policy, iteration: int) -> None:
        """Nothing to copy to."""

    def state_dict(self) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], iteration: int) -> None:
        """No state."""


def subtract_kl(
    scored: Scored, batch: Batch, logprobs_T: Tensor, ref_logprobs_T: Tensor, beta: float, metrics: dict[str, float]
) -> Scored:
    """The KL penalty inside the reward, before credit: `r_i - beta * sum_t (logprobs - ref)` over the output's tokens,
    and the same of each step over the step's tokens.

    The same groups with other rewards; each function's own value stays as it was.
    """
    pieces = [p for group in scored for p in map(_pieces, group.scores, group.lengths)]
    sizes = torch.tensor([size for of_output in pieces for size in of_output], dtype=torch.long)
    piece_T = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(batch.completion_T.device)
    both = logprobs_T, ref_logprobs_T
    by_output = iter(k1_per_output(*both, batch.completion_T, outputs=len(batch.outputs)).tolist())
    by_piece = iter(k1_per_output(*both, piece_T, outputs=len(sizes)).tolist())
    kl = iter([(next(by_output), list(islice(by_piece, len(of_output)))) for of_output in pieces])
    charged, taken = [], []
    for group in scored:
        scores = tuple(_less_kl(score, *next(kl), beta) for score in group.scores)
        charged.append(replace(group, scores=scores))
        pairs = zip(group.rewards, charged[-1].rewards, strict=True)
        taken += [before - after for before, after in pairs if before is not None and after is not None]
    metrics["reward/kl_penalty"] = mean(taken) if taken else 0.0
    return charged


def _less_kl(score: Score, kl: float, of_pieces: Sequence[float], beta: float) -> Score:
    """`of_pieces` begins with the penalty of each step."""
    [reward] = less_kl([score.reward], [kl], beta)
    rewards = less_kl([step.reward for step in score.steps], of_pieces[: len(score.steps)], beta)
    steps = tuple(step._replace(reward=own) for step, own in zip(score.steps, rewards, strict=True))
    return replace(score, reward=reward, steps=steps)


def _pieces(score: Score, length: int) -> list[int]:
    """How many tokens each step of an output has; last, if any, those after the last step."""
    ends = [0, *(step.end for step in score.steps), length]
    return [end - start for start, end in pairwise(ends)]
