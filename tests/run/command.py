"""The command line in processes of its own, which tests may kill.

They are forked from a server that has imported what is heavy once, so that each is up in a moment."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HEAVY = ["groupwise.cli", "groupwise.commands.api", "transformers.models.qwen3.modeling_qwen3"]
PATIENCE = 600.0
"""Seconds after which something is taken to have hung; nothing that works is measured by it."""


class Command:
    """`groupwise ARGUMENTS` under way in the folder `at`. `before` is called in its process first."""

    def __init__(self, at: Path, *arguments: str | Path, before: Callable[[], None] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(HEAVY)
        self.at = at
        self.files = at / "stdout.txt", at / "stderr.txt"
        for file in self.files:
            file.unlink(missing_ok=True)  # of the command before
        self.process: BaseProcess = context.Process(
            target=_run, args=(at, [str(argument) for argument in arguments], before)
        )
        self.process.start()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until something is so; the process must not end before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive(), f"it ended too soon: {self.error}"
            assert time.monotonic() < deadline, "it takes too long"
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        assert self.process.is_alive(), f"it ended too soon: {self.error}"
        os.kill(self.process.pid, number)

    def end(self, status: int = 0) -> str:
        """Wait for its end and return standard output; its exit status has to be this."""
        self.process.join(PATIENCE)
        found = self.process.exitcode
        if found is None:
            self.process.kill()
            self.process.join()
        assert found == status, f"it ended with {found} instead of {status}:\n{self.output}\n{self.error}"
        return self.output

    @property
    def output(self) -> str:
        """What it wrote to standard output so far."""
        return self.files[0].read_text() if self.files[0].exists() else ""

    @property
    def error(self) -> str:
        """What it wrote to standard error so far."""
        return self.files[1].read_text() if self.files[1].exists() else ""


def _run(at: Path, arguments: Sequence[str], before: Callable[[], None] | None) -> None:
    os.chdir(at)
    for descriptor, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    import torch

    torch.set_num_threads(1)
    if before is not None:
        before()
    from groupwise.cli import main

    sys.argv = ["groupwise", *arguments]
    main()


@dataclass
class KillAt:
    """Called in a process, has it kill itself the n-th time that it changes a file, with the change half made."""

    moment: int

    def __call__(self) -> None:
        from groupwise.store import checkpoint, events

        for place, name in ((os, "fsync"), (os, "replace"), (os, "truncate"), (shutil, "rmtree")):
            setattr(place, name, self._counted(getattr(place, name), lambda *_: None))
        checkpoint.save_file = self._counted(checkpoint.save_file, lambda _, path: Path(path).write_bytes(b"half"))
        write = events.LineFile.append
        half = self._counted(write, lambda file, line: file._file.write(line.encode()[: len(line) // 2]))
        events.LineFile.append = half  # type: ignore[method-assign]

    def _counted(self, function: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.moment -= 1
            if self.moment == 0:
                half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counted
