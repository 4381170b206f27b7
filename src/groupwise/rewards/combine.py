"""Several rewards to one: an output's reward is the weighted sum of the values that it was given."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TypeVar

from groupwise.averages import mean, std
from groupwise.errors import RewardError
from groupwise.rewards.base import Outcome, Reward, RewardContext, Values
from groupwise.rewards.checks import check_values
from groupwise.rewards.functions.calling import as_number
from groupwise.types import Group, Score, ScoredGroup

Called = TypeVar("Called")
Result = TypeVar("Result")


def score_groups(
    groups: Sequence[Group], rewards: Sequence[Reward], weights: Sequence[float] | None, context: RewardContext
) -> list[ScoredGroup]:
    """Score each output by all rewards: `sum of weight * value` over those that gave it a value, None if none did.

    `Score.parts` holds each reward's own value by its name; a second reward of the same name is `name_2`. Metrics:
    `rewards/<name>/mean` and `/std` (n - 1) over the outputs it scored, absent where it scored none, and
    `rewards/unscored`, the outputs without a reward. Weights default to 1. Without any reward no output is
    scored. Raises RewardError on unusable values.
    """
    if not rewards:  # steps alone are scored
        return [ScoredGroup(group, tuple(Score(None) for _ in group.completions)) for group in groups]
    weights = check_weights(weights, len(rewards))
    names = unique_names([reward.name for reward in rewards])
    columns: dict[str, list[float | None]] = {}
    faults: dict[str, list[str]] = {}
    for name, reward, (values, report) in zip(names, rewards, _called(rewards, groups, context), strict=True):
        given = [as_number(value) for of_group in values for value in of_group]
        checked = check_values(reward.name, groups, given)
        columns[name] = [value for of_group in checked for value in of_group]
        publish(name, reward.name, columns[name], report, context)
        faults[name] = report.faults
    context.outcomes += _outcomes(columns, faults)
    parts = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    scores = iter([Score(weighted_sum(part.values(), weights), parts=part) for part in parts])
    scored = [ScoredGroup(group, tuple(next(scores) for _ in group.completions)) for group in groups]
    context.metrics["rewards/unscored"] = float(sum(reward is None for group in scored for reward in group.rewards))
    return scored


def _outcomes(columns: Mapping[str, Sequence[float | None]], faults: Mapping[str, list[str]]) -> Iterator[Outcome]:
    """What each reward's call came to; nothing where there are no outputs."""
    for name, values in columns.items():
        others = [column for other, column in columns.items() if other != name]
        covered = all(any(value is not None for value in of_output) for of_output in zip(*others, strict=True))
        if values:
            scored = any(value is not None for value in values)
            fault = next(iter(faults[name]), "")
            yield Outcome(f"rewards/{name}", f"Reward `{name}`", scored, fault, bool(others) and covered)


def unique_names(names: Sequence[str]) -> list[str]:
    """Each name, with `_2`, `_3` .. where it is taken."""
    unique: list[str] = []
    for name in names:
        numbered = (name if count == 1 else f"{name}_{count}" for count in itertools.count(1))
        unique.append(next(free for free in numbered if free not in unique))
    return unique


def _called(
    rewards: Sequence[Reward], groups: Sequence[Group], context: RewardContext
) -> list[tuple[Values, RewardContext]]:
    return run_all(rewards, context, lambda reward, report: reward(groups, report))


def run_all(
    rewards: Sequence[Called], context: RewardContext, call: Callable[[Called, RewardContext], Result]
) -> list[tuple[Result, RewardContext]]:
    """What each reward's call gives, and what it reported.

    Rewards with a process of their own work at the same time; the others follow each other in this thread, since
    functions given from Python may share state.
    """
    lock = threading.Lock()

    def warn(message: str) -> None:
        with lock:
            context.warn(message)

    reports = [replace(context, metrics={}, extras={}, faults=[], warn=warn) for _ in rewards]
    own_process = [index for index, reward in enumerate(rewards) if getattr(reward, "own_process", False)]
    # This thread has time for one of them where it has nothing else to do.
    beside = own_process[:-1] if len(own_process) == len(rewards) else own_process
    futures = {index: _begin(partial(call, rewards[index], reports[index])) for index in beside}
    values = {i: call(reward, reports[i]) for i, reward in enumerate(rewards) if i not in futures}
    values |= {index: future.result() for index, future in futures.items()}
    return [(values[index], report) for index, report in enumerate(reports)]


def _begin(call: Callable[[], Result]) -> Future[Result]:
    """Call a reward in a thread that keeps nobody from ending: an executor's would be waited for after Ctrl-C."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="groupwise-reward").start()
    return future


def publish(
    name: str, own_name: str, values: Iterable[float | None], report: RewardContext, context: RewardContext,
    place: str = "rewards",
) -> None:  # fmt: skip
    """Add the numbers of a reward to the step's, under the name that tells it from the others: its mean and std as
    `<place>/<name>/mean`, and what it reported under its `own_name`."""
    own = f"{place}/{own_name}/"
    for key, number in report.metrics.items():
        free = f"{place}/{name}/{key.removeprefix(own)}" if key.startswith(own) or key in context.metrics else key
        context.metrics[free] = number
    for column, entries in report.extras.items():
        context.extras[column if column not in context.extras else f"{name}/{column}"] = entries
    scored = [value for value in values if value is not None]
    if scored:
        context.metrics[f"{place}/{name}/mean"] = mean(scored)
        context.metrics[f"{place}/{name}/std"] = std(scored)


def check_weights(weights: Sequence[float] | None, count: int, kind: str = "reward") -> Sequence[float]:
    """One finite weight for each of `count` functions; 1 each by default. Raises RewardError."""
    assert count > 0, "there is something to weigh"
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise RewardError(f"there are {len(weights)} {kind} weights for {count} {kind} functions; give one for each")
    if not all(map(math.isfinite, weights)):
        raise RewardError(f"{kind} weights must be finite numbers, not {list(weights)}")
    return weights


def weighted_sum(values: Iterable[float | None], weights: Sequence[float]) -> float | None:
    """`sum of weight * value` over the values that are there; None where there is none. Raises RewardError where that
    is beyond the largest float."""
    terms = [weight * value for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(terms) if terms else None
    if total is not None and not math.isfinite(total):
        raise RewardError(
            f"The weighted rewards {terms} of an output add up to {total}, which is not finite: scale the rewards, or "
            "lower their weights."
        )
    return total
