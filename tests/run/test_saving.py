"""When a run is saved, and what becomes of the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.config import CheckpointSection
from groupwise.errors import RunFolderError
from groupwise.learn.learner import check_shapes
from groupwise.progress import Progress
from groupwise.reward_models.rounds import NoRounds
from groupwise.run.evaluate import NoEvaluation
from groupwise.run.saving import Best, Clock, RunState, Saver
from groupwise.store import checkpoint
from groupwise.store.folder import RunFolder
from groupwise.watch.record import Recorder
from groupwise.watch.terminal import make_terminal
from tests.doubles import MemorySink, ScriptedLearner, a_checkpoint


class Bench:
    """A saver over a learner that is written down, an evaluation that is told what it found, and a clock."""

    def __init__(self, path: Path, **schedule: Any) -> None:
        self.folder = RunFolder.create(path / "run")
        self.progress, self.evaluation, self.sink = Progress(1, 10), NoEvaluation(), MemorySink()
        self.watch = Recorder([self.sink], make_terminal("quiet", total_steps=10, title=""), None)
        self.learner = ScriptedLearner()
        self.minutes = 0.0
        clock, rounds = Clock(now=lambda: 60 * self.minutes), NoRounds()
        section = CheckpointSection(**schedule)
        best = Best(self.folder, self.evaluation, self.learner, kept=section.best)
        parts = {"learner": self.learner, "progress": self.progress, "evaluation": self.evaluation}
        self.saver = Saver(
            self.folder, section, RunState({**parts, "rounds": rounds, "clock": clock, "best": best}), self.watch,
            progress=self.progress, clock=clock, learner=self.learner, rounds=rounds, best=best,
        )  # fmt: skip

    def step(self, number: int, reward: float | None = None, evaluated: bool = True) -> None:
        self.progress.step = number
        if evaluated:
            self.evaluation.at_step, self.evaluation.last = number, {} if reward is None else {"reward": reward}
        self.saver.maybe(number)

    @property
    def saved(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.folder.checkpoints.glob("step-*"))


def test_checkpoints_come_by_the_schedule_and_at_the_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=3, keep=9)
    for number in range(1, 8):
        bench.step(number, evaluated=False)
    assert bench.saved == [3, 6]
    bench.saver.finish()
    assert bench.saved == [3, 6, 7]


def test_checkpoints_come_by_time_too(tmp_path: Path) -> None:
    """So many minutes after the last one, whatever made it."""
    bench = Bench(tmp_path, every=5, minutes=10, keep=9)
    for number, minutes in enumerate((9, 11, 19, 20.5, 25, 30, 34.9, 35), start=1):
        bench.minutes = minutes
        bench.step(number, evaluated=False)
    assert bench.saved == [2, 5, 8]


def test_a_run_that_is_resumed_counts_its_time_from_there(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=0, minutes=10, keep=9)
    bench.minutes = 25  # loading took long
    bench.saver.resumed(a_checkpoint({}, step=3))
    assert bench.saver.unsaved() is None
    bench.step(4, evaluated=False)
    bench.minutes = 30
    assert bench.saver.unsaved() == "step 4, about 5 min 0 s of work"
    bench.step(5, evaluated=False)
    assert bench.saver.unsaved() == "steps 4 to 5, about 5 min 0 s of work"
    bench.minutes = 35
    bench.step(6, evaluated=False)
    assert bench.saved == [6]
    assert bench.saver.unsaved() is None


def test_minutes_of_0_save_nothing_by_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=0, minutes=0)
    bench.minutes = 1e6
    bench.step(1, evaluated=False)
    bench.saver.round_over()
    assert bench.saved == []


def test_by_default_an_hour_of_long_steps_is_not_all_lost(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep=9)
    for number in (1, 2, 3):
        bench.minutes += 20
        bench.step(number, evaluated=False)
    assert bench.saved == [1, 2, 3]


def test_what_is_saved_is_not_saved_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=3)
    bench.step(3, evaluated=False)
    before = (bench.folder.checkpoints / "step-00000003").stat().st_ino
    bench.saver.finish()
    assert (bench.folder.checkpoints / "step-00000003").stat().st_ino == before


def test_a_run_that_made_no_step_saves_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=3)
    bench.saver.finish()
    assert bench.saved == []


def test_with_every_0_only_the_end_is_saved(tmp_path: Path) -> None:
    """Also where the stop comes after the step's own chance to be saved."""
    bench = Bench(tmp_path, every=0)
    bench.step(1, evaluated=False)
    assert bench.saved == []
    bench.saver.finish()
    assert bench.saved == [1]


