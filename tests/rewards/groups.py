"""Groups to be scored, written as texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from groupwise.rewards.base import RewardContext
from groupwise.types import Completion, Group, GroupKey, Message, Prompt


def group(
    *texts: str, prompt: str | list[Message] = "2+2=", row: Mapping[str, Any] | None = None, slot: int = 0
) -> Group:
    """One prompt and its outputs; the token ids of an output are its characters."""
    outputs = tuple(Completion(tuple(map(ord, text)), text, (0.0,) * len(text), "stop") for text in texts)
    return Group(GroupKey(0, slot, f"row-{slot}"), Prompt(f"row-{slot}", prompt, (1, 2), row or {}), outputs)


def listening(step: int = 3, total_steps: int = 10) -> tuple[RewardContext, list[str]]:
    """A context, and the warnings that it will have shown."""
    told: list[str] = []
    return RewardContext(step, total_steps, warn=told.append), told


def flat(values: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Values without their groups."""
    return [value for of_group in values for value in of_group]
