"""Sampling by several processes of this machine: on a CPU a core decodes rows of its own faster than it helps with
every operation on all of them.

A decoding step is hundreds of small operations one after the other. Threads inside each wait for one another hundreds
of times, and what dispatches them runs on one core. So requests are dealt out to worker processes, copies of this one
(`fork`) of one thread, that compute with the same weights in the same memory. Nothing is sent but
requests and completions, and what a row draws does not depend on which process draws it.

A worker process has one thread: GNU's OpenMP knows no other way in a copy of a process that has used it. So there is a
process per thread, or one alone."""

from __future__ import annotations

import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from groupwise.cpu.cores import LARGEST, even_shares, threads
from groupwise.cpu.forks import Fork, GoneError, may_fork
from groupwise.cpu.shared_weights import SharedWeights, share
from groupwise.engines.base import InFlight
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.sampling_process import SamplingProcess, Task
from groupwise.errors import ModelError
from groupwise.types import Request, Sampled

ROWS = 16
"""Outputs per process: with fewer, reading the weights costs more than threads that wait for each other."""
TOKENS = 4096
"""Output tokens in all, at full length, below which dealing them out is not worth while."""
REPLACED = 3
"""Processes that are killed while they sample and replaced, before that is an error: until all is idle again."""


@dataclass(slots=True)
class _Flight:
    """A request under way, and which of its outputs were not handed over yet."""

    request: Request
    missing: set[int]


