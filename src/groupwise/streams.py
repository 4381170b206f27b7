"""Standard output and error, which may be lost while a command runs: a closed pipe or terminal, a full disk. Standard
library only."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

OUT, ERR = "standard output", "standard error"
_READER_LEFT = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN)
_TERMINAL_LEFT = (errno.EIO, errno.ENXIO, errno.ENODEV)


class Output(io.TextIOBase):
    """A text stream that is written to for as long as that is possible; it raises nothing.

    `lost` says why no more can be written, and is None before. `left`: because whoever read it has gone (a pipe or a
    terminal that closed), not because it could not take it. Characters that the encoding lacks become escapes.
    """

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self.stream, self.name = stream, name
        self.lost: str | None = "it is closed" if stream is None else None
        self.left = False
        self.is_all = True
        """Whether what is written here is kept nowhere else. A run, whose files have it all, says no."""
        self._terminal = self._asked(lambda file: file.isatty())
        self._device = self._asked(lambda file: stat.S_ISCHR(os.fstat(file.fileno()).st_mode))

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream; UTF-8 where it names none."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write and return the number of characters, also where they are lost."""
        if self.lost is None and self.stream is not None:
            with self._losing():
                self.stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Hand what was written to the system."""
        if self.lost is None and self.stream is not None:
            with self._losing():
                self.stream.flush()

    def put(self, line: str) -> bool:
        """Write a line at once, and tell whether it went out."""
        self.write(line + "\n")
        self.flush()
        return self.lost is None

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            gone = _READER_LEFT + (_TERMINAL_LEFT if self._terminal or self._device else ())
            self.left = error.errno in gone
            self.lost = os.strerror(error.errno).lower() if error.errno else str(error)
        except ValueError as error:  # Python's own file object was closed
            self.lost = str(error)

    def writable(self) -> bool:
        """Always: what cannot be written is lost."""
        return True

    def isatty(self) -> bool:
        """Whether it is a terminal, or was one before it was lost."""
        return self._terminal

    def _asked(self, question: Callable[[TextIO], bool]) -> bool:
        with suppress(OSError, ValueError):
            return self.stream is not None and question(self.stream)
        return False

    def fileno(self) -> int:
        """The system's number of it. Raises OSError where it has none."""
        if self.stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self.stream.fileno()


def output(stream: TextIO | None, name: str) -> Output:
    """`stream`, which may be closed (None), as an `Output`; one that is an `Output` already is returned as it is."""
    return stream if isinstance(stream, Output) else Output(stream, name)


@contextmanager
def kept() -> Iterator[tuple[Output, Output]]:
    """Have all that this process writes to standard output and error go to two `Output`s, which are given.

    Where one of the first three descriptors is closed, it is made to lead nowhere: else the next file to be opened
    would get its number, and whatever somebody prints.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
    before = sys.stdout, sys.stderr
    out, err = output(sys.stdout, OUT), output(sys.stderr, ERR)
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
        for one in (out, err):
            if one.lost is not None:
                _lead_nowhere(one)


def _lead_nowhere(lost: Output) -> None:
    """Python tries once more at its end to write what it holds, and would complain."""
    with suppress(OSError, ValueError):
        descriptor, nowhere = lost.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
