"""The native engine: samples from the policy's own weights, in the policy's own process.

Slots refill from waiting requests as outputs finish. What a row draws depends on its seed, its token index and its
distribution only, so it does not matter which rows run beside it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from groupwise.engines.base import InFlight
from groupwise.engines.native.draw import Filters, draw, uniforms
from groupwise.engines.native.plain_decoder import PlainDecoder
from groupwise.engines.native.shared_decoder import SharedDecoder
from groupwise.errors import ModelError
from groupwise.models.policy import Policy
from groupwise.tokenizer.codec import Codec
from groupwise.tokenizer.stop_strings import StopChecker
from groupwise.types import Branch, Completion, Finish, Request, Sampled, Sampling

_AHEAD = 16
"""Tokens whose uniforms are computed together: for one, dispatching the operations takes longer than they do."""


class Decoder(Protocol):
    """Where rows are decoded: see `SharedDecoder` and `PlainDecoder`."""

    refills: bool

    def begin(self, prompts: Sequence[tuple[str, Sequence[int]]], branches: Mapping[str, Branch]) -> None: ...
    def attach(self, uids: Sequence[str], max_tokens: int) -> Tensor: ...
    def step(self, token_R: Tensor) -> Tensor: ...
    def keep(self, order: Sequence[int]) -> None: ...
    def end(self, uid: str) -> None: ...


@dataclass(slots=True)
class _Row:
    """One output under way."""

    request: Request
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)

    def drawn_by(self, version: int) -> None:
        """Note that the tokens since the last note were drawn by weights of this version."""
        count = len(self.token_ids) - sum(count for _, count in self.versions)
        if count:
            self.versions.append((version, count))


@dataclass(slots=True)
class _Flight:
    """A request under way: how many of its outputs are still to be drawn, and how many to be handed over."""

    undrawn: int
    undelivered: int
    begun: bool = False


class NativeEngine:
    """An `Engine` over a policy in this process. At most `max_live` outputs are decoded together.

    `on_tokens(n)`, where given, is told of every `n` tokens that were drawn, for a progress display. An error while
    decoding drops all that is in flight; the engine can be used again.
    """

    def __init__(
        self, policy: Policy, codec: Codec, *, max_live: int = 256, on_tokens: Callable[[int], None] | None = None
    ) -> None:
        self.policy, self.codec, self.max_live = policy, codec, max_live
        self.version = 0
        self.on_tokens = on_tokens
        self._checkers: dict[tuple[str, ...], StopChecker] = {}
        self._start_empty()

    def _start_empty(self) -> None:
        make = SharedDecoder if self.policy.layout == "shared" else PlainDecoder
        self.decoder: Decoder = make(self.policy)
        self._flights: dict[str, _Flight] = {}
        self._of_tree: dict[str, dict[str, Request]] = {}
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._ready: deque[Sampled] = deque()
        self._settings: _Settings | None = None

    def submit(self, request: Request) -> None:
        """See `Engine`. Raises ConfigError for an empty stop string."""
        assert request.uid not in self._flights, f"request {request.uid} is in flight already"
        self.check(request)
        self._flights[request.uid] = _Flight(request.n, request.n)
        if request.branch is not None and self.decoder.refills:
            self._of_tree.setdefault(request.branch.tree.uid, {})[request.uid] = request
        self._waiting.extend(_Row(request, i) for i in range(request.n))

    def check(self, request: Request) -> None:
        """Raises ConfigError for an empty stop string; what no caller can mean is an assertion."""
        assert request.token_ids and request.n > 0 and request.sampling.max_tokens > 0
        assert request.branch is None or request.token_ids == request.branch.token_ids, f"{request.uid} leaves its tree"
        self._checker(request.sampling.stop)

    def cancel(self, uid: str) -> None:
        """See `Engine`."""
        flight = self._flights.pop(uid, None)
        if flight is None:
            return
        self._waiting = deque(row for row in self._waiting if row.request.uid != uid)
        for of_tree in self._of_tree.values():
            of_tree.pop(uid, None)
        self._ready = deque(sampled for sampled in self._ready if sampled.uid != uid)
        with torch.inference_mode():
            self._drop([i for i, row in enumerate(self._rows) if row.request.uid == uid])
            if flight.begun and flight.undrawn:
                self.decoder.end(uid)

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, *, in_flight: InFlight = "finish") -> None:
        """See `Engine`. Tensors that already are the policy's own are not copied; an unknown name is a KeyError.

        There is one set of weights, so what is in flight begins again where it is to have one version.
        """
        own = self.policy.model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in weights:
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        if version != self.version and in_flight == "continue":
            for row in self._rows:
                row.drawn_by(self.version)
        elif version != self.version:
            self._begin_again()
        self.version = version

    def _begin_again(self) -> None:
        """Draw what is under way from its first token on: prompts too are computed with the new weights."""
        again = [_Row(row.request, row.index) for row in self._rows]
        with torch.inference_mode():  # stores and captured steps stay, for what begins anew
            self._drop(range(len(self._rows)))
            for uid, flight in self._flights.items():
                if flight.begun and flight.undrawn:
                    self.decoder.end(uid)
        self._waiting.extendleft(reversed(again))
        for request in {row.request.uid: row.request for row in self._waiting}.values():
            self._flights[request.uid].begun = False
            if request.branch is not None and self.decoder.refills:
                self._of_tree.setdefault(request.branch.tree.uid, {})[request.uid] = request

    def close(self) -> None:
        """See `Engine`."""
        self._start_empty()
        self.policy.packed.release()

    def poll(self, timeout: float | None = None) -> list[Sampled]:
        """See `Engine`. Raises ModelError where the policy's logits are not finite."""
        try:
            self._decode(None if timeout is None else time.monotonic() + timeout)
        finally:
            if not (self._waiting or self._rows):
                self.policy.packed.release()
        found, self._ready = list(self._ready), deque()
        for sampled in found:
            flight = self._flights[sampled.uid]
            flight.undelivered -= 1
            if flight.undelivered == 0:
                del self._flights[sampled.uid]
        return found

    def _decode(self, deadline: float | None) -> None:
        """Decode until an output ends, or time is over. Between calls the policy is in the mode that the caller left it
        in."""
        try:
            with _evaluating(self.policy), torch.inference_mode():
                while not self._ready and (self._waiting or self._rows):
                    self._draw(self._advance())
                    if deadline is not None and time.monotonic() >= deadline:
                        break
        except BaseException:
            # Some rows have their token and others have not: whoever goes on after an error starts from nothing.
            self._start_empty()
            raise

    def _advance(self) -> Tensor:
        """Logits of the next token of every live row, after new rows have taken the free slots."""
        old = self._rows
        parts = []
        if old:
            last = torch.tensor([row.token_ids[-1] for row in old], device=self.policy.device)
            parts.append(self.decoder.step(last))
        new = self._admit()
        if new:
            longest = max(row.request.sampling.max_tokens for row in new)
            parts.append(self.decoder.attach([row.request.uid for row in new], longest))
            self._rows = [*old, *new]
            self._settings = None
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _admit(self) -> list[_Row]:
        free = self.max_live - len(self._rows)
        if not self._waiting or (self._rows and (not self.decoder.refills or free < self.max_live // 8)):
            return []
        new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        fresh: dict[str, Request] = {}
        for row in new:
            if row.request.uid not in fresh and not (self._flights[row.request.uid].begun and self.decoder.refills):
                fresh |= self._beginning(row.request)
        if fresh:
            branches = {uid: request.branch for uid, request in fresh.items() if request.branch is not None}
            self.decoder.begin([(uid, request.token_ids) for uid, request in fresh.items()], branches)
        return new

    def _beginning(self, request: Request) -> dict[str, Request]:
        """What begins with a request: itself and, where it goes on from a tree, whatever else waits to do so."""
        found = {request.uid: request}
        if request.branch is not None and self.decoder.refills:
            found |= self._of_tree.pop(request.branch.tree.uid)
        for uid in found:
            self._flights[uid].begun = True
        return found

    def _draw(self, logits_RV: Tensor) -> None:
        """Draw a token for every live row; outputs that end with it become ready."""
        if self._settings is None:
            self._settings = _Settings(self._rows, self.codec.end_token_ids, logits_RV.device)
        settings = self._settings
        settings.forbid_early_end(logits_RV)
        tokens, logprobs = draw(logits_RV, settings.next_uniforms(), settings.filters)
        drawn = logprobs.tolist()
        if not all(map(math.isfinite, drawn)):
            raise ModelError(
                f"The policy's logits are not finite any more (weights of version {self.version}): it has "
                "diverged. Lower train.learning_rate, and go on from an earlier checkpoint."
            )
        ended: list[int] = []
        for i, (row, token, logprob) in enumerate(zip(self._rows, tokens.tolist(), drawn, strict=True)):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            finish = self._finish(row)
            if finish is not None:
                ended.append(i)
                self._ready.append(self._complete(row, finish))
        if ended:
            self._retire(ended)
        if self.on_tokens is not None:
            self.on_tokens(len(drawn))

    def _retire(self, ended: Sequence[int]) -> None:
        """Free the places of rows that have ended, and their prompts where no output is left to be drawn."""
        uids = [self._rows[i].request.uid for i in ended]
        self._drop(ended)
        for uid in uids:
            self._flights[uid].undrawn -= 1
            if self._flights[uid].undrawn == 0:
                self.decoder.end(uid)

    def _finish(self, row: _Row) -> Finish | None:
        sampling = row.request.sampling
        if row.token_ids[-1] in self.codec.end_token_ids:
            return "stop"
        long_enough = len(row.token_ids) >= sampling.min_tokens
        if sampling.stop and long_enough and self._checker(sampling.stop).ends_with_stop(row.token_ids):
            return "stop"
        return "length" if len(row.token_ids) >= sampling.max_tokens else None

    def _checker(self, stop: tuple[str, ...]) -> StopChecker:
        if stop not in self._checkers:
            self._checkers[stop] = StopChecker(self.codec, stop, self.policy.model.config.get_text_config().vocab_size)
        return self._checkers[stop]

    def _complete(self, row: _Row, finish: Finish) -> Sampled:
        row.drawn_by(self.version)
        return Sampled(
            row.request.uid, row.index,
            Completion(
                tuple(row.token_ids), self.codec.decode(row.token_ids), tuple(row.logprobs), finish,
                tuple(row.versions),
            ),
        )  # fmt: skip

    def _drop(self, ended: Sequence[int]) -> None:
        """Take rows out; the last live rows move into their places, so that little is copied."""
        count = len(self._rows) - len(ended)
        gone = set(ended)
        spare = iter([i for i in range(len(self._rows) - 1, count - 1, -1) if i not in gone])
        order = [next(spare) if i in gone else i for i in range(count)]
        self.decoder.keep(order)
        self._rows = [self._rows[i] for i in order]
        self._settings = None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, in which gradient checkpointing leaves caches alone; the mode comes back afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


class _Settings:
    """What the live rows ask for, as tensors, and the uniforms that they draw with, token after token; made anew only
    when the rows change."""

    def __init__(self, rows: Sequence[_Row], end_token_ids: frozenset[int], device: torch.device) -> None:
        sampling: list[Sampling] = [row.request.sampling for row in rows]
        self.filters = Filters.of(sampling, device)
        self.seed_R = torch.tensor([row.request.seed + row.index for row in rows], device=device)
        self._start_R = torch.tensor([len(row.token_ids) for row in rows], device=device)
        self._drawn = 0
        self._ahead: deque[Tensor] = deque()
        self.min_R = torch.tensor([s.min_tokens for s in sampling], device=device)
        self.any_min = any(s.min_tokens > 1 for s in sampling)
        self.end_ids = torch.tensor(sorted(end_token_ids), dtype=torch.long, device=device)

    def next_uniforms(self) -> Tensor:
        """Those of the token that every row draws next, `[R]`."""
        if not self._ahead:
            index_RA = self._index_R[:, None] + torch.arange(_AHEAD, device=self._start_R.device)
            self._ahead.extend(uniforms(self.seed_R[:, None], index_RA).T.contiguous())
        self._drawn += 1
        return self._ahead.popleft()

    def forbid_early_end(self, logits_RV: Tensor) -> None:
        """Make the end tokens impossible for rows that would stay shorter than their minimum length."""
        if self.any_min and len(self.end_ids):
            early = (self._index_R + 1 < self.min_R)[:, None]
            columns = logits_RV[:, self.end_ids]
            logits_RV[:, self.end_ids] = columns.masked_fill(early, float("-inf"))

    @property
    def _index_R(self) -> Tensor:
        """Of the token that every row draws next."""
        return self._start_R + self._drawn
