"""From a job to what samples, and to what judges whether it samples from the policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from groupwise.config import Job
from groupwise.engines.base import Engine
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.processes import PooledEngine
from groupwise.learn.agreement import Guard
from groupwise.wiring.models import Model


def open_engine(job: Job, model: Model, closing: ExitStack) -> Engine:
    """What samples."""
    own = NativeEngine(model.loaded.policy, model.codec, max_live=job.sampling.max_live_outputs)
    engine = PooledEngine(own)
    closing.callback(engine.close)
    return engine


def open_guard(job: Job, model: Model, warn: Callable[[str], None]) -> Guard:
    """What judges whether the sampler draws from the model that is trained."""
    return Guard(model.loaded.policy, warn, corrected=job.objective.importance_sampling != "none")
