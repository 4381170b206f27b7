"""Labels on disk: `labels.jsonl`, and beside it `labels.json`, which says what made it and how far it is."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groupwise.disk import cannot_write, sync, write_atomic
from groupwise.errors import ConfigError, RunFolderError
from groupwise.reward_models.monte_carlo import Labelled
from groupwise.store.events import LineFile, encode
from groupwise.wording import shown

COUNTED = ("outputs", "steps", "right", "left_out", "continuations", "tokens")
"""What is counted over the blocks: `right` are labels above one half, `left_out` outputs that could not be labelled."""


class LabelFile:
    """Lines of labels, written block by block. `so_far` has the number of whole blocks, their bytes, and `COUNTED`."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        """Name a new file, or one that was begun with the same `made_by`, which has the completer's `weights`.

        Raises ConfigError where it was made by something else, or where that cannot be told.
        """
        if path.suffix != ".jsonl":
            raise ConfigError(f"The labels are lines of JSON: name a file that ends in .jsonl, not {path}.")
        self.path, self.state = path, path.with_suffix(".json")
        self.made_by = json.loads(encode(made_by))
        self.so_far: dict[str, int] = dict.fromkeys(("blocks", "bytes", *COUNTED), 0)
        if self.state.exists():
            self._go_on()
        elif path.exists() and path.stat().st_size:
            raise ConfigError(f"{path} is there, and no {self.state.name} says what made it. Name another file.")

    def _go_on(self) -> None:
        try:
            found = json.loads(self.state.read_text())
            before, self.so_far = found["made_by"], found["so_far"]
            short = not self.path.exists() or self.path.stat().st_size < self.so_far["bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.state} cannot be read: {error!r}. Name another file.") from error
        changed = [key for key in {**before, **self.made_by} if before.get(key) != self.made_by.get(key)]
        if changed:
            then, now = (shown(one.get(changed[0])) for one in (before, self.made_by))
            raise ConfigError(
                f"{self.path} was begun with {changed[0]} = {then}, and this is {now}. Name another file, or give the "
                "command as it was."
            )
        if short:
            raise ConfigError(f"{self.path} is shorter than {self.state.name} says. Remove both, or name another file.")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Cut the file back to its last whole block, and keep other processes from it.

        Raises RunFolderError where one has it, or where it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(self.path, "ab")  # noqa: SIM115 - closed below, after what runs under the lock
        except OSError as error:
            raise cannot_write(self.path, error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.truncate(self.path, self.so_far["bytes"])
            except BlockingIOError as error:
                raise RunFolderError(f"{self.path} is being written by another process. Wait for it.") from error
            except OSError as error:
                raise cannot_write(self.path, error) from error
            # From the first line on the file has somebody to say what it is.
            self._save()
            self._lines = LineFile(self.path)
            try:
                yield
            finally:
                self._lines.close()

    def add(self, labelled: Sequence[Labelled], soft: bool, drawn: Mapping[str, int]) -> None:
        """Write a block; `drawn` are its continuations and tokens."""
        for one in labelled:
            known = [label for label in one.labels if label is not None]
            if len(known) < len(one.labels):
                self.so_far["left_out"] += 1
                continue
            self._lines.append(encode({**one.row(soft), "completer": self.made_by["completer"]["weights"]}))
            self.so_far["outputs"] += 1
            self.so_far["steps"] += len(known)
            self.so_far["right"] += sum(label > 0.5 for label in known)
        sync(self.path)
        for name, count in drawn.items():
            self.so_far[name] += count
        self.so_far |= {"blocks": self.so_far["blocks"] + 1, "bytes": self._lines.size}
        self._save()

    def _save(self) -> None:
        state = {"made_by": self.made_by, "so_far": self.so_far}
        write_atomic(self.state, json.dumps(state, indent=2, ensure_ascii=False) + "\n")
