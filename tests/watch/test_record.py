"""What a step leaves behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from groupwise.rewards.base import RewardContext, Values
from groupwise.rewards.scorer import Scorer
from groupwise.run.rollouts import summary
from groupwise.store.events import RolloutsFile
from groupwise.types import Group
from groupwise.watch.record import Record, Recorder, frac_zero
from groupwise.watch.terminal import make_terminal
from tests.doubles import MemorySink, ScriptedReward, scored


def a_watch(sink: MemorySink, rollouts: RolloutsFile | None = None) -> Recorder:
    return Recorder([sink], make_terminal("quiet", total_steps=3, title=""), rollouts)


def test_phases_add_up() -> None:
    record = Record(1)
    for _ in range(2):
        with record.time("update"):
            pass
    once = record.metrics["time/update"]
    with record.time("update"):
        pass
    assert record.metrics["time/update"] > once > 0


def test_a_step_that_fails_leaves_no_event() -> None:
    sink = MemorySink()
    with pytest.raises(ZeroDivisionError), a_watch(sink).step(1):
        raise ZeroDivisionError
    assert sink.events == []


def test_what_happens_between_two_steps_goes_into_the_next_event() -> None:
    sink = MemorySink()
    watch = a_watch(sink)
    watch.carry({"time/checkpoint": 2.0})
    for step in (1, 2):
        with watch.step(step):
            pass
    assert [event.get("time/checkpoint") for event in sink.events] == [2.0, None]


def test_the_speed_is_that_of_the_step() -> None:
    sink = MemorySink()
    with a_watch(sink).step(1) as record:
        record.metrics["tokens/sampled"] = 100.0
    [event] = sink.events
    assert event["tokens/per_second"] == pytest.approx(100 / event["time/step"])


def test_no_metric_of_a_reward_takes_the_place_of_the_step() -> None:
    """The file is cut back by it."""
    sink = MemorySink()
    reward = ScriptedReward(float)
    reward.metrics = {"step": 7.0, "mine": 1.0}
    with a_watch(sink).step(2) as record:
        Scorer([reward], None, 3, lambda message: None)([], record)
    assert sink.events[0]["step"] == 2
    assert sink.events[0]["mine"] == 1.0
    assert next(iter(sink.events[0])) == "step"


class Nosy(ScriptedReward):
    """Keeps what it is told beside the groups."""

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Values:
        self.log.append((context.step, context.total_steps))
        return []


def test_rewards_are_told_how_many_steps_are_over() -> None:
    """Of a step under way those before it; of an evaluation after a step that one too."""
    reward = Nosy(float)
    scorer = Scorer([reward], None, 9, lambda message: None)
    for step in (1, 5):
        scorer([], Record(step), training=True)
    for step in (0, 1, 5):
        scorer([], Record(step))
    assert reward.log == [(0, 9), (4, 9), (0, 9), (1, 9), (5, 9)]


def test_groups_are_written_with_rewards_and_advantages(tmp_path: Path) -> None:
    rollouts = RolloutsFile(tmp_path / "rollouts.jsonl", 10**6)
    watch = a_watch(MemorySink(), rollouts)
    record = Record(1)
    record.extras = {"why": ["right", "wrong"]}
    watch.groups(record, scored([1.0, None]), [[0.7, 0.0]])
    watch.close()
    [line] = map(json.loads, (tmp_path / "rollouts.jsonl").read_text().splitlines())
    assert [(output["reward"], output["advantage"]) for output in line["outputs"]] == [(1.0, 0.7), (None, 0.0)]
    assert [output["extras"]["why"] for output in line["outputs"]] == ["right", "wrong"]


def test_a_step_in_numbers() -> None:
    found = summary(scored([1.0, 0.0], [0.5, 0.5], [1.0, None], texts=("abcd", "ab")))
    assert found["reward"] == pytest.approx(3 / 5), "over the outputs that were scored"
    assert found["reward_std"] == pytest.approx(0.5**0.5 / 3)
    assert found["frac_reward_zero_std"] == pytest.approx(2 / 3), "a lone score teaches nothing either"
    assert found["tokens/sampled"] == 18
    assert [found[f"completions/{name}_length"] for name in ("min", "mean", "max")] == [2, 3, 4]


def test_rewards_that_differ_by_rounding_alone_are_equal() -> None:
    """As they are for the advantages, which are then exactly 0."""
    assert summary(scored([0.1 + 0.2, 0.3]))["frac_reward_zero_std"] == 1
    assert summary(scored([0.3, 0.300001]))["frac_reward_zero_std"] == 0


def test_a_step_without_a_score_has_no_reward() -> None:
    found = summary(scored([None, None]))
    assert found["reward"] != found["reward"]
    assert found["frac_reward_zero_std"] == 1


def test_groups_without_any_advantage_are_counted() -> None:
    assert frac_zero([[0.0, 0.0], [[0.0, 0.0], [0.0]], [[0.0, 1.0]], [0.5]]) == 0.5
    assert frac_zero([[]]) == 1.0
