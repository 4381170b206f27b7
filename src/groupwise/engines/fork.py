"""A process that samples for another: a copy of it (`fork`) that computes with the same weights in the same memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from groupwise.engines.native.engine import NativeEngine
from groupwise.errors import ModelError
from groupwise.types import Request, Sampled
from groupwise.wording import one_line


class Task(NamedTuple):
    """What a helper is to do, and how."""

    requests: list[Request]
    version: int
    max_live: int


class GoneError(Exception):
    """A process that sampled has ended, with this status. Its pool replaces it, or says what to do."""


class SamplingProcess:
    """A copy of this process that samples what it is given, one task after the other. Raises OSError."""

    def __init__(self, own: NativeEngine) -> None:
        self.task = Task([], 0, 0)
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

    def begin(self, task: Task) -> None:
        """Have it sample. Raises GoneError where it is not there any more."""
        self.task = task
        self.wanted = {request.uid: request for request in task.requests}
        self.left = sum(request.n for request in task.requests)
        try:
            self.pipe.send(task)
        except OSError as error:
            raise self._gone() from error

    def finished(self) -> Iterator[Sampled]:
        """What has arrived and is wanted; how many outputs are `left` to come counts the others too.

        Raises what went wrong in the process, or GoneError where it has ended.
        """
        try:
            while self.left and self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, Exception):
                    raise message
                self.left -= 1
                if message.uid in self.wanted:
                    yield message
        except (EOFError, OSError) as error:  # also in the middle of a message
            raise self._gone() from error

    def _gone(self) -> GoneError:
        self.process.join()
        return GoneError(f"ended with status {self.process.exitcode}")

    def end(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def _serve(own: NativeEngine, pipe: Connection) -> None:
    """What a helper does, until the other end is closed."""
    os.setsid()  # Ctrl-C is for the run to handle, which ends its helpers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
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


def _sample(own: NativeEngine, task: Task, pipe: Connection) -> None:
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