def test_only_so_many_are_kept_beside_the_best(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=1, keep=2)
    for number in range(1, 6):
        bench.step(number, reward=-float(number))
    assert bench.saved == [4, 5]
    assert checkpoint.load(bench.folder.best).step == 1


def test_the_best_is_that_of_the_best_evaluation(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=0)
    for number, reward in enumerate([0.1, 0.3, 0.3, 0.2], start=1):
        bench.step(number, reward)
    best = checkpoint.load(bench.folder.best)
    assert (best.step, best.state["value"]) == (2, 0.3)
    bench.step(9, evaluated=False)
    assert checkpoint.load(bench.folder.best).step == 2, "a step without an evaluation is no better"


def test_an_evaluation_without_a_score_is_never_the_best(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=0)
    bench.step(1, reward=None)
    assert not bench.folder.best.exists()
    bench.step(2, reward=-5.0)
    assert checkpoint.load(bench.folder.best).step == 2


def test_the_best_may_be_left_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path, best=False)
    bench.step(1, reward=1.0)
    assert not bench.folder.best.exists()


def test_the_time_of_a_checkpoint_goes_into_the_next_event(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=2)
    for number in (1, 2, 3):
        with bench.watch.step(number):
            pass
        bench.step(number, evaluated=False)
    assert ["time/checkpoint" in event for event in bench.sink.events] == [False, False, True]


def test_seconds_are_those_of_all_processes() -> None:
    clock = Clock(before=100.0)
    assert 100 < clock.seconds < 100 + 3600


@pytest.mark.parametrize(
    "own, found, said",
    [
        ({"a": (2, 3)}, {"a": (2, 4)}, r"its a is \[2, 4\], that of this job's model is \[2, 3\]"),
        ({"a": (2,)}, {"a": (2,), "b": (1,)}, r"its b is \[1\], that of this job's model is absent"),
        ({"a": (2,), "b": ()}, {"a": (2,)}, r"its b is absent, that of this job's model is \[\]"),
    ],
)
def test_weights_of_another_model_are_refused(own: Any, found: Any, said: str) -> None:
    tensors = [{name: torch.zeros(shape) for name, shape in side.items()} for side in (own, found)]
    with pytest.raises(RunFolderError, match=said):
        check_shapes(*tensors, "step-3")
    check_shapes(tensors[0], tensors[0], "step-3")


def test_an_error_inside_a_step_saves_the_step_before_it_as_it_was_when_it_was_over(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=5)
    bench.step(1, reward=0.25)
    bench.progress.step = 2
    bench.evaluation.at_step, bench.evaluation.last = 2, {"reward": 9.0}  # of the step that was not finished
    bench.saver.rescue()
    saved = checkpoint.latest(bench.folder.checkpoints, pytest.fail)
    assert saved is not None
    assert (saved.step, saved.state["progress"]["step"], bench.saver.saved_step) == (1, 1, 1)
    assert saved.state["evaluation"]["last"] == {"reward": 0.25}


def test_an_error_after_an_update_saves_nothing_that_is_half_a_step(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=2)
    for number in (1, 2, 3):
        bench.step(number)
    bench.progress.step = 4
    bench.learner.updates += 1
    bench.saver.rescue()
    assert bench.saved == [2]


def test_an_error_before_the_first_step_or_right_after_a_save_saves_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every=1)
    bench.saver.rescue()
    assert bench.saved == []
    bench.step(1)
    written = (bench.folder.checkpoints / "step-00000001" / "state.json").stat().st_mtime_ns
    bench.saver.rescue()
    assert bench.saved == [1]
    assert (bench.folder.checkpoints / "step-00000001" / "state.json").stat().st_mtime_ns == written
