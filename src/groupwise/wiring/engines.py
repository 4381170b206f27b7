"""From a job to what samples, and to what judges whether it samples from the policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch

from groupwise.config import Job
from groupwise.cpu.forks import may_fork
from groupwise.engines.base import Engine
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.processes import PooledEngine
from groupwise.errors import ConfigError
from groupwise.learn.agreement import Guard
from groupwise.wiring.models import Model


def open_engine(job: Job, model: Model, closing: ExitStack) -> Engine:
    """What samples. Raises ConfigError where it cannot here."""
    policy = model.loaded.policy
    own = NativeEngine(policy, model.codec, max_live=job.sampling.max_live_outputs)
    engine = PooledEngine(own) if in_processes(job, policy.device) else own
    closing.callback(engine.close)
    return engine


def in_processes(job: Job, device: torch.device) -> bool:
    """Whether a job is sampled by several processes where there is enough to sample. Raises ConfigError where it asks
    for that and cannot have it."""
    possible = device.type == "cpu" and may_fork()
    if job.engine.kind == "processes" and not possible:
        raise ConfigError(
            f'`engine.kind` = "processes" has copies of this process sample, which is for models on a CPU, on Linux; '
            f'this one is on {device}. Take "native", or leave it out.'
        )
    return possible and job.engine.kind != "native"


def open_guard(job: Job, model: Model, warn: Callable[[str], None]) -> Guard:
    """What judges whether the sampler draws from the model that is trained."""
    return Guard(model.loaded.policy, warn, corrected=job.objective.importance_sampling != "none")
