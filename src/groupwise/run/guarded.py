"""An engine whose outputs are looked at: a few of what it gives back are scored again by the policy itself.

Training outputs need none of this, since an update computes their log-probs anyway. Here is the guard for all else that
is sampled: evaluations, the first set of a reward model, continuations that label steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from groupwise.engines.base import Engine
from groupwise.engines.native.draw import Filters, cut
from groupwise.learn.agreement import Difference, Guard
from groupwise.models.policy import Policy
from groupwise.types import Request, Sampled

OUTPUTS, TOKENS = 4, 64
"""How many outputs of a call are scored again, and how many of the last tokens of each."""


class GuardedEngine:
    """An `Engine` that has the guard judge a few outputs of each call: the shortest row, the longest and some between.

    `where` names in the guard's sentence what is sampled.
    """

    def __init__(self, engine: Engine, guard: Guard, where: str) -> None:
        self.engine, self.guard, self.where = engine, guard, where
        self._requests: dict[str, Request] = {}
        self._seen: list[tuple[Request, Sampled]] = []

    def submit(self, request: Request) -> None:
        """See `Engine`."""
        self.engine.submit(request)
        self._requests[request.uid] = request

    def completed(self) -> Iterator[Sampled]:
        """See `Engine`. Raises ModelError, after the last output, where the policy scores them otherwise."""
        for sampled in self.engine.completed():
            if sampled.uid in self._requests and sampled.completion.token_ids:
                self._seen.append((self._requests[sampled.uid], sampled))
            yield sampled
        chosen, self._seen, self._requests = _chosen(self._seen), [], {}
        if chosen:
            policy = self.guard.policy
            apart_T = torch.cat([_apart(policy, request, sampled) for request, sampled in chosen])
            self.guard.check(Difference.of(apart_T, policy.dtype), self.where)

    def cancel(self, uid: str) -> None:
        """See `Engine`."""
        self._requests.pop(uid, None)
        self.engine.cancel(uid)

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """See `Engine`."""
        self.engine.load_weights(weights, version)

    def close(self) -> None:
        """See `Engine`."""
        self.engine.close()


def _chosen(seen: Sequence[tuple[Request, Sampled]]) -> list[tuple[Request, Sampled]]:
    """Evenly spread over the lengths of rows; the same ones whatever order outputs came in."""

    def order(one: tuple[Request, Sampled]) -> tuple[int, str, int]:
        request, sampled = one
        return len(request.token_ids) + len(sampled.completion.token_ids), sampled.uid, sampled.output

    rows = sorted(seen, key=order)
    last = len(rows) - 1
    return [rows[i] for i in sorted({last * i // max(1, OUTPUTS - 1) for i in range(OUTPUTS)})] if rows else []


@torch.no_grad()
def _apart(policy: Policy, request: Request, sampled: Sampled) -> Tensor:
    """How far the policy's log-probs of an output's last tokens are from the sampled ones, `[T]`."""
    completion = sampled.completion
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