class PooledEngine:
    """An `Engine` that deals out the requests that wait when sampling begins to `own` and to worker processes.

    How many there are depends on the requests, the model and the number of torch's threads only. Where one is best, and
    for requests that come later, it is `own`. Fewer than `least_tokens` in all are not dealt out.
    """

    def __init__(self, own: NativeEngine, *, least_tokens: int = TOKENS) -> None:
        self.own, self.least_tokens = own, least_tokens
        self._max_live = own.max_live
        self._flights: dict[str, _Flight] = {}
        self._waiting: list[Request] = []
        self._ready: deque[Sampled] = deque()
        self._apart = False
        self._replaced = 0
        self._weights: SharedWeights | None = None
        self._idle: list[SamplingProcess] = []
        self._busy: list[SamplingProcess] = []
        weakref.finalize(self, _end_both, self._idle, self._busy)

    def submit(self, request: Request) -> None:
        """See `Engine`. Raises ConfigError for an empty stop string."""
        assert request.uid not in self._flights, f"request {request.uid} is in flight already"
        self.own.check(request)
        self._flights[request.uid] = _Flight(request, set(range(request.n)))
        self._waiting.append(request)

    def cancel(self, uid: str) -> None:
        """See `Engine`. A worker process that nothing is wanted of any more is ended."""
        if self._flights.pop(uid, None) is None:
            return
        self._waiting = [request for request in self._waiting if request.uid != uid]
        self._ready = deque(sampled for sampled in self._ready if sampled.uid != uid)
        self.own.cancel(uid)
        for worker in self._busy:
            worker.wanted.pop(uid, None)
        _end([worker for worker in self._busy if not worker.wanted], self._busy)

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, *, in_flight: InFlight = "finish") -> None:
        """See `Engine`. What worker processes have not finished begins again in either case, with the new weights."""
        self._receive(0.0)
        wanted = [uid for worker in self._busy for uid in worker.wanted]
        self._waiting += [self._flights[uid].request for uid in wanted if uid in self._flights]
        _end(self._busy, self._busy)
        self.own.load_weights(weights, version, in_flight=in_flight)

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

    def poll(self, timeout: float | None = None) -> list[Sampled]:
        """See `Engine`. Raises ModelError where the policy's logits are not finite, or where worker processes end again
        and again."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while self._flights:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not self._ready:
                    self._work(left)
                if (found := list(self._due())) or left == 0.0:
                    return found
        except BaseException:
            self._drop()
            raise
        return []

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

    def _work(self, timeout: float | None) -> None:
        """Go on until something is ready, a worker process has ended, or time is over."""
        if self._waiting:
            self._deal()
        # One also when all worker processes are done: how sums are rounded must not depend on when that is.
        with threads(1 if self._apart else torch.get_num_threads()):
            own = self.own.poll(timeout)
        assert own or self._busy or timeout is not None, f"nobody samples {sorted(self._flights)}"
        self._ready.extend(own)
        self._receive(0.0 if own or not self._busy else timeout)

    def _deal(self) -> None:
        """Give what waits to this process and, where nothing else runs and it pays, to worker processes."""
        requests, self._waiting = self._waiting, []
        alone = len(self._flights) == len(requests)
        kept, *given = self._shares(requests) if alone else [requests]
        processes = len(given) + 1
        if alone:
            _end(self._busy, self._busy)  # they are busy with what was cancelled
            self._apart, self._replaced = bool(given), 0
            self.own.max_live = max(1, self._max_live // processes)
        for part in given:
            self._have_sampled(Task(part, self.own.version, self.own.max_live))
        self._sample_here(kept)

    def _sample_here(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.own.submit(request)

    def _have_sampled(self, task: Task) -> SamplingProcess | None:
        """Give a task to a worker process, which is returned, or do it here where there can be none."""
        while True:
            try:
                worker = self._worker()
            except OSError as error:
                _warn(f"there is no room for another process ({error}), so this one samples its part too")
                self._sample_here(request for request in task.requests if request.uid in self._flights)
                return None
            try:
                worker.begin(task)
            except GoneError as gone:
                self._count(gone, worker)
            else:
                self._busy.append(worker)
                return worker

    def _replace(self, gone: GoneError, worker: SamplingProcess) -> None:
        """Have another worker process do the whole task of one that was ended: alike from the first token on, since how
        sums are rounded depends on which rows are there together. What has arrived is not given out again."""
        self._busy.remove(worker)
        self._count(gone, worker)
        other = self._have_sampled(worker.task)
        if other is not None:
            other.wanted = worker.wanted  # some may have been cancelled since

    def _count(self, gone: GoneError, worker: SamplingProcess) -> None:
        """Say once that a worker process was ended while it was busy. Raises ModelError where that happens too
        often."""
        worker.end()
        self._replaced += 1
        what = f"{gone} (-9: it was killed, often for lack of memory)"
        advice = 'Lower sampling.max_live_outputs, or sample in one process: `engine.kind` = "native".'
        if self._replaced > REPLACED:
            raise ModelError(f"A process that sampled {what}, and so did {REPLACED} others in its place. {advice}")
        if self._replaced == 1:
            _warn(f"a process {what}; its part is drawn again, and is the same. {advice[:-1]}")

    def _shares(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Requests by the process that samples them; those of one tree stay together."""
        families: dict[str, list[Request]] = {}
        for request in requests:
            families.setdefault(request.uid if request.branch is None else request.branch.tree.uid, []).append(request)
        of_family = list(families.values())
        tokens = [sum(r.n * r.sampling.max_tokens for r in family) for family in of_family]
        shares = [list(range(len(tokens)))]
        if sum(tokens) >= self.least_tokens:
            policy = self.own.policy
            shares = by_process(tokens, sum(request.n for request in requests), policy.size, policy.device)
        return [[request for f in share for request in of_family[f]] for share in shares]

    def _worker(self) -> SamplingProcess:
        """One that is idle, or a new one. Raises OSError."""
        weights = share(self.own.policy.model)
        if weights is not self._weights:
            _end(self._idle, self._idle)
            self._weights = weights
        while self._idle:
            worker = self._idle.pop()
            if worker.fork.alive:
                return worker
            _warn("a process that had nothing to do was ended from outside, and another takes its place")
            worker.end()
        return SamplingProcess(self.own)

    def _receive(self, timeout: float | None) -> None:
        """Take in what worker processes have finished; wait so many seconds for one of them, None for ever."""
        ready = Fork.ready([worker.fork for worker in self._busy], timeout)
        for worker in [worker for worker in self._busy if worker.fork in ready]:
            try:
                self._take(worker)
            except GoneError as gone:
                self._replace(gone, worker)
                continue
            if not worker.left:
                self._busy.remove(worker)
                self._idle.append(worker)

    def _take(self, worker: SamplingProcess) -> None:
        for sampled in worker.finished():
            self._ready.append(sampled)
            if self.own.on_tokens is not None:
                self.own.on_tokens(len(sampled.completion.token_ids))


def by_process(sizes: Sequence[float], outputs: int, parameters: int, device: torch.device | str) -> list[list[int]]:
    """Indexes of `sizes`, what there is to sample of a model, `outputs` in all, by process."""
    count = torch.get_num_threads()
    if torch.device(device).type == "cpu" and may_fork() and parameters <= LARGEST and outputs >= ROWS * count:
        shares = even_shares(sizes, count)
        if len(shares) == count:
            return shares
    return [list(range(len(sizes)))]


def _end(workers: Sequence[SamplingProcess], those: list[SamplingProcess]) -> None:
    """End some of `those`, which they are taken out of."""
    gone = list(workers)
    those[:] = [worker for worker in those if worker not in gone]
    for worker in gone:
        worker.end()


def _end_both(idle: list[SamplingProcess], busy: list[SamplingProcess]) -> None:
    _end(idle, idle)
    _end(busy, busy)


def _warn(what: str) -> None:
    warnings.warn(f"sampling by several processes: {what}.", RuntimeWarning, stacklevel=3)
