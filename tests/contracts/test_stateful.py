"""What every part with state promises: a checkpoint brings it back as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from groupwise.data.stream import PromptStream
from groupwise.engines.mailbox import Mailbox
from groupwise.progress import Progress
from groupwise.reward_models.rounds import NoRounds
from groupwise.rewards.base import Outcome
from groupwise.rewards.patience import Patience
from groupwise.rewards.scorer import Scorer
from groupwise.run.evaluate import NoEvaluation
from groupwise.run.rollouts import GroupSampler, Rollouts
from groupwise.run.saving import Best, Clock
from groupwise.state import Stateful
from groupwise.store.folder import RunFolder
from groupwise.types import Sampling
from groupwise.watch.record import Record
from tests.doubles import ScriptedEngine, ScriptedLearner, ScriptedReward, prompts, through_a_file
from tests.learn.tiny import make_learner, some_credit, some_groups, tiny_policy

Pair = tuple[Stateful, Stateful]


def progress(at: Path) -> Pair:
    used = Progress(2, 5)
    used.step = 7
    return used, Progress(2, 5)


def patience(at: Path) -> Pair:
    used = Patience(9)
    used.count([Outcome("rewards/a", "Reward `a`", False, "Traceback"), Outcome("rewards/b", "Reward `b`", True)])
    return used, Patience(9)


def clock(at: Path) -> Pair:
    return Clock(before=61.5, now=lambda: 3.0), Clock(now=lambda: 8.0)


def evaluation(at: Path) -> Pair:
    used = NoEvaluation()
    used.first, used.last, used.at_step = {"reward": 0.25}, {"reward": 0.5}, 4
    return used, NoEvaluation()


def best(at: Path) -> Pair:
    used, new = (
        Best(RunFolder.create(at / name), evaluation(at)[0], ScriptedLearner(), kept=True)
        for name in ("used", "new")  # type: ignore[arg-type]
    )
    used.maybe(4)
    return used, new


def rollouts(at: Path) -> Pair:
    def made() -> Rollouts:
        scorer = Scorer([ScriptedReward(float)], None, 2, lambda message: None)
        stream = PromptStream(prompts("a", "b", "c"), seed=0, shuffle=True)
        return Rollouts(stream, Mailbox(ScriptedEngine()), scorer, GroupSampler(Sampling(), 2, 5, "train"), 2)

    used = made()
    used.collect(1, Record(1))
    used.load_weights(ScriptedLearner())
    return used, made()


def scripted_learner(at: Path) -> Pair:
    used = ScriptedLearner()
    used.update(used.prepare([], []))
    return used, ScriptedLearner()


def policy_learner(at: Path) -> Pair:
    used, new = (make_learner(tiny_policy(), "grpo", rate=0.1) for _ in range(2))
    used.refresh(3)
    groups = some_groups(used.policy, 1.0)
    used.update(used.prepare(groups, some_credit(groups)))
    return used, new


def rounds(at: Path) -> Pair:
    return NoRounds(), NoRounds()


PARTS = (progress, patience, clock, evaluation, best, rollouts, scripted_learner, policy_learner, rounds)


@pytest.mark.parametrize("pair", PARTS)
def test_a_part_is_brought_back_as_it_was(pair: Callable[[Path], Pair], tmp_path: Path) -> None:
    used, new = pair(tmp_path)
    saved = through_a_file(used.state())
    if pair is not rounds:
        assert dict(new.state().values) != saved.values, "there is something to bring back"
    new.restore(saved)
    again = new.state()
    assert dict(again.values) == saved.values
    assert dict(again.lines) == saved.lines
    assert again.tensors.keys() == saved.tensors.keys()
    for stem, named in saved.tensors.items():
        assert again.tensors[stem].keys() == named.keys()
        assert all(torch.equal(again.tensors[stem][name], tensor) for name, tensor in named.items())


def test_what_was_collected_and_not_trained_on_is_drawn_again() -> None:
    used, _ = rollouts(Path())
    assert isinstance(used, Rollouts)
    before = dict(used.state().values)
    used.collect(2, Record(2))
    assert dict(used.state().values) == before, "an error before the update loses no prompt"
    used.load_weights(ScriptedLearner())
    assert used.state().values["position"] == before["position"] + 2
