"""Writing so that a kill or a full disk leaves the files before it whole. Standard library only."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import stat
from pathlib import Path

from groupwise.errors import RunFolderError

PARTIAL = ".partial"
"""What is half-written is called so, or ends so."""
REPLACED = ".replaced"
"""What an older folder is called while a newer one takes its place."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def cache_folder() -> Path:
    """Where what can be made again is kept: `$GROUPWISE_CACHE`, else `groupwise` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises OSError where there is no home folder either.
    """
    if own := os.environ.get("GROUPWISE_CACHE"):
        return Path(own)
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if shared.is_absolute():  # others are to be ignored, as the specification says
        return shared / "groupwise"
    try:
        return Path.home() / ".cache" / "groupwise"
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "this user has no home folder; GROUPWISE_CACHE may name another one") from error


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` as a whole: a reader sees the old content or the new. Raises RunFolderError on a full disk."""
    content = data.encode() if isinstance(data, str) else data
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, error, len(content)) from error


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's list of names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a folder that is whole to its place; an older one there gives way. Raises OSError."""
    sync(partial)
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():
        if replaced.exists():
            shutil.rmtree(replaced)  # a kill came before that
        os.replace(target, replaced)
    os.replace(partial, target)
    sync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def os_error(error: Exception, path: Path) -> OSError | None:
    """The system's error that a library, as those written in Rust, has only in its sentence; None where it has none."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else None


def fixed(path: str) -> str:
    """A path that is there as an absolute one, wherever a reward may take this process; anything else as it is."""
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def is_stream(path: str | Path) -> bool:
    """Whether a path is a pipe, a socket or a device: what is read from it is gone."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def cannot_write(path: Path, error: OSError, needed: int = 0) -> RunFolderError:
    """The error for a user whose disk is full or whose folder is closed: path, bytes needed and free, what would do."""
    reason = os.strerror(error.errno).lower() if error.errno else str(error)
    if error.errno in _FULL:
        wanted = f"{in_words(needed)} needed, " if needed else ""
        advice = "Make room and resume the run: what was saved before is intact."
        return RunFolderError(f"Cannot write {path}: {reason} ({wanted}{in_words(free_bytes(path))} free). {advice}")
    if error.errno == errno.EFBIG:
        advice = "Raise the limit (ulimit -f) and resume the run: what was saved before is intact."
        wanted = f", {in_words(needed)} are needed" if needed else ""
        return RunFolderError(f"Cannot write {path}: {reason}: {_file_limit()}{wanted}. {advice}")
    if error.errno in _FORBIDDEN:
        return RunFolderError(f"Cannot write {path}: {reason}. Make the folder writable, or choose another with --run.")
    return RunFolderError(f"Cannot write {path}: {reason}.")


def in_words(count: int) -> str:
    """A number of bytes for people: `1.5 GB`."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _file_limit() -> str:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return "the file system takes no larger files"
    return f"this process may write files of at most {in_words(limit)}"
