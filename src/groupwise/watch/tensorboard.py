"""The events of a run as TensorBoard scalars."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groupwise.disk import cannot_write
from groupwise.errors import ConfigError


class TensorBoardSink:
    """Writes every finite number of an event as a scalar, at the event's step.

    On resume, `last_step` is the checkpoint's step: what the earlier process wrote after it is hidden.
    Raises ConfigError where the package `tensorboard` is missing.
    """

    def __init__(self, folder: Path, last_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "[watch] tensorboard = true needs a package that is not installed. "
                "Run `pip install 'groupwise[tensorboard]'`, or set watch.tensorboard=false."
            ) from error
        purge_step = None if last_step is None else last_step + 1
        self._folder = folder
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, event: Mapping[str, Any]) -> None:
        """Write one event's numbers. Raises RunFolderError where they cannot be written."""
        found = {name: value for name, value in event.items() if name != "step" and isinstance(value, int | float)}
        with self._writing():
            for name, value in found.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, event["step"])

    def close(self) -> None:
        """Write what is buffered and close the file. Calling it twice is fine. Raises as `write` does."""
        with self._writing():
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A thread of the library's own writes, and what it meets is raised by a later call."""
        try:
            yield
        except OSError as error:
            raise cannot_write(self._folder, error) from error
