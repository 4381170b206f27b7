"""Several parts of a batch computed at once on a CPU: a core is quicker with tokens of its own than at helping with
every operation on all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from groupwise.cpu.cores import LARGEST, even_shares, threads, threads_each
from groupwise.learn.optimizer import MasterOptimizer
from groupwise.learn.pack import Output
from groupwise.models.policy import Policy

Result = TypeVar("Result")
MOST = 4
"""Lanes at once: they share one interpreter."""
LEAST_TOKENS = 512
"""Of a lane: with fewer, there is nothing to gain."""


def most_lanes(parameters: int, device: torch.device | str) -> int:
    """How many lanes a model of so many parameters may have on a device."""
    if torch.device(device).type != "cpu" or parameters > LARGEST:
        return 1
    return min(torch.get_num_threads(), MOST)


def deal(outputs: Sequence[Output], members: Sequence[int], most: int) -> list[list[int]]:
    """Outputs (`members` indexes them) by lane, groups whole, lanes of nearly equal size; one lane where that is best.

    Depends on their lengths and `most` only, so the same sums come again.
    """
    groups: dict[int, list[int]] = {}
    for member in members:
        groups.setdefault(outputs[member].group, []).append(member)
    of_group = list(groups.values())
    sizes = [len(outputs[group[0]].prompt) + sum(len(outputs[m].token_ids) for m in group) for group in of_group]
    shares = even_shares(sizes, min(most, sum(sizes) // LEAST_TOKENS))
    return [[m for g in share for m in of_group[g]] for share in shares]


def at_once(work: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each of `work` gives, in order: the first in this thread, the others beside it, each with its share of
    torch's threads. Raises what the first of them raises that fails, when all have ended."""
    if len(work) == 1:
        return [work[0]()]
    each, grad = threads_each(len(work)), torch.is_grad_enabled()

    def beside(one: Callable[[], Result]) -> Result:
        with threads(each), torch.set_grad_enabled(grad):
            return one()

    others = [_pool().submit(beside, one) for one in work[1:]]
    with threads(each):
        try:
            first = work[0]()
        finally:
            wait(others)
    return [first, *(other.result() for other in others)]


class Replicas:
    """The policy once more for each lane after the first: over the same weights and buffers, with gradients of its own.

    `gather` adds these to the masters' in the order of the lanes, so that the same sums come again.
    """

    def __init__(self, policy: Policy, optimizer: MasterOptimizer) -> None:
        self.policy, self.optimizer = policy, optimizer
        self.most = most_lanes(policy.size, policy.device)
        self._twins: list[tuple[Policy, dict[str, Tensor]]] = []

    def policies(self, lanes: int) -> list[Policy]:
        """One for each lane."""
        while len(self._twins) < lanes - 1:
            twin = _twin(self.policy)
            self._twins.append((twin, self.optimizer.gather_apart(twin.model)))
        for twin, _ in self._twins:
            for own, other in zip(self.policy.parameters(), twin.parameters(), strict=True):
                other.data = own.data  # whoever has moved a weight since
        return [self.policy, *(twin for twin, _ in self._twins[: lanes - 1])]

    def gather(self) -> None:
        """Add the lanes' gradients to the masters'."""
        for _, gradients in self._twins:
            self.optimizer.add_gradients(gradients)
        self.drop()

    def drop(self) -> None:
        """Forget the lanes' gradients."""
        for _, gradients in self._twins:
            for gradient in gradients.values():
                gradient.zero_()


def _twin(policy: Policy) -> Policy:
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in policy.parameters()}
    return copy.deepcopy(policy, memo | {id(buffer): buffer for buffer in policy.buffers()})


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST - 1, thread_name_prefix="groupwise-lane")
