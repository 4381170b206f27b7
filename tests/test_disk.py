"""Whole files or none, and errors that say what would do."""

from __future__ import annotations

import errno
import os
import resource
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


def test_a_file_that_is_too_large_gets_the_advice_of_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = OSError(errno.EFBIG, "")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_000_000, 0))
    assert str(disk.cannot_write(tmp_path, error, 2_000_000)) == (
        f"Cannot write {tmp_path}: file too large: this process may write files of at most 1.0 MB, 2.0 MB are needed. "
        "Raise the limit (ulimit -f) and resume the run: what was saved before is intact."
    )
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, 0))
    assert "the file system takes no larger files. " in str(disk.cannot_write(tmp_path, error))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_the_systems_error_is_found_in_a_librarys_sentence(number: int, tmp_path: Path) -> None:
    found = disk.os_error(Exception(f"I/O error: something (os error {number})"), tmp_path)
    assert found is not None
    assert found.errno == number
    assert disk.os_error(Exception("something else"), tmp_path) is None


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "partial").mkdir()
        (tmp_path / "partial" / "file").write_text(text)
        (tmp_path / "target.replaced").mkdir(exist_ok=True)  # of a kill
        disk.put_in_place(tmp_path / "partial", tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
        assert (tmp_path / "target" / "file").read_text() == text


def test_free_room_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert disk.free_bytes(tmp_path / "not" / "yet") > 0


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GROUPWISE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert disk.cache_folder() == tmp_path / ".cache" / "groupwise"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert disk.cache_folder() == tmp_path / ".cache" / "groupwise", "the specification has it ignored"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert disk.cache_folder() == tmp_path / "xdg" / "groupwise"
    monkeypatch.setenv("GROUPWISE_CACHE", str(tmp_path / "own"))
    assert disk.cache_folder() == tmp_path / "own"


def test_a_user_without_a_home_is_told_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("GROUPWISE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(OSError, match="GROUPWISE_CACHE"):
        disk.cache_folder()
