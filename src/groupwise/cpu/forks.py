"""Copies of this process (`fork`) that work beside it, each with one thread, at the other end of a pipe."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

Pipe = Connection
"""One end of what two processes speak through."""


class GoneError(Exception):
    """A copy has ended; the message says with which status."""


def may_fork() -> bool:
    """Whether this process can have copies: of one with threads they are safe on Linux alone, and copies have none."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


class Fork:
    """A copy of this process that runs `serve(pipe)` until the pipe is closed. Raises OSError."""

    def __init__(self, serve: Callable[[Pipe], None], name: str) -> None:
        self._pipe, far = multiprocessing.Pipe()
        try:
            with far, _quiet():
                self.process = multiprocessing.get_context("fork").Process(
                    target=_begin, args=(serve, far), daemon=True, name=name
                )
                self.process.start()
        except OSError:
            self._pipe.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.is_alive()

    def send(self, message: Any) -> None:
        """Give it a message. Raises GoneError."""
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._gone() from error

    def received(self) -> Iterator[Any]:
        """What has arrived from it. Raises GoneError."""
        try:
            while self._pipe.poll():
                yield self._pipe.recv()
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
        self._pipe.close()

    @staticmethod
    def ready(forks: Sequence[Fork], timeout: float | None) -> list[Fork]:
        """Those from which something has arrived, or that have ended; waits so many seconds for one, None for ever."""
        found = multiprocessing.connection.wait([fork._pipe for fork in forks], timeout)
        return [fork for fork in forks if fork._pipe in found]


def _begin(serve: Callable[[Pipe], None], pipe: Pipe) -> None:
    """What a copy does first."""
    os.setsid()  # Ctrl-C is for the run to handle, which ends its copies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    _close_all_but(pipe.fileno())
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        serve(pipe)


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
