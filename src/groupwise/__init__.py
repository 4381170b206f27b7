"""Group Relative Policy Optimization for language models.

`groupwise.train(...)` runs a job, `groupwise.objective` holds the mathematics. Names are loaded when first asked for:
they bring torch, which `import groupwise` does not."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from groupwise.errors import GroupwiseError

if TYPE_CHECKING:
    from groupwise import objective
    from groupwise.commands.api import doctor, evaluate, export, label, plan, resume, sample, train, train_reward_model

__version__ = "0.1.0"
__all__ = [
    "GroupwiseError",
    "__version__",
    "doctor",
    "evaluate",
    "export",
    "label",
    "objective",
    "plan",
    "resume",
    "sample",
    "train",
    "train_reward_model",
]

_FUNCTIONS = ("doctor", "evaluate", "export", "label", "plan", "resume", "sample", "train", "train_reward_model")


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module("groupwise.commands.api"), name)
    if name == "objective":
        return importlib.import_module("groupwise.objective")
    raise AttributeError(f"module 'groupwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
