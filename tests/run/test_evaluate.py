"""What an evaluation says of outputs, in numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from statistics import fmean

import pytest

from groupwise.engines.mailbox import Mailbox
from groupwise.rewards.scorer import Scorer
from groupwise.run.evaluate import Evaluation, NoEvaluation, Schedule, judge, pass_at
from groupwise.run.rollouts import GroupSampler
from groupwise.types import Sampling
from groupwise.watch.record import Record, Recorder
from groupwise.watch.terminal import make_terminal
from tests.doubles import MemorySink, ScriptedEngine, ScriptedReward, prompts, scored


def test_reward_and_accuracy_are_means_over_prompts() -> None:
    found = judge(scored([1.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.0, 1.0]), threshold=1.0, verified=True)
    assert found["reward"] == pytest.approx((0.625 + 0.25) / 2)
    assert found["accuracy"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["unscored"] == 0


def test_what_is_no_accuracy_is_not_called_one() -> None:
    """Of a reward with other values than 0 and 1, and of a sum of several: formatted well is not right."""
    graded = judge(scored([1.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.0, 1.0]), threshold=1.0)
    assert graded["above_threshold"] == pytest.approx((0.5 + 0.25) / 2)
    both = [
        replace(one, scores=tuple(replace(s, parts={"accuracy": 0.0, "format": 1.0}) for s in one.scores))
        for one in scored([1.0, 1.0], [1.0, 1.0])
    ]
    found = judge(both, threshold=1.0)
    assert (found["reward"], found["above_threshold"]) == (1.0, 1.0)
    assert (found["rewards/accuracy"], found["rewards/format"]) == (0.0, 1.0)
    for one in (graded, found):
        assert not [name for name in one if name.startswith(("accuracy", "pass@", "right_by_luck"))]


def test_an_accuracy_that_other_values_refuted_does_not_come_back() -> None:
    values = iter([0.0] * 4 + [0.5] * 4 + [1.0] * 8)
    evaluation = an_evaluation(ScriptedReward(lambda text: next(values)), every=1)
    found = []
    for step in range(4):
        record = Record(step)
        evaluation.run(record)
        found.append("eval/accuracy" in record.metrics)
    assert found == [True, False, False, False]


def test_pass_at_k_is_the_share_of_the_subsets_that_hold_a_right_output() -> None:
    right = [True, False, False, True, False, False]
    for k in range(1, 7):
        subsets = list(itertools.combinations(right, k))
        assert pass_at(k, 6, 2) == pytest.approx(fmean(map(any, subsets)))
    assert pass_at(4, 4, 0) == 0.0
    assert pass_at(1, 4, 4) == 1.0


def test_pass_at_k_is_reported_for_powers_of_two() -> None:
    found = judge(scored([1.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 5), threshold=1.0)
    assert [name for name in found if name.startswith("pass@")] == ["pass@1", "pass@2", "pass@4"]
    assert found["pass@1"] == pytest.approx(found["accuracy"]) == pytest.approx(0.1)
    assert found["pass@2"] == pytest.approx(0.2)
    assert found["pass@4"] == pytest.approx(0.4)


def test_the_threshold_itself_is_right() -> None:
    groups = scored([0.5, 0.49], [0.51, 0.0])
    assert judge(groups, threshold=0.5, verified=True)["accuracy"] == 0.5
    assert judge(groups, threshold=1.0, verified=True)["accuracy"] == 0.0


def test_intervals_are_over_prompts() -> None:
    """Outputs of one prompt are no independent observations."""
    found = judge(scored([1.0, 1.0], [0.0, 0.0], [1.0, 0.0]), threshold=1.0)
    deviation = 0.5  # sample standard deviation of 1, 0 and 1/2
    assert found["accuracy_ci95"] == found["reward_ci95"] == pytest.approx(1.96 * deviation / math.sqrt(3))


def test_an_output_without_a_score_is_wrong_and_out_of_the_mean() -> None:
    found = judge(scored([1.0, None], [None, None], [0.5, 0.5]), threshold=0.5, verified=True)
    assert found["reward"] == pytest.approx(0.75), "of the prompts that have a reward"
    assert found["accuracy"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["unscored"] == 3


def test_what_cannot_be_said_is_absent() -> None:
    nothing = judge(scored([None, None]), threshold=1.0)
    assert "reward" not in nothing
    assert not [name for name in nothing if name.startswith(("accuracy", "pass@", "above"))]
    assert not [name for name in judge(scored([1.0, 0.0]), threshold=1.0) if name.endswith("_ci95")]
    assert all(map(math.isfinite, [*nothing.values()]))


def test_lengths_are_counted_in_tokens() -> None:
    assert judge(scored([1.0, 1.0], texts=("abc", "a")), threshold=1.0)["mean_length"] == 2


def an_evaluation(reward: ScriptedReward, every: int = 0) -> Evaluation:
    scorer = Scorer([reward], None, 10, lambda message: None)
    draw = GroupSampler(Sampling(temperature=0.5), 2, 5, "eval")
    return Evaluation(prompts("a", "b"), Mailbox(ScriptedEngine()), scorer, draw, Schedule(every, 10), 500_000.0)


def test_two_evaluations_draw_the_same() -> None:
    """They differ by the policy alone, whatever the step."""
    evaluation = an_evaluation(ScriptedReward(float))
    found = []
    for step in (0, 10):
        record = Record(step)
        evaluation.run(record)
        found.append({name: value for name, value in record.metrics.items() if name.startswith("eval/")})
    assert found[0] == found[1]
    assert found[0]["eval/reward"] > 1
    assert isinstance(evaluation.sampler, Mailbox)
    engine = evaluation.sampler.engine
    assert isinstance(engine, ScriptedEngine)
    assert [request.seed for request in engine.requests[:2]] == [request.seed for request in engine.requests[2:]]
    assert engine.requests[0].sampling == Sampling(temperature=0.5), "with settings of its own"


def test_the_first_and_the_last_are_kept() -> None:
    values = iter([0.0] * 4 + [1.0] * 4 + [2.0] * 4)
    evaluation = an_evaluation(ScriptedReward(lambda text: next(values)), every=4)
    evaluation.run(Record(0))
    for step in range(1, 9):
        evaluation.maybe(Record(step))
    assert evaluation.first is not None
    assert evaluation.last is not None
    assert (evaluation.first["reward"], evaluation.last["reward"], evaluation.at_step) == (0.0, 2.0, 8)


def test_a_rewards_own_metrics_stay_those_of_the_training_step() -> None:
    reward = ScriptedReward(float)
    reward.metrics = {"rewards/scripted/failed": 4.0}
    record = Record(10)
    record.metrics["rewards/scripted/failed"] = 0.0
    an_evaluation(reward).maybe(record)
    assert record.metrics["rewards/scripted/failed"] == 0.0
    assert "eval/reward" in record.metrics
    assert record.metrics["time/eval"] > 0


def test_without_held_out_data_there_is_nothing_to_say() -> None:
    record, sink = Record(10), MemorySink()
    watch = Recorder([sink], make_terminal("quiet", total_steps=10, title=""), None)
    NoEvaluation().maybe(record)
    NoEvaluation().baseline(watch, 0)
    assert record.metrics == {}
    assert sink.events == [], "not even a step 0"
    an_evaluation(ScriptedReward(float)).baseline(watch, 0)
    assert [event["step"] for event in sink.events] == [0]
    assert "eval/reward" in sink.events[0]
