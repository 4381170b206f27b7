"""What every engine does: take requests, give completions back as they finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from groupwise.types import Completion, Request, Sampled


class Engine(Protocol):
    """Continues prompts. A request that was submitted yields exactly `n` completions, unless it is cancelled.

    Draws depend on `(seed + output index, token index)` and the distribution only, never on what else is running.
    """

    def submit(self, request: Request) -> None:
        """Queue a prompt to be continued `request.n` times. Its `uid` must not be in flight already."""

    def completed(self) -> Iterator[Sampled]:
        """Yield completions as they finish, in no promised order, until nothing is in flight.

        A consumer may stop and call this again later: what it has not seen is still to come.
        """

    def cancel(self, uid: str) -> None:
        """Drop what remains of a request; unknown uids are ignored."""

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Sample from these named tensors from now on; completions carry `version`."""

    def close(self) -> None:
        """Give back what the engine holds. Calling it twice is fine."""


def generate(engine: Engine, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
    """Run requests to their end: per request, in order, its `n` completions in order."""
    found: dict[str, list[Completion | None]] = {request.uid: [None] * request.n for request in requests}
    for request in requests:
        engine.submit(request)
    for uid, index, completion in engine.completed():
        found[uid][index] = completion
    missing = [uid for uid, outputs in found.items() if None in outputs]
    assert not missing, f"the engine stopped without finishing {missing}"
    return [tuple(c for c in found[request.uid] if c is not None) for request in requests]
