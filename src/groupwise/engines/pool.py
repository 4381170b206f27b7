"""Sampling by several processes of this machine: on a CPU a core decodes rows of its own faster than it helps with
every operation on all of them.

A decoding step is hundreds of small operations one after the other. Threads inside each wait for one another hundreds
of times, and what hands them out runs on one core. So requests are dealt out to helpers, copies of this process
(`fork`) of one thread, that compute with the same weights in the same memory. Nothing is sent but
requests and completions, and what a row draws does not depend on which process draws it.

A helper has one thread: GNU's OpenMP knows no other way in a copy of a process that has used it. So there is a process
per thread, or one alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from groupwise.engines.native import NativeEngine
from groupwise.errors import ModelError
from groupwise.models.cores import LARGEST, even_shares, threads
from groupwise.models.shared_memory import SharedWeights, share
from groupwise.types import Request, Sampled
from groupwise.wording import one_line

ROWS = 16
"""Outputs per process: with fewer, reading the weights costs more than threads that wait for each other."""
TOKENS = 4096
"""Output tokens in all, at full length, below which dealing them out is not worth while."""


@dataclass(slots=True)
class _Flight:
    """A request under way, and which of its outputs were not handed over yet."""

    request: Request
    missing: set[int]


class _Task(NamedTuple):
    """What a helper is to do, and how."""

    requests: list[Request]
    version: int
    max_live: int


class PooledEngine:
    """An `Engine` that deals out the requests that wait when sampling begins to `own` and to helpers.

    How many there are depends on the requests, the model and the number of torch's threads only. Where one is best, and
    for requests that come later, it is `own`. Fewer than `least_tokens` in all are not dealt out.
    """

    def __init__(self, own: NativeEngine, *, least_tokens: int = TOKENS) -> None:
        self.own, self.least_tokens = own, least_tokens
        self._max_live = own.max_live
        self._flights: dict[str, _Flight] = {}
        self._waiting: list[Request] = []
        self._ready: deque[Sampled] = deque()
        self._of_own: Iterator[Sampled] = iter(())
        self._apart = False
        self._weights: SharedWeights | None = None
        self._idle: list[_Helper] = []
        self._busy: list[_Helper] = []
        weakref.finalize(self, _end_both, self._idle, self._busy)

    def submit(self, request: Request) -> None:
        """See `Engine`. Raises ConfigError for an empty stop string."""
        assert request.uid not in self._flights, f"request {request.uid} is in flight already"
        self.own.check(request)
        self._flights[request.uid] = _Flight(request, set(range(request.n)))
        self._waiting.append(request)

    def cancel(self, uid: str) -> None:
        """See `Engine`. A helper that nothing is wanted of any more is ended."""
        if self._flights.pop(uid, None) is None:
            return
        self._waiting = [request for request in self._waiting if request.uid != uid]
        self._ready = deque(sampled for sampled in self._ready if sampled.uid != uid)
        self.own.cancel(uid)
        for helper in self._busy:
            helper.wanted.pop(uid, None)
        _end([helper for helper in self._busy if not helper.wanted], self._busy)

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """See `Engine`. What helpers have not finished is begun again, with the new weights."""
        self._receive(wait_for_one=False)
        wanted = [uid for helper in self._busy for uid in helper.wanted]
        self._waiting += [self._flights[uid].request for uid in wanted if uid in self._flights]
        _end(self._busy, self._busy)
        self.own.load_weights(weights, version)

    def close(self) -> None:
        """See `Engine`."""
        self._drop()
        _end(self._idle, self._idle)

    def _drop(self) -> None:
        """Forget what is in flight."""
        _end(self._busy, self._busy)
        self._flights, self._waiting = {}, []
        self._ready.clear()
        self.own.close()

    def completed(self) -> Iterator[Sampled]:
        """See `Engine`. Raises ModelError where the policy's logits are not finite, or where a helper was ended."""
        try:
            while self._flights:
                if not self._ready:
                    self._work()
                yield from self._due()
        except GeneratorExit:  # the consumer may come back
            raise
        except BaseException:
            self._drop()
            raise
        finally:
            unfinished, self._of_own = self._of_own, iter(())
            if isinstance(unfinished, Generator):
                unfinished.close()  # `own` gives back what it holds while it samples

    def _due(self) -> Iterator[Sampled]:
        """What is ready, less what was cancelled, or was handed over before its request was begun again."""
        while self._ready:
            sampled = self._ready.popleft()
            flight = self._flights.get(sampled.uid)
            if flight is None or sampled.output not in flight.missing:
                continue
            flight.missing.remove(sampled.output)
            if not flight.missing:
                del self._flights[sampled.uid]
                self.own.cancel(sampled.uid)  # it may be drawing once more what was begun again
            yield sampled

    def _work(self) -> None:
        """Go on until something is ready, or a helper has ended."""
        if self._waiting:
            self._deal()
        # One also when all helpers are done: how sums are rounded must not depend on when that is.
        with threads(1 if self._apart else torch.get_num_threads()):
            sampled = next(self._of_own, None)
            if sampled is None:  # it had nothing to do, or was given something since
                self._of_own = self.own.completed()
                sampled = next(self._of_own, None)
        assert sampled is not None or self._busy, f"nobody samples {sorted(self._flights)}"
        if sampled is not None:
            self._ready.append(sampled)
        self._receive(wait_for_one=sampled is None)

    def _deal(self) -> None:
        """Give what waits to this process and, where nothing else runs and it pays, to helpers."""
        requests, self._waiting = self._waiting, []
        alone = len(self._flights) == len(requests)
        kept, *given = self._shares(requests) if alone else [requests]
        processes = len(given) + 1
        if alone:
            _end(self._busy, self._busy)  # they are busy with what was cancelled
            self._apart = bool(given)
            self.own.max_live = max(1, self._max_live // processes)
        for part in given:
            task = _Task(part, self.own.version, self.own.max_live)
            try:
                helper = self._helper()
            except OSError as error:
                _warn(f"there is no room for another process ({error}), so this one samples its part too")
                kept = [*kept, *part]
            else:
                self._busy.append(helper)
                helper.begin(task)
        for request in kept:
            self.own.submit(request)

    def _shares(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Requests by the process that samples them; those of one tree stay together."""
        families: dict[str, list[Request]] = {}
        for request in requests:
            families.setdefault(request.uid if request.branch is None else request.branch.tree.uid, []).append(request)
        of_family = list(families.values())
        tokens = [sum(r.n * r.sampling.max_tokens for r in family) for family in of_family]
        shares = [list(range(len(tokens)))]
        if sum(tokens) >= self.least_tokens and not multiprocessing.current_process().daemon:
            policy = self.own.policy
            shares = by_process(tokens, sum(request.n for request in requests), policy.size, policy.device)
        return [[request for f in share for request in of_family[f]] for share in shares]

    def _helper(self) -> _Helper:
        """One that is idle, or a new one. Raises OSError."""
        weights = share(self.own.policy.model)
        if weights is not self._weights:
            _end(self._idle, self._idle)
            self._weights = weights
        while self._idle:
            helper = self._idle.pop()
            if helper.process.is_alive():
                return helper
            _warn("a process that had nothing to do was ended from outside, and another takes its place")
            helper.end()
        return _Helper(self.own)

    def _receive(self, *, wait_for_one: bool) -> None:
        """Take in what helpers have finished."""
        ready = wait([helper.pipe for helper in self._busy], None if wait_for_one else 0.0)
        for helper in [helper for helper in self._busy if helper.pipe in ready]:
            for sampled in helper.finished():
                self._ready.append(sampled)
                if self.own.on_tokens is not None:
                    self.own.on_tokens(len(sampled.completion.token_ids))
            if not helper.left:
                self._busy.remove(helper)
                self._idle.append(helper)


def by_process(sizes: Sequence[float], outputs: int, parameters: int, device: torch.device | str) -> list[list[int]]:
    """Indexes of `sizes`, what there is to sample of a model, `outputs` in all, by process."""
    count = torch.get_num_threads()
    # A fork of a process with threads is safe on Linux alone.
    possible = sys.platform == "linux" and torch.device(device).type == "cpu"
    if possible and parameters <= LARGEST and outputs >= ROWS * count:
        shares = even_shares(sizes, count)
        if len(shares) == count:
            return shares
    return [list(range(len(sizes)))]


class _Helper:
    """A copy of this process that samples what it is given, one task after the other. Raises OSError."""

    def __init__(self, own: NativeEngine) -> None:
        self.wanted: dict[str, Request] = {}
        self.left = 0
        self.pipe, far = multiprocessing.Pipe()
        try:
            with far, _quiet():
                self.process = multiprocessing.get_context("fork").Process(
                    target=_serve, args=(own, far), daemon=True, name="groupwise-sampler"
                )
                self.process.start()
        except OSError:
            self.pipe.close()
            raise

    def begin(self, task: _Task) -> None:
        """Have it sample. Raises ModelError where it is not there any more."""
        self.wanted = {request.uid: request for request in task.requests}
        self.left = sum(request.n for request in task.requests)
        try:
            self.pipe.send(task)
        except ConnectionError as error:
            raise self._gone() from error

    def finished(self) -> Iterator[Sampled]:
        """What has arrived and is wanted; how many outputs are `left` to come counts the others too.

        Raises what went wrong in the process, or ModelError where it has ended.
        """
        try:
            while self.left and self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, Exception):
                    raise message
                self.left -= 1
                if message.uid in self.wanted:
                    yield message
        except (EOFError, ConnectionError) as error:
            raise self._gone() from error

    def _gone(self) -> ModelError:
        self.process.join()
        return ModelError(
            f"A process that sampled ended with status {self.process.exitcode} (-9: it was killed, often for lack of "
            "memory). Lower sampling.max_live_outputs, or sample in one process: OMP_NUM_THREADS=1."
        )

    def end(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def _end(helpers: Sequence[_Helper], those: list[_Helper]) -> None:
    """End some of `those`, which they are taken out of."""
    gone = list(helpers)
    those[:] = [helper for helper in those if helper not in gone]
    for helper in gone:
        helper.end()


def _end_both(idle: list[_Helper], busy: list[_Helper]) -> None:
    _end(idle, idle)
    _end(busy, busy)


def _serve(own: NativeEngine, pipe: Connection) -> None:
    """What a helper does, until the other end is closed."""
    os.setsid()  # Ctrl-C is for the run to handle, which ends its helpers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _close_all_but(pipe.fileno())
    own.close()  # what the parent has decoded is of no use here
    own.on_tokens = None
    with suppress(EOFError, ConnectionError):
        try:
            while True:
                _sample(own, pipe.recv(), pipe)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001 - a boundary: it is raised where completions are waited for
            ours = isinstance(error, ModelError)
            pipe.send(error if ours else ModelError(f"Sampling failed: {one_line(error, 300)}"))


def _warn(what: str) -> None:
    warnings.warn(f"sampling by several processes: {what}.", RuntimeWarning, stacklevel=3)


def _sample(own: NativeEngine, task: _Task, pipe: Connection) -> None:
    torch.set_num_threads(1)
    own.version, own.max_live = task.version, task.max_live
    for request in task.requests:
        own.submit(request)
    for sampled in own.completed():
        pipe.send(sampled)


def _close_all_but(kept: int) -> None:
    """Give up what the parent has open: whoever waits for the other end of a pipe waits for this process too."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != kept:
            with suppress(OSError):
                os.close(int(name))


@contextmanager
def _quiet() -> Iterator[None]:
    """No remark about threads, of which none that a copy needs holds a lock; none by tokenizers, which are told."""
    name = "TOKENIZERS_PARALLELISM"
    told = name in os.environ
    os.environ.setdefault(name, "false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if not told:
            del os.environ[name]
