"""Which engine a job gets."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from groupwise.config import Job
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.processes import PooledEngine
from groupwise.errors import ConfigError
from groupwise.wiring import engines
from tests.engines.policies import CODEC, make_policy


def opened(kind: str) -> Any:
    model: Any = SimpleNamespace(loaded=SimpleNamespace(policy=make_policy()), codec=CODEC)
    with ExitStack() as closing:
        return engines.open_engine(Job.model_validate({"engine": {"kind": kind}}), model, closing)


def test_a_cpu_samples_by_processes_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for possible, kinds in ((True, {"auto": PooledEngine, "processes": PooledEngine}), (False, {"auto": NativeEngine})):
        monkeypatch.setattr(engines, "may_fork", lambda possible=possible: possible)
        for kind, expected in {**kinds, "native": NativeEngine}.items():
            assert type(opened(kind)) is expected


@pytest.mark.parametrize(("device", "forks"), [("cuda", True), ("cpu", False)])
def test_processes_that_cannot_be_are_refused(device: str, forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "may_fork", lambda: forks)
    job = Job.model_validate({"engine": {"kind": "processes"}})
    with pytest.raises(ConfigError, match=f'`engine.kind` = "processes" .* this one is on {device}. Take "native"'):
        engines.in_processes(job, torch.device(device))
