"""Streams that are lost while they are written to."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from groupwise.streams import OUT, Output, kept, output


@pytest.fixture
def closed_pipe() -> Iterator[TextIO]:
    """The end of a pipe that nobody reads from any more."""
    reader, writer = os.pipe()
    os.close(reader)
    yield from _opened(writer)


def _opened(descriptor: int) -> Iterator[TextIO]:
    file = os.fdopen(descriptor, "w")
    yield file
    _close(file)


def _close(file: TextIO) -> None:
    with contextlib.suppress(OSError):
        file.close()  # what it holds cannot be written; the descriptor is closed all the same


def test_a_line_that_went_out_is_told_from_one_that_did_not(closed_pipe: TextIO) -> None:
    good, out = Output(io.StringIO(), OUT), Output(closed_pipe, OUT)
    assert good.put("line")
    assert isinstance(good.stream, io.StringIO)
    assert good.stream.getvalue() == "line\n"
    assert not out.put("line")
    assert not out.put("line")
    assert (out.lost, out.left) == ("broken pipe", True)


def test_a_full_disk_is_not_a_reader_who_left() -> None:
    full = open("/dev/full", "w")  # noqa: SIM115 - it cannot be closed without an error
    out = Output(full, OUT)
    assert not out.put("line")
    assert (out.lost, out.left) == ("no space left on device", False)
    _close(full)


def test_a_closed_stream_is_lost_from_the_start() -> None:
    out = Output(None, OUT)
    assert not out.put("line")
    assert (out.lost, out.left, out.isatty()) == ("it is closed", False, False)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        out.fileno()
    file = io.StringIO()
    file.close()
    assert not Output(file, OUT).put("line")


def test_a_terminal_whose_window_was_closed_has_left() -> None:
    window, terminal = pty.openpty()
    file = os.fdopen(terminal, "w")
    out = Output(file, OUT)
    assert out.isatty()
    os.close(window)
    assert not out.put("line")
    assert (out.lost, out.left) == ("input/output error", True)
    _close(file)


def test_an_input_output_error_is_a_lost_terminal_only_on_a_terminal() -> None:
    class Broken(io.StringIO):
        terminal = True

        def isatty(self) -> bool:
            return self.terminal

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "")

    out = Output(Broken(), OUT)
    out.put("line")
    assert out.left
    Broken.terminal = False
    out = Output(Broken(), OUT)
    out.put("line")
    assert not out.left
    assert out.lost == "input/output error"


def test_no_character_is_lost_to_an_encoding() -> None:
    raw = io.BytesIO()
    out = Output(io.TextIOWrapper(raw, encoding="ascii"), OUT)
    assert out.put("0.27 → 😀 \udc80")
    assert raw.getvalue() == b"0.27 \\u2192 \\U0001f600 \\udc80\n"


def test_an_output_is_wrapped_once() -> None:
    out = output(io.StringIO(), OUT)
    assert output(out, OUT) is out


def test_all_that_is_printed_is_kept_from_raising_and_the_streams_are_given_back(
    closed_pipe: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    with kept() as (out, _):
        sys.stdout.write("one\n")
        sys.stdout.write("two\n")
        sys.stdout.flush()
        assert out.lost == "broken pipe"
    assert sys.stdout is closed_pipe
    closed_pipe.write("three")
    closed_pipe.flush()  # it leads nowhere now


def test_a_closed_descriptor_is_not_given_to_the_next_file(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:  # pragma: no cover - in a process of its own
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
        with kept() as (out, _):
            file = open(tmp_path / "file", "w")  # noqa: SIM115
            out.write("lost")
            os._exit(0 if file.fileno() > 2 and out.lost == "it is closed" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
