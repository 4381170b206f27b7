"""How `speed.py` talks to its workers: a line of JSON in, a line of JSON out. Standard library only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

ROOT = Path(__file__).parents[1]
GRACE = 60.0
"""Seconds that a worker has to end by itself: a killed one leaves its helpers behind, and a busy machine takes long."""


class WorkerError(Exception):
    """A worker ended before it answered; says how, and what it wrote last."""


class TooSlowError(WorkerError):
    """A worker was ended because it had not answered within the patience that it was given."""


class Channel:
    """The worker's end. What libraries print goes to standard error, so that it cannot be taken for an answer."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **message: Any) -> None:
        """Answer."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def commands(self) -> Iterator[dict[str, Any]]:
        """What is asked, until there is nothing more to be asked."""
        for line in sys.stdin:
            yield json.loads(line)


class Worker:
    """The other end: a process that does one step whenever it is asked to."""

    def __init__(
        self, python: Path | str, module: str, settings: Mapping[str, Any], *, log: Path,
        environment: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(python), "-m", f"benchmarks.{module}", json.dumps(settings)], cwd=ROOT, text=True, stderr=file,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment},
            )  # fmt: skip
        try:
            self.about = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, *, patience: float | None = None, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer, at most `patience` seconds.

        Raises WorkerError where the worker ends instead, TooSlowError where that is because patience did.
        """
        if patience is None:
            return self._ask(command)
        late = Event()
        timer = Timer(patience, lambda: (late.set(), self.process.kill()))
        timer.start()
        try:
            return self._ask(command)
        except WorkerError as error:
            if late.is_set():
                raise TooSlowError(f"a worker had no answer after {patience:.1f} s") from error
            raise
        finally:
            timer.cancel()

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: reading says why
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the worker. Calling it twice is fine.

        It is asked first, by the end of its input: then it ends its own helpers, whose time counts as its own.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # a command that it did not live to read
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last = self.log.read_text()[-2000:]
            raise WorkerError(f"a worker ended with status {code}; {self.log} ends with:\n{last}")
        return dict(json.loads(line))


def resident() -> int:
    """Bytes that this process holds now."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes that this process has held. Not `ru_maxrss`, which a child takes over from its parent."""
    return _status("VmHWM")


class FamilyPeak(Thread):
    """Most bytes that this process and its children hold together while it runs: what they share counts once.

    Looked at fifty times a second; `peak` knows what one process held in between.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._over = 0, Event()

    def run(self) -> None:
        while not self._over.wait(0.02):
            self._look()
        self._look()  # at least once, however late this thread was

    def _look(self) -> None:
        self.most = max(self.most, sum(map(_share, [os.getpid(), *_children()])))

    def stop(self) -> int:
        """No more looking; what was seen."""
        self._over.set()
        self.join()
        return self.most


def _children() -> list[int]:
    found = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in found.read_text().split()] if found.exists() else []


def _share(pid: int) -> int:
    """Bytes of a process, each page divided by how many have it; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
