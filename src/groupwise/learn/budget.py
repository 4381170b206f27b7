"""The device's memory in training: how many tokens a pass may hold, and what happens where that was too many."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from groupwise.errors import ModelError

Result = TypeVar("Result")


class TokenBudget:
    """Tokens that a pass may hold: `budget`, which is halved where memory runs out all the same (`halved` times).

    `advice` ends the error of where half is not enough either.
    """

    def __init__(self, budget: int, device: torch.device, advice: str) -> None:
        self.budget, self.halved = budget, 0
        self.device, self.advice = device, advice

    def run(self, work: Callable[[], Result], drop: Callable[[], None] = lambda: None) -> Result:
        """What `work` gives; where memory runs out, once more with half the budget, which stays so.

        `drop` takes back what was done until then. Raises ModelError where half is not enough.
        """
        done = _tried(work)
        if done is None:
            asked, self.budget, self.halved = self.budget, max(1, self.budget // 2), self.halved + 1
            drop()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            done = _tried(work)
        if done is None:
            raise ModelError(
                f"The device's memory is not enough for micro-batches of {asked:,} tokens, nor of {self.budget:,}. "
                f"{self.advice}"
            )
        return done[0]

    def state(self) -> dict[str, int]:
        """What a checkpoint holds of it."""
        return {"budget": self.budget, "halved": self.halved}

    def load(self, counters: Mapping[str, Any]) -> None:
        """Take up where `state` left off: smaller passes add up in another order, so the same bits need the same
        budget."""
        if counters["halved"]:
            self.budget, self.halved = min(self.budget, counters["budget"]), counters["halved"]


def _tried(work: Callable[[], Result]) -> tuple[Result] | None:
    """What `work` gives; None where the device's memory ran out."""
    try:
        return (work(),)
    except RuntimeError as error:
        # Named boundary: the allocator's refusal, nothing else. What the error's frames hold is freed on return.
        if not is_out_of_memory(error):
            raise
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is an allocator's refusal, of a GPU or of main memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: on the CUDA device, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
