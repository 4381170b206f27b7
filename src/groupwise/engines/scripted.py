"""An engine that answers from a script: for tests of whatever asks an engine, and for trying a job without a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from groupwise.engines.base import InFlight
from groupwise.tokenizer.codec import Codec
from groupwise.tokenizer.stop_strings import StopChecker
from groupwise.types import Completion, Finish, Request, Sampled

Script = Mapping[str | tuple[int, ...], Sequence[str]] | Callable[[Request, int], str]
"""Texts by uid or by the prompt's token ids, output `i` taking text `i` (again from the first where they run out); or
a function of the request and the output's index."""


class ScriptedEngine:
    """An `Engine` whose outputs are written down beforehand.

    A text becomes its tokens and an end token. It is cut after the first stop string, and at `max_tokens`. Each token
    has the log-prob `logprob`. Outputs come back in reverse, so that nobody counts on an order. `requests` holds what
    was submitted.
    """

    def __init__(self, script: Script, codec: Codec, *, logprob: float = -1.0) -> None:
        self.script, self.codec, self.logprob = script, codec, logprob
        self.version = 0
        self.requests: list[Request] = []
        self._waiting: deque[tuple[Request, int]] = deque()

    def submit(self, request: Request) -> None:
        """See `Engine`."""
        assert all(request.uid != other.uid for other, _ in self._waiting), f"{request.uid} is in flight already"
        self.requests.append(request)
        self._waiting.extend((request, index) for index in range(request.n))

    def poll(self, timeout: float | None = None) -> list[Sampled]:
        """See `Engine`. One output at a time."""
        if not self._waiting:
            return []
        request, index = self._waiting.pop()
        return [Sampled(request.uid, index, self._complete(request, self._text(request, index)))]

    def cancel(self, uid: str) -> None:
        """See `Engine`."""
        self._waiting = deque(item for item in self._waiting if item[0].uid != uid)

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, *, in_flight: InFlight = "finish") -> None:
        """See `Engine`. The weights are looked at, as an engine that copies them would, and forgotten; what is in
        flight has not begun."""
        for _ in weights:
            pass
        self.version = version

    def close(self) -> None:
        """See `Engine`."""
        self._waiting.clear()

    def _text(self, request: Request, index: int) -> str:
        if callable(self.script):
            return self.script(request, index)
        texts = self.script[request.uid if request.uid in self.script else request.token_ids]
        return texts[index % len(texts)]

    def _complete(self, request: Request, text: str) -> Completion:
        token_ids, finish = self._cut(request, (*self.codec.encode_text(text), *sorted(self.codec.end_token_ids)[:1]))
        logprobs = (self.logprob,) * len(token_ids)
        versions = ((self.version, len(token_ids)),)
        return Completion(token_ids, self.codec.decode(token_ids), logprobs, finish, versions)

    def _cut(self, request: Request, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], Finish]:
        checker = StopChecker(self.codec, request.sampling.stop)
        for end in range(1, min(len(token_ids), request.sampling.max_tokens) + 1):
            if checker.ends_with_stop(token_ids[:end]):
                return token_ids[:end], "stop"
        if len(token_ids) > request.sampling.max_tokens:
            return token_ids[: request.sampling.max_tokens], "length"
        return token_ids, "stop"
