"""What every engine does: take requests, give completions back as they finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol

from groupwise.types import Request, Sampled

InFlight = Literal["finish", "continue"]
"""What becomes of requests in flight when weights are replaced."""


class Engine(Protocol):
    """Continues prompts. A request that was submitted yields exactly `n` completions, unless it is cancelled.

    Draws depend on `(seed + output index, token index)` and the distribution only, never on what else is running.
    """

    def submit(self, request: Request) -> None:
        """Queue a prompt to be continued `request.n` times. Its `uid` must not be in flight already."""

    def poll(self, timeout: float | None = None) -> list[Sampled]:
        """What has finished since the last call, in no promised order, once there is any.

        Empty where nothing is in flight, or where `timeout` seconds pass first (None: no limit). An engine that works
        in the caller's thread works meanwhile, for one step at least, and only then.
        """

    def cancel(self, uid: str) -> None:
        """Drop what remains of a request; unknown uids are ignored."""

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, *, in_flight: InFlight = "finish") -> None:
        """Sample from these named tensors from now on; completions carry `version`.

        Of what is in flight, "finish" gives completions of one version each: they go on with the weights that they
        began with or, where an engine has these no more, begin again. "continue" goes on with the new ones, and
        `Completion.policy_versions` says from which token on.
        """

    def close(self) -> None:
        """Give back what the engine holds, and forget what is in flight. Calling it twice is fine."""


def finished(engine: Engine) -> Iterator[Sampled]:
    """What finishes, one by one, until nothing is in flight."""
    while some := engine.poll():
        yield from some
