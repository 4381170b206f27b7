"""The memory of this process on a CPU: what is freed is kept for what is asked for next.

glibc hands large pieces back to the system as soon as they are freed, and the system fills every page of the next one
with zeros when it is first touched. A step frees and asks again for gradients, laid-out weights and logits, gigabytes
for a model of 0.5B parameters: there a fourth of all its computing time went into such pages (LOG.md)."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Names of settings in glibc's `malloc.h`."""


class _Process:
    """Whose this process is."""

    ours = False


def own_process() -> None:
    """Say that this process is ours alone, as the command line's is: a program that imports the library keeps its own
    settings of memory unless it calls this."""
    _Process.ours = True


def keep_freed_memory(device: object) -> bool:
    """Have this process keep what it frees, where it is ours and computes on a CPU; returns whether it does so from now
    on. `device` is torch's, or its name.

    The most that it holds at once hardly changes; what it holds between steps stays at that. Elsewhere than with glibc
    nothing is done, nor where the environment has settings for it (`MALLOC_..._`, `GLIBC_TUNABLES`).
    """
    if not _Process.ours:
        return False
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if str(device).partition(":")[0] != "cpu" or told or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Never trim; no pieces of their own for large needs; one heap for all threads, since others hold little and shrink.
    settings = ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in settings)
