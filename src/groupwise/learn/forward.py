"""One forward pass over some of a batch's outputs, and log-probs of all of them under any policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from groupwise.learn.lanes import at_once, deal, most_lanes
from groupwise.learn.pack import Batch, Output, micro_batches
from groupwise.models.layout import Stream
from groupwise.models.policy import Policy


def lay_out(policy: Policy, outputs: Sequence[Output], members: Sequence[int]) -> tuple[Stream, Tensor]:
    """The stream of some outputs, and where its output tokens lie in the batch's flat arrays (`[T']`)."""
    by_group: dict[int, list[int]] = {}
    for member in members:
        by_group.setdefault(outputs[member].group, []).append(member)
    groups = [(outputs[g[0]].prompt, [outputs[m].token_ids for m in g]) for g in by_group.values()]
    places = [
        torch.arange(outputs[m].start, outputs[m].start + len(outputs[m].token_ids))
        for group in by_group.values()
        for m in group
    ]
    return policy.stream(groups), torch.cat(places).to(policy.device)


@torch.no_grad()
def score_outputs(policy: Policy, batch: Batch, budget: int, members: Sequence[int] | None = None) -> Tensor:
    """Log-probs `[T]` of a batch's output tokens under `policy`, at the batch's temperature, without gradient.

    Outputs that are not among `members` (all by default) get 0.
    """
    chosen = range(len(batch.outputs)) if members is None else members
    logprobs_T = torch.zeros_like(batch.sampled_logprobs_T)
    lanes = deal(batch.outputs, chosen, most_lanes(policy.size, policy.device))

    def score(lane: Sequence[int]) -> None:
        for part in micro_batches(batch.outputs, lane, budget // len(lanes), policy.layout == "shared"):
            stream, place = lay_out(policy, batch.outputs, part)
            logprobs_T[place] = policy(stream, batch.temperature).logprobs_T.to(logprobs_T)

    at_once([partial(score, lane) for lane in lanes])
    return logprobs_T
