"""What a job file cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PYTHON_PREFIX = "python:"
"""Marks, in a job, what was handed over as a Python object and cannot be named in a file."""
Rows = Iterable[Mapping[str, Any]]
Splits = Mapping[str, Any]
"""Several data sets, by the names of their splits."""


@dataclass(frozen=True)
class PythonObjects:
    """What a job file cannot hold: objects from Python, and the consent to run a model's own code."""

    rewards: Sequence[Callable[..., Any]] = ()
    rows: Rows | Splits | None = None
    eval_rows: Rows | Splits | None = None
    trust_remote_code: bool = False
    step_rewards: Sequence[Callable[..., Any]] = ()
    verifier: Sequence[Callable[..., Any]] = ()
    judges: bool = False
    """Whether `rewards` are the verifier, which stands in their place where held-out outputs are judged."""
