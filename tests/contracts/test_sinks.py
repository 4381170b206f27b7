"""What every sink promises: an event a step, whatever is in it, and an end that may come twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from groupwise.store.events import EventsFile, Sink
from groupwise.watch.tensorboard import TensorBoardSink
from groupwise.watch.terminal import make_terminal
from tests.doubles import MemorySink

SINKS: dict[str, Callable[[Path], Sink]] = {
    "memory": lambda at: MemorySink(),
    "events": lambda at: EventsFile(at / "events.jsonl"),
    "tensorboard": lambda at: TensorBoardSink(at / "tensorboard", None),
    "terminal": lambda at: make_terminal("plain", total_steps=2, title="x"),
}


@pytest.mark.parametrize("make", SINKS.values(), ids=SINKS)
def test_events_of_all_kinds_are_taken(make: Callable[[Path], Sink], tmp_path: Path) -> None:
    sink = make(tmp_path)
    sink.write({"step": 0, "eval/reward": 0.5})
    sink.write({"step": 1, "reward": float("nan"), "loss": 1e300, "iteration": 0, "mine/of a reward": 2})
    sink.write({"step": 2})
    sink.close()
    sink.close()
