"""Standard streams of a command that are lost under way: called in its process, before it begins."""

from __future__ import annotations

import os
import pty
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LEFT = Path("left")
Loss = Literal["reader", "window", "full", "closed"]


@dataclass
class Losing:
    """Has the streams `descriptors` lost: a pipe whose `reader` goes or a terminal whose `window` closes once `until`
    was written (at once where it is empty), a `full` disk, or a stream that is `closed` from the start. The file `LEFT`
    says that it is so."""

    loss: Loss
    descriptors: tuple[int, ...] = (1,)
    until: str = ""

    def __call__(self) -> None:
        LEFT.unlink(missing_ok=True)
        if self.loss == "closed":
            self._close()
            return
        if self.loss == "full":
            here, other = os.open("/dev/full", os.O_WRONLY), None
            LEFT.touch()
        else:
            reader, here = pty.openpty() if self.loss == "window" else os.pipe()
            other = threading.Thread(target=self._read, args=(reader,), daemon=True)
            os.environ["TERM"] = "xterm-256color"
        for descriptor in self.descriptors:
            os.dup2(here, descriptor)
        os.close(here)
        if other is not None:
            other.start()
        if other is not None and not self.until:
            other.join()

    def _close(self) -> None:
        LEFT.touch()
        for descriptor in self.descriptors:
            os.close(descriptor)
            setattr(sys, {0: "stdin", 1: "stdout", 2: "stderr"}[descriptor], None)

    def _read(self, reader: int) -> None:
        seen = b""
        while self.until.encode() not in seen:
            seen += os.read(reader, 4096)
        os.close(reader)
        LEFT.touch()
