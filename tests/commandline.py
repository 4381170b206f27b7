"""The command line without a process of its own: what it prints, and how it ends."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from groupwise.cli import main


class Ended(NamedTuple):
    """Exit status, standard output, standard error."""

    status: int
    out: str
    err: str


def call(*arguments: str | Path) -> Ended:
    """`groupwise ARGUMENTS`, here and now."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["groupwise", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ended(status, out.getvalue(), err.getvalue())
