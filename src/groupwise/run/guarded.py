"""Outputs that are looked at: a few of what is sampled are scored again by the policy itself.

Training outputs need none of this, since an update computes their log-probs anyway. Here is the guard for all else that
is sampled: evaluations, the first set of a reward model, continuations that label steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groupwise.engines.mailbox import Answers, Sampler, Ticket
from groupwise.engines.native.draw import Filters, cut
from groupwise.learn.agreement import Difference, Guard
from groupwise.models.policy import Policy
from groupwise.types import Completion, Request

OUTPUTS, TOKENS = 4, 64
"""How many outputs of an answer are scored again, and how many of the last tokens of each."""


class GuardedSampler:
    """A `Sampler` that has the guard judge a few outputs of each answer: the shortest row, the longest and some
    between. `where` names in the guard's sentence what is sampled."""

    def __init__(self, sampler: Sampler, guard: Guard, where: str) -> None:
        self.sampler, self.guard, self.where = sampler, guard, where
        self._asked: dict[Ticket, Sequence[Request]] = {}

    def ask(self, requests: Sequence[Request]) -> Ticket:
        """See `Sampler`."""
        ticket = self.sampler.ask(requests)
        self._asked[ticket] = requests
        return ticket

    def take(self, ticket: Ticket, timeout: float | None = None) -> Answers | None:
        """See `Sampler`. Raises ModelError where the policy scores the outputs otherwise."""
        answers = self.sampler.take(ticket, timeout)
        if answers is None:
            return None
        chosen = _chosen(self._asked.pop(ticket), answers)
        if chosen:
            policy = self.guard.policy
            apart_T = torch.cat([_apart(policy, *one) for one in chosen])
            self.guard.check(Difference.of(apart_T, policy.dtype), self.where)
        return answers


def _chosen(requests: Sequence[Request], answers: Answers) -> list[tuple[Request, Completion]]:
    """Evenly spread over the lengths of rows."""
    rows = [
        (len(request.token_ids) + len(output.token_ids), place, index, request, output)
        for place, (request, outputs) in enumerate(zip(requests, answers, strict=True))
        for index, output in enumerate(outputs)
        if output.token_ids
    ]
    rows.sort(key=lambda row: row[:3])
    last = len(rows) - 1
    return [rows[i][3:] for i in sorted({last * i // max(1, OUTPUTS - 1) for i in range(OUTPUTS)})] if rows else []


@torch.no_grad()
def _apart(policy: Policy, request: Request, completion: Completion) -> Tensor:
    """How far the policy's log-probs of an output's last tokens are from the sampled ones, `[T]`."""
    first = max(0, len(completion.token_ids) - TOKENS)
    tokens = completion.token_ids[first:]
    logits_TV = policy.token_logits(policy.stream([((*request.token_ids, *completion.token_ids[:first]), [tokens])]))
    filters = Filters.of([request.sampling] * len(tokens), logits_TV.device)
    scaled_TV = logits_TV / (request.sampling.temperature or 1.0)
    token_T = torch.tensor(tokens, device=logits_TV.device)
    kept_TV = cut(scaled_TV, filters) if filters.cut else scaled_TV
    # A token at the edge of what is kept may be cut by rounding: its own logit is compared, kept or not.
    own_T = scaled_TV.gather(-1, token_T[:, None])[:, 0]
    sampled_T = torch.tensor(completion.sampled_logprobs[first:], dtype=own_T.dtype, device=own_T.device)
    return (own_T - kept_TV.logsumexp(-1) - sampled_T).abs()
