"""Numbers, durations and verdicts in the words that people read on a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

ABSENT = "-"
ROUND = "reward_model/round"
"""In the event of a round of the reward model that a run trains: its number. Such an event has no step of its own."""
_BARS = "▁▂▃▄▅▆▇█"


def number(value: float | None) -> str:
    """Three significant digits (`0.0123`, `1.00`), whole from 1000 (`12,400`), `1.23e+15` beyond, a dash for none."""
    if value is None:
        return ABSENT
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1e12:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def percent(share: float | None) -> str:
    """`3%`, with a decimal below 10 where it says something: `0.4%`."""
    if share is None or not math.isfinite(share):
        return ABSENT if share is None else str(share)
    return f"{share:.0%}" if share in (0.0, 1.0) or share >= 0.1 else f"{share:.1%}"


def duration(seconds: float | None) -> str:
    """`3.4 s`, `42 s`, `2 min 10 s`, `1 h 4 min`."""
    if seconds is None:
        return ABSENT
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def one_line(text: str) -> str:
    """Text that cannot move the cursor: line breaks shown as arrows, other control characters as dots."""
    return "".join(character if character.isprintable() else "·" for character in text.replace("\n", " ↵ "))


def sparkline(values: list[float]) -> str:
    """One bar per value, between the smallest and the largest; all at half height where they are equal."""
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    return "".join(_bar(value, low, high) for value in values)


def _bar(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return " "
    # Halved, since the difference of two floats may be beyond the largest one.
    return _BARS[round(7 * ((value / 2 - low / 2) / (high / 2 - low / 2)))] if high / 2 > low / 2 else _BARS[3]


def is_step(event: Mapping[str, Any]) -> bool:
    """Whether an event tells of a training step, rather than of an evaluation alone."""
    return "reward" in event or "loss" in event or ("reward_model/loss" in event and not is_round(event))


def is_round(event: Mapping[str, Any]) -> bool:
    """Whether an event tells of a round of the reward model that a run trains, between two steps."""
    return ROUND in event


def of_reward_model(event: Mapping[str, Any]) -> bool:
    """Whether an event tells of a step of a reward model's own training."""
    return (
        not is_round(event)
        and not ("reward" in event or "loss" in event)
        and any(name.startswith("reward_model/") for name in event)
    )


def why(event: Mapping[str, Any]) -> str | None:
    """A sentence on a step that teaches nothing, or None where some group's rewards differ."""
    if event.get("frac_advantage_zero", event.get("frac_reward_zero_std")) != 1.0:
        return None
    reward, step_reward = event.get("reward"), event.get("step_reward")
    if all(value is None or math.isnan(value) for value in (reward, step_reward)):
        return "No output of this step was scored, so nothing is learned in it. The warnings say why."
    what = "outputs" if step_reward is None else "outputs, or all steps,"
    cause = f"in every group all {what} earned the same reward, so every advantage is 0"
    if event.get("loss"):
        return f"The rewards teach nothing in this step: {cause}. What is left of the loss is not theirs (the KL term)."
    said = f"Nothing is learned in this step: {cause} and the loss exactly 0."
    missing = sum(number for name, number in event.items() if _is_fault(name) and number)
    if missing:
        return f"{said} {missing:,.0f} outputs or calls of it failed or were not scored: the warnings say why."
    spread = [value for name, value in event.items() if _SPREAD.fullmatch(name) and value is not None]
    if spread and not any(spread):
        return (
            f"{said} All outputs of the step earned the same ({reward if step_reward is None else step_reward:g}). "
            "Where that goes on, look in rollouts.jsonl whether the reward reads the outputs as it should."
        )
    cure = "Prompts that are neither too easy nor too hard, more outputs per prompt or a finer reward help."
    return f"{said} This is not a fault. {cure}"


_FAULTS = ("/failed", "/timeouts", "/unread", "rewards/unscored", "steps/unscored", "updates/refused")
_SPREAD = re.compile(r"(step_)?rewards/[^/]+/std")


def _is_fault(name: str) -> bool:
    """Whether a metric counts what went wrong in a step."""
    return name.endswith(_FAULTS) and not name.startswith(("eval/", "reward_model/"))
