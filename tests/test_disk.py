"""Whole files or none, and errors that say what would do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from groupwise import disk
from groupwise.errors import RunFolderError


@pytest.mark.parametrize(
    "count, shown",
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2_340_000_000, "2.3 GB"), (5e15, "5000.0 TB")],
)
def test_bytes_in_words(count: int, shown: str) -> None:
    assert disk.in_words(count) == shown


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    disk.write_atomic(path, "ü")
    disk.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_replacement_that_fails_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write_atomic(tmp_path / "file", "one")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFolderError, match=r"file: no space left on device \(3 bytes needed, .* free\)\. Make room"):
        disk.write_atomic(tmp_path / "file", "two")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["one"]


def test_a_closed_folder_and_other_faults_are_told_apart(tmp_path: Path) -> None:
    closed = str(disk.cannot_write(tmp_path, OSError(errno.EACCES, "")))
    assert closed.endswith("permission denied. Make the folder writable, or choose another with --run.")
    assert str(disk.cannot_write(tmp_path, OSError(errno.EIO, ""))).endswith(": input/output error.")


def test_free_room_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert disk.free_bytes(tmp_path / "not" / "yet") > 0
