"""One engine for several who ask: training, evaluation, labels, each with requests of its own in flight."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NewType, Protocol

from groupwise.engines.base import Engine, InFlight
from groupwise.types import Completion, Request

Ticket = NewType("Ticket", int)
"""What stands for requests that were asked together."""
Answers = list[tuple[Completion, ...]]
"""Per request, in order, its `n` completions in order."""


class Sampler(Protocol):
    """Who samples for somebody: a `Mailbox`, or what looks at its answers."""

    def ask(self, requests: Sequence[Request]) -> Ticket:
        """Begin to sample."""

    def take(self, ticket: Ticket, timeout: float | None = None) -> Answers | None:
        """The answers, once all are there; None where `timeout` seconds pass first (None: no limit)."""


class Mailbox:
    """A `Sampler` over an engine. What finishes while somebody else waits is kept for whom it belongs to."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._count = 0
        self._asked: dict[Ticket, list[Request]] = {}
        self._found: dict[str, list[Completion | None]] = {}

    def ask(self, requests: Sequence[Request]) -> Ticket:
        """See `Sampler`. No uid may be one that is not taken yet, whoever asked for it."""
        self._count += 1
        ticket = Ticket(self._count)
        self._asked[ticket] = list(requests)
        for request in requests:
            assert request.uid not in self._found, f"request {request.uid} is in flight already"
            self._found[request.uid] = [None] * request.n
            self.engine.submit(request)
        return ticket

    def take(self, ticket: Ticket, timeout: float | None = None) -> Answers | None:
        """See `Sampler`. Raises what the engine raises: with what it had in flight, all that was asked for is gone."""
        requests = self._asked[ticket]
        deadline = None if timeout is None else time.monotonic() + timeout
        while missing := [request.uid for request in requests if None in self._found[request.uid]]:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                some = self.engine.poll(left)
            except BaseException:
                self._asked.clear()
                self._found.clear()
                raise
            for uid, index, completion in some:
                self._found[uid][index] = completion
            assert some or left is not None, f"the engine stopped without finishing {missing}"
            if not some:
                return None
        del self._asked[ticket]
        return [tuple(c for c in self._found.pop(request.uid) if c is not None) for request in requests]

    def cancel(self, ticket: Ticket) -> None:
        """Give up what was asked for."""
        for request in self._asked.pop(ticket, []):
            self.engine.cancel(request.uid)
            self._found.pop(request.uid, None)

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, *, in_flight: InFlight = "finish") -> None:
        """See `Engine`."""
        self.engine.load_weights(weights, version, in_flight=in_flight)


def generate(sampler: Sampler, requests: Sequence[Request]) -> Answers:
    """Run requests to their end."""
    found = sampler.take(sampler.ask(requests))
    assert found is not None, "without a limit of time there is an answer"
    return found
