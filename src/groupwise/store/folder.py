"""The run folder: everything a run is, in files that people and tools can read.

`job.toml` is the resolved job, `events.jsonl` holds one object per step and `rollouts.jsonl` the sampled groups,
`checkpoints/` the last ones and the best, `tensorboard/` is there when asked for, `result.json` is written at the end,
and `lock` is held by the process that writes."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit

from groupwise.disk import cannot_write, write_atomic
from groupwise.errors import RunFolderError
from groupwise.store import events


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and the places in it.

    `path` is absolute from the start: a reward that changes the working directory must not move what is written. `name`
    is what it was called, for messages.
    """

    path: Path
    name: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        called = self.path.expanduser()
        object.__setattr__(self, "name", str(called))
        object.__setattr__(self, "path", called.absolute())

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make a new run's folder. Raises RunFolderError where it cannot be made, or where `free` says so."""
        folder = cls.free(path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder.path, error) from error
        return folder

    @classmethod
    def free(cls, path: Path) -> RunFolder:
        """The folder of a run that may begin there; it need not be there, and nothing is made.

        Raises RunFolderError where it is not empty, or holds a run that has begun. A job that failed before its first
        event leaves nothing to lose: its folder serves again.
        """
        folder = cls(path)
        try:
            there = folder.path.iterdir() if folder.path.exists() else ()
            found = {entry.name for entry in there if entry.is_dir() or entry.stat().st_size}
        except OSError as error:
            raise cannot_write(folder.path, error) from error
        if found <= {place.name for place in (folder.job, folder.lock_file, folder.rewards_log, folder.tensorboard)}:
            return folder
        if folder.job.name in found:
            advice = f"Continue it with `groupwise resume {folder.name}`, or choose another folder with --run."
            raise RunFolderError(f"{folder.name} holds a run already. {advice}")
        raise RunFolderError(f"{folder.name} is not empty and holds no run. Choose another folder with --run.")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run's folder. Raises RunFolderError where there is none."""
        folder = cls(path)
        if not folder.job.is_file():
            found = "has no job.toml" if folder.path.is_dir() else "does not exist"
            raise RunFolderError(
                f"{folder.name} is not a run: it {found}. Name a folder that `groupwise train --run` made."
            )
        return folder

    @property
    def job(self) -> Path:
        """The resolved job."""
        return self.path / "job.toml"

    @property
    def events(self) -> Path:
        """One JSON object per step."""
        return self.path / "events.jsonl"

    @property
    def rollouts(self) -> Path:
        """Sampled groups, one JSON object per line."""
        return self.path / "rollouts.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The weights with the best evaluation."""
        return self.checkpoints / "best"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files."""
        return self.path / "tensorboard"

    @property
    def rewards_log(self) -> Path:
        """What reward functions print."""
        return self.path / "rewards.log"

    @property
    def result(self) -> Path:
        """What the run came to."""
        return self.path / "result.json"

    @property
    def lock_file(self) -> Path:
        """Names the process that writes."""
        return self.path / "lock"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing here; the system lets go when this process ends, however it ends.

        Raises RunFolderError naming the other process where the folder is taken.
        """
        try:
            file = open(self.lock_file, "a+")  # noqa: SIM115 - closed below, after what runs under the lock
        except OSError as error:
            raise cannot_write(self.lock_file, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(self._taken()) from error
            except OSError as error:
                raise cannot_write(self.lock_file, error) from error
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
            if self.checkpoints.is_dir():
                from groupwise.store import checkpoint  # brings torch, which a wrong folder is told without

                checkpoint.clear(self.checkpoints)
            yield
            file.truncate(0)

    def _taken(self) -> str:
        try:
            owner = json.loads(self.lock_file.read_text())
            name = f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError):
            # The owner may be between taking the lock and signing it.
            name = "another process"
        return f"{self.name} is in use by {name}. Wait for it, stop it, or choose another folder with --run."

    def write_job(self, job: Mapping[str, Any] | str) -> None:
        """Write `job.toml` from its text or its values; None, which TOML lacks, is left out."""
        write_atomic(self.job, job if isinstance(job, str) else tomlkit.dumps(_without_none(job)))

    def read_job(self) -> dict[str, Any]:
        """The values of `job.toml`. Raises RunFolderError where it cannot be read."""
        try:
            return tomllib.loads(self.job.read_text())
        except (OSError, ValueError) as error:
            raise RunFolderError(f"Cannot read the job of this run, {self.job}: {error}.") from error

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, as a whole."""
        write_atomic(self.result, json.dumps(json.loads(events.encode(result)), indent=2) + "\n")

    def read_result(self) -> dict[str, Any] | None:
        """What `write_result` wrote; None before the run has ended. Raises RunFolderError where it cannot be read."""
        if not self.result.is_file():
            return None
        try:
            return dict(json.loads(self.result.read_text()))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"Cannot read the result of this run, {self.result}: {error}.") from error

    def cut_back(self, step: int | None, rounds: int = 0) -> None:
        """Make the folder what it was at the checkpoint of `step`; None: before the first event.

        `rounds` of a reward model were over then: the event of the next one, at the same step, goes too. Events and
        rollouts after it go, result.json too; later checkpoints, which are damaged, are set aside.
        """
        from groupwise.store import checkpoint

        last = -1 if step is None else step
        events.truncate_to(self.events, last, rounds)
        events.truncate_rollouts(self.rollouts, last)
        checkpoint.set_aside(self.checkpoints, last)
        self.result.unlink(missing_ok=True)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def git_commit() -> str | None:
    """The commit checked out where the command runs, where the user's rewards and jobs live; None outside git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        # No git, no repository, no commit yet, or one that answers too late: a run must not end over this.
        return None
    return found.stdout.strip()
