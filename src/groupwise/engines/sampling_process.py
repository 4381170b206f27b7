"""A process that samples for another: a copy of it that computes with the same weights in the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from groupwise.cpu.forks import Fork, Pipe
from groupwise.engines.base import finished
from groupwise.engines.native.engine import NativeEngine
from groupwise.errors import ModelError
from groupwise.types import Request, Sampled
from groupwise.wording import one_line


class Task(NamedTuple):
    """What a worker process is to do, and how."""

    requests: list[Request]
    version: int
    max_live: int


class SamplingProcess:
    """A copy of this process that samples what it is given, one task after the other. Raises OSError."""

    def __init__(self, own: NativeEngine) -> None:
        self.task = Task([], 0, 0)
        self.wanted: dict[str, Request] = {}
        self.left = 0
        self.fork = Fork(partial(_serve, own), "groupwise-sampler")

    def begin(self, task: Task) -> None:
        """Have it sample. Raises GoneError where it is not there any more."""
        self.task = task
        self.wanted = {request.uid: request for request in task.requests}
        self.left = sum(request.n for request in task.requests)
        self.fork.send(task)

    def finished(self) -> Iterator[Sampled]:
        """What has arrived and is wanted; how many outputs are `left` to come counts the others too.

        Raises what went wrong in the process, or GoneError where it has ended.
        """
        for message in self.fork.received() if self.left else ():
            if isinstance(message, Exception):
                raise message
            self.left -= 1
            if message.uid in self.wanted:
                yield message
            if not self.left:
                break  # idle from now on: that it ends is found out when it is given something

    def end(self) -> None:
        """End it, whatever it is doing."""
        self.fork.end()


def _serve(own: NativeEngine, pipe: Pipe) -> None:
    """What a worker process does, until the other end is closed."""
    own.close()  # what the parent has decoded is of no use here
    own.on_tokens = None
    try:
        while True:
            _sample(own, pipe.recv(), pipe)
    except (EOFError, ConnectionError):
        raise
    except Exception as error:  # noqa: BLE001 - a boundary: it is raised where completions are waited for
        ours = isinstance(error, ModelError)
        pipe.send(error if ours else ModelError(f"Sampling failed: {one_line(error, 300)}"))


def _sample(own: NativeEngine, task: Task, pipe: Pipe) -> None:
    own.version, own.max_live = task.version, task.max_live
    for request in task.requests:
        own.submit(request)
    for sampled in finished(own):
        pipe.send(sampled)
