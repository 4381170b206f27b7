"""The TensorBoard sink writes what the event holds, and says what to install."""

from __future__ import annotations

import errno
import math
import sys
from pathlib import Path

import pytest

from groupwise.errors import ConfigError, RunFolderError
from groupwise.watch.tensorboard import TensorBoardSink


def test_numbers_arrive_at_their_step_and_the_rest_stays_out(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        sink.write({"step": step, "reward": step / 2, "kl": None, "loss": math.nan})
    sink.close()
    sink.close()
    resumed = TensorBoardSink(tmp_path, last_step=2)
    resumed.write({"step": 3, "reward": 9.0})
    resumed.close()
    found = loader.EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["scalars"] == ["reward"]
    assert [(event.step, event.value) for event in found.Scalars("reward")] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_full_disk_is_told_with_its_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    sink = TensorBoardSink(tmp_path)

    def full(*ignored: object) -> None:
        raise OSError(errno.ENOSPC, "")

    for name in ("add_scalar", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(sink._writer, name, full)
            with pytest.raises(RunFolderError, match=r"no space left on device.*Make room"):
                sink.write({"step": 1, "reward": 1.0}) if name == "add_scalar" else sink.close()
    sink.close()


def test_a_missing_package_is_named_with_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'groupwise\[tensorboard\]'"):
        TensorBoardSink(tmp_path)
