"""What is freed is kept for what is asked for next."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from groupwise.cpu import malloc
from groupwise.cpu.malloc import keep_freed_memory

PROGRAM = """
import resource, sys, threading
import torch
from groupwise.cpu.malloc import keep_freed_memory, own_process
if sys.argv[1] == "keep":
    own_process()
    assert keep_freed_memory("cpu")
elif sys.argv[1] == "imported":
    assert not keep_freed_memory("cpu")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (1 << 25, 1 << 24):  # 128 and 64 MB
        torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def repeat():
    print(min(faults() for _ in range(12)))
repeat()
thread = threading.Thread(target=repeat)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is asked")
def test_memory_that_was_freed_is_not_new_again_in_any_thread() -> None:
    untold = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}

    def pages_touched(what: str) -> list[int]:
        command = [sys.executable, "-c", PROGRAM, what]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=untold)
        return [int(line) for line in run.stdout.split()]

    assert pages_touched("keep") == pytest.approx([0, 0], abs=50)
    assert min(pages_touched("imported")) > 90, "a process that only imports the library is not ours to change"
    assert min(pages_touched("leave")) > 90  # pages of 2 MB at most, without which this would test nothing


def test_a_gpu_leaves_memory_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc._Process, "ours", True)
    assert not keep_freed_memory("cuda")


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_in_the_environment_win(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    monkeypatch.setattr(malloc._Process, "ours", True)
    monkeypatch.setattr("ctypes.CDLL", lambda path: pytest.fail("the heap's settings were touched"))
    assert not keep_freed_memory("cpu")
