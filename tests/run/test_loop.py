"""The loop is Algorithm 1, event by event."""

from __future__ import annotations

import signal

import pytest

from groupwise.data.stream import PromptStream
from groupwise.engines.mailbox import Mailbox
from groupwise.objective import objective_named
from groupwise.progress import Progress
from groupwise.reward_models.rounds import NoRounds, Saving
from groupwise.rewards.scorer import Scorer
from groupwise.run import loop
from groupwise.run.evaluate import Evaluation, NoEvaluation, Schedule
from groupwise.run.rollouts import GroupSampler, Rollouts
from groupwise.types import Sampling, Scored
from groupwise.watch.record import Record, Recorder
from groupwise.watch.terminal import make_terminal
from tests.doubles import Log, MemorySink, ScriptedEngine, ScriptedLearner, ScriptedReward, prompts

PASSES = 2


class RewardModel(NoRounds):
    """Writes down when it is handed samples, and when it could be trained."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def add(self, scored: Scored, record: Record) -> None:
        self.log.append(("collect", record.step))

    def update(self, saving: Saving) -> None:
        self.log.append(("reward model",))


class Checkpoints:
    def __init__(self, log: Log) -> None:
        self.log = log

    def round_over(self) -> None:
        self.log.append(("round over",))

    def maybe(self, step: int) -> None:
        self.log.append(("save?", step))

    def finish(self) -> None:
        self.log.append(("finish",))


class Bench:
    """A loop over doubles: a data set of two questions, two a step, two outputs each."""

    def __init__(self, *, iterations: int = 1, steps: int = 2, every: int = 0, held_out: bool = True) -> None:
        self.log: Log = []
        self.sink = MemorySink()
        self.engine = ScriptedEngine(self.log)
        self.reward = ScriptedReward(lambda text: float(text[-1]), log=self.log)
        self.learner = ScriptedLearner(self.log)
        self.progress = Progress(iterations, steps)
        scorer = Scorer([self.reward], None, self.progress.total, lambda message: None)
        stream = PromptStream(prompts("a", "b"), seed=0, shuffle=False)
        self.rollouts = Rollouts(stream, Mailbox(self.engine), scorer, GroupSampler(Sampling(), 2, 5, "train"), 2)
        schedule = Schedule(every, self.progress.total)
        judge = Evaluation(
            prompts("?"), Mailbox(self.engine), scorer, GroupSampler(Sampling(), 1, 5, "eval"), schedule, 5.0
        )
        self.evaluation = judge if held_out else NoEvaluation()
        self.parts = loop.Parts(
            progress=self.progress,
            rollouts=self.rollouts,
            objective=objective_named("grpo"),
            learner=self.learner,
            rounds=RewardModel(self.log),
            evaluation=self.evaluation,
            checkpoints=Checkpoints(self.log),
            watch=Recorder([self.sink], make_terminal("quiet", total_steps=0, title=""), None),
            num_iterations=PASSES,
        )


def test_the_order_is_that_of_algorithm_1() -> None:
    bench = Bench(iterations=2, steps=2, every=2)
    loop.train(bench.parts)
    assert bench.log == [
        ("reward model",),  # there is one before the first step
        ("reference", 0, "version 0"),
        *step(1, version=0, reference=0),
        *step(2, version=2, reference=0, evaluated=True),
        ("reward model",),  # trained on the iteration's samples
        ("reference", 1, "version 4"),  # the policy of now, and once per iteration
        *step(3, version=4, reference=4),
        *step(4, version=6, reference=4, evaluated=True),
        ("reward model",),
        ("finish",),
    ]


def step(number: int, version: int, reference: int, evaluated: bool = False) -> Log:
    """What one step does: sample from the weights of `version`, which stay the old policy for every pass."""
    keys = [(number, 0, "0"), (number, 1, "1")]
    samples: Log = [("sample", f"train/{number}/{slot}", f"version {version}") for slot in (0, 1)]
    passes: Log = [("update", done, f"old {version}", f"reference {reference}") for done in range(PASSES)]
    after = version + PASSES
    held_out: Log = [("sample", "eval/0/0", f"version {after}"), ("score", [(0, 0, "0")])]
    return [
        *samples,
        ("score", keys),
        ("subtract kl",),
        ("prepare", f"version {version}"),
        *passes,
        ("collect", number),
        ("load", f"version {after}"),
        *(held_out if evaluated else []),
        ("save?", number),
    ]


def test_credit_is_of_the_groups_own_rewards() -> None:
    bench = Bench(steps=1, held_out=False)
    loop.train(bench.parts)
    [(scored, credit)] = bench.learner.prepared
    assert len(credit) == 2
    for group, advantages in zip(scored, credit, strict=True):
        first, second = (float(output.text[-1]) for output in group.group.completions)
        assert group.rewards == [first, second]
        distance = abs(first - second) / 2**0.5
        expected = (first - second) / 2 / (distance + 1e-4)
        assert advantages == pytest.approx([expected, -expected])


def test_an_event_tells_of_each_step() -> None:
    bench = Bench(iterations=2, steps=2, every=3)
    loop.train(bench.parts)
    events = bench.sink.events
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    assert [event["iteration"] for event in events] == [0, 0, 1, 1]
    assert [event["policy_version"] for event in events] == [2, 4, 6, 8]
    assert [event["epoch"] for event in events] == [1, 2, 3, 4]
    assert [event["loss"] for event in events] == [PASSES - 1] * 4
    assert [event["step"] for event in events if "eval/reward" in event] == [3, 4]
    for event in events:
        parts = sum(event[f"time/{name}"] for name in ("sample", "reward", "prepare", "update"))
        assert 0 < parts <= event["time/step"]


@pytest.mark.parametrize("every, total, due", [(0, 5, [5]), (2, 5, [2, 4, 5]), (5, 5, [5]), (9, 5, [5])])
def test_evaluation_is_due_every_so_often_and_at_the_end(every: int, total: int, due: list[int]) -> None:
    assert [step for step in range(1, total + 1) if Schedule(every, total).due(step)] == due


def test_a_question_drawn_twice_in_a_step_makes_two_groups() -> None:
    engine = ScriptedEngine()
    once = prompts("the same")
    groups = GroupSampler(Sampling(), 4, 5, "train").sample(Mailbox(engine), once * 2, 3)
    assert [group.key for group in groups] == [(3, 0, "0"), (3, 1, "0")]
    assert [request.uid for request in engine.requests] == ["train/3/0", "train/3/1"]
    texts = [output.text for group in groups for output in group.completions]
    assert len(set(texts)) == 8, "no draw is shared"


def test_outputs_stay_in_the_order_of_their_seeds_however_they_finish() -> None:
    engine = ScriptedEngine()
    first, second = GroupSampler(Sampling(), 3, 5, "train").sample(Mailbox(engine), prompts("a", "b"), 1)
    alone = GroupSampler(Sampling(), 3, 5, "train").sample(Mailbox(ScriptedEngine()), prompts("a"), 1)
    assert first.completions == alone[0].completions
    assert first.completions != second.completions


def test_purposes_steps_slots_and_runs_draw_apart() -> None:
    def seed(run_seed: int = 5, purpose: str = "train", step: int = 1, slot: int = 0) -> int:
        engine = ScriptedEngine()
        GroupSampler(Sampling(), 2, run_seed, purpose).sample(Mailbox(engine), prompts(*"ab"), step)
        return engine.requests[slot].seed

    seeds = [seed(), seed(run_seed=6), seed(purpose="eval"), seed(step=2), seed(slot=1)]
    assert len({s + output for s in seeds for output in (0, 1)}) == 2 * len(seeds)
    assert seed() == seed(), "and nothing else decides"


def test_a_stop_lets_the_step_finish_and_saves_it() -> None:
    bench = Bench(steps=5, held_out=False)
    bench.reward.value = lambda text: stop(bench, at=2) or float(text[-1])
    loop.train(bench.parts)
    assert bench.progress.step == 2
    assert [event["step"] for event in bench.sink.events] == [1, 2]
    assert bench.log[-3:] == [("save?", 2), ("reward model",), ("finish",)]


def stop(bench: Bench, at: int) -> None:
    if bench.progress.step == at:
        bench.progress.stopped = signal.SIGTERM


def test_a_stop_between_two_iterations_begins_no_other() -> None:
    bench = Bench(iterations=3, steps=2, held_out=False)
    bench.reward.value = lambda text: stop(bench, at=2) or float(text[-1])
    loop.train(bench.parts)
    assert [entry for entry in bench.log if entry[0] == "reference"] == [("reference", 0, "version 0")]


def test_a_run_that_is_taken_up_in_the_middle_goes_on_in_its_iteration() -> None:
    bench = Bench(iterations=2, steps=3, held_out=False)
    bench.progress.step = 4
    loop.train(bench.parts)
    assert [event["step"] for event in bench.sink.events] == [5, 6]
    assert [event["iteration"] for event in bench.sink.events] == [1, 1]
    done = Bench(iterations=2, steps=3)
    done.progress.step = 6
    loop.train(done.parts)
    assert done.log == [("reward model",), ("finish",)], "a run that is finished does nothing more"
