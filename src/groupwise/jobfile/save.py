"""A job as the run folder keeps it, and what may change when that run is resumed."""

from __future__ import annotations

from typing import Any, NamedTuple

import tomlkit

from groupwise.config import Job, is_resumable, knobs


class Difference(NamedTuple):
    """A knob that two jobs set differently: `Difference("train.steps", 100, 200, resumable=True)`."""

    key: str
    old: Any
    new: Any
    resumable: bool


def to_toml(job: Job) -> str:
    """The whole job as TOML, every key written out; reading it gives an equal job."""
    return tomlkit.dumps(job.model_dump(exclude_none=True))


def differences(old: Job, new: Job) -> list[Difference]:
    """The knobs in which the jobs differ, in the order of the file."""
    pairs = ((key, field, value(old, key), value(new, key)) for key, field in knobs().items())
    return [Difference(key, was, now, is_resumable(field)) for key, field, was, now in pairs if was != now]


def resumable_keys() -> list[str]:
    """The keys that may differ when a run is resumed; any other difference needs a new run."""
    return [key for key, field in knobs().items() if is_resumable(field)]


def value(job: Job, key: str) -> Any:
    """The job's value of a dotted key: `value(job, "train.steps")`."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(job, section) if section else job, name)
