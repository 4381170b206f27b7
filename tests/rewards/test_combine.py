"""Several rewards, weighted: values, parts, names and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from groupwise.errors import RewardError
from groupwise.rewards.base import Reward, RewardContext, Values
from groupwise.rewards.combine import score_groups, unique_names
from groupwise.rewards.functions.load import load_reward
from groupwise.types import Group
from tests.rewards.groups import group, listening

GROUPS = [group("a", "bb", slot=0), group("ccc", "dddd", slot=1)]


class Scripted:
    """Gives the values that it was made with, whatever the outputs."""

    def __init__(self, name: str, values: Any) -> None:
        self.name = name
        self.values = values

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Values:
        context.metrics["logged"] = 7.0
        context.metrics[f"rewards/{self.name}/failed"] = 0.0
        context.extras["column"] = list(range(4))
        return self.values  # type: ignore[no-any-return]

    def close(self) -> None: ...


@contextmanager
def loaded(*functions: Any) -> Iterator[list[Reward]]:
    rewards = [load_reward(function) for function in functions]
    yield rewards
    for reward in rewards:
        reward.close()


def test_the_reward_is_the_weighted_sum_of_what_was_scored() -> None:
    context, _ = listening()
    first = Scripted("first", [[1.0, None], [0.0, None]])
    second = Scripted("second", [[10.0, 20.0], [None, None]])
    scored = score_groups(GROUPS, [first, second], [0.5, -0.1], context)
    assert [group.rewards for group in scored] == [[0.5 - 1.0, -2.0], [0.0, None]]
    assert [group.group for group in scored] == GROUPS
    assert scored[0].scores[1].parts == {"first": None, "second": 20.0}
    assert scored[1].scores[0].parts == {"first": 0.0, "second": None}
    assert context.metrics["rewards/unscored"] == 1.0


def test_metrics_are_over_scored_outputs() -> None:
    context, _ = listening()
    score_groups(GROUPS, [Scripted("first", [[1.0, None], [0.0, 2.0]])], None, context)
    assert context.metrics["rewards/first/mean"] == 1.0
    assert context.metrics["rewards/first/std"] == 1.0  # sqrt((0 + 1 + 1) / (3 - 1))


def test_what_scored_nothing_has_no_mean() -> None:
    context, _ = listening()
    scored = score_groups(GROUPS, [Scripted("first", [[None, None], [None, None]])], None, context)
    assert [group.rewards for group in scored] == [[None, None], [None, None]]
    assert "rewards/first/mean" not in context.metrics
    assert context.metrics["rewards/unscored"] == 4.0


def test_rewards_of_one_name_are_told_apart() -> None:
    assert unique_names(["a", "a", "b", "a_2", "a"]) == ["a", "a_2", "b", "a_2_2", "a_3"]
    context, _ = listening()
    ones, twos = Scripted("same", [[1.0] * 2] * 2), Scripted("same", [[2.0] * 2] * 2)
    scored = score_groups(GROUPS, [ones, twos], None, context)
    assert scored[0].scores[0].parts == {"same": 1.0, "same_2": 2.0}
    assert {key for key in context.metrics if key.endswith(("failed", "mean", "logged"))} == {
        "logged",
        "rewards/same_2/logged",
        "rewards/same/failed",
        "rewards/same_2/failed",
        "rewards/same/mean",
        "rewards/same_2/mean",
    }
    assert list(context.extras) == ["column", "same_2/column"]


@pytest.mark.parametrize(
    "values, message",
    [
        ([[1.0, math.nan], [1.0, 1.0]], "`mine` returned nan"),
        ([[1.0, "1"], [1.0, 1.0]], "`mine` returned '1', which is of type str"),
        ([[1.0, 1.0], [1.0]], "returned 3 values for 4 outputs"),
    ],
)
def test_values_of_any_reward_are_checked(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_groups(GROUPS, [Scripted("mine", values)], None, listening()[0])


@pytest.mark.parametrize(
    "weights, message", [([1.0, 2.0], "2 reward weights for 1 reward functions"), ([math.nan], "must be finite")]
)
def test_weights_are_checked(weights: list[float], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_groups(GROUPS, [Scripted("mine", [[0.0, 0.0]] * 2)], weights, listening()[0])


def test_workers_and_callables_mix_and_workers_run_together(tmp_path: Path) -> None:
    # Each of the two processes waits until the other has been called: one after the other they would run out of time.
    (tmp_path / "pair.py").write_text(
        "import pathlib, time\n"
        "def meet(me, other):\n"
        f"    folder = pathlib.Path({str(tmp_path)!r})\n"
        "    (folder / me).touch()\n"
        "    while not (folder / other).exists(): time.sleep(0.005)\n"
        "def left(completions):\n"
        "    meet('left', 'right'); return [1.0] * len(completions)\n"
        "def right(completions):\n"
        "    meet('right', 'left'); return [2.0] * len(completions)\n"
    )

    def length(prompt: str, completion: str) -> float:
        return float(len(completion))

    context, told = listening()
    with loaded(f"{tmp_path}/pair.py:left", length, f"{tmp_path}/pair.py:right") as rewards:
        scored = score_groups(GROUPS, rewards, [1.0, 10.0, 100.0], context)
    assert told == []
    assert [group.rewards for group in scored] == [[211.0, 221.0], [231.0, 241.0]]
    assert list(scored[0].scores[0].parts) == ["left", "length", "right"]


def test_an_unusable_value_of_a_worker_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def bad(completions): return ['1'] * len(completions)\n")
    with loaded(f"{tmp_path}/bad.py:bad", lambda prompt, completion: 1.0) as rewards, pytest.raises(RewardError):
        score_groups(GROUPS, rewards, None, listening()[0])


def test_no_groups_give_no_scores() -> None:
    context, _ = listening()
    assert score_groups([], [Scripted("mine", [])], None, context) == []
    assert context.metrics["rewards/unscored"] == 0.0
