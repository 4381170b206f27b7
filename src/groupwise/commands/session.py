"""One run of a job in its folder, from its parts to its result."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import torch

from groupwise import __version__
from groupwise.commands.resuming import Start
from groupwise.config import BUILTIN, Job
from groupwise.errors import GroupwiseError
from groupwise.jobfile import to_toml
from groupwise.learn.learner import PolicyLearner
from groupwise.planning.fit import choose_budget
from groupwise.progress import StopSignals
from groupwise.readable import duration, number
from groupwise.run import loop
from groupwise.run.evaluate import ABOVE, Evaluation
from groupwise.run.loop import Parts
from groupwise.run.saving import Clock, Saver
from groupwise.store import checkpoint, events
from groupwise.store.checkpoint import Checkpoint
from groupwise.store.folder import RunFolder, git_commit
from groupwise.store.provenance import Provenance, check_resumed
from groupwise.watch.record import Recorder, warn_of_missing_lines, with_lost_output
from groupwise.watch.terminal import Mode, Terminal, make_terminal
from groupwise.wiring.parts import build, open_sinks
from groupwise.wiring.provenance import provenance_of
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.settings import total_steps


@dataclass(frozen=True)
class Result:
    """What a run came to. `eval_before` and `eval_after` are held-out accuracies: shares of outputs that are right by
    the verifier, or by the only reward where that is 0 or 1; None where there is no such thing. The mean reward of the
    same outputs is `eval_reward_before` and `eval_reward_after`.

    `stopped_by` is the signal that ended the run before its last step, or None. `lost_output` names the streams that
    could not be written to the end, each with the reason.
    """

    run: str
    steps: int
    eval_before: float | None
    eval_after: float | None
    eval_reward_before: float | None
    eval_reward_after: float | None
    seconds: float
    seed: int
    commit: str | None
    machine: str
    version: str
    stopped_by: int | None = None
    lost_output: tuple[str, ...] = ()


def run_job(job: Job, folder: RunFolder, objects: PythonObjects, show: Mode, clock: Clock, start: Start) -> Result:
    """Run the steps that are left of a job in its locked folder. Raises GroupwiseError."""
    history: Sequence[Mapping[str, Any]] = ()
    if start.saved is not None and not start.forked:
        history = [event for event, _ in events.read_to(folder.events, start.saved.step, start.rounds_done)]
    terminal = make_terminal(show, total_steps=total_steps(job), title=folder.name, history=history)
    try:
        for note in start.notes:
            terminal.say(note)
        for warning in start.warnings:
            terminal.warn(warning)
        result = _run(job, folder, objects, terminal, clock, start)
        terminal.close(_closing_line(result, total_steps(job)), _next_steps(job, result))
        return with_lost_output(result, folder, terminal)
    finally:
        terminal.close()


def _run(job: Job, folder: RunFolder, objects: PythonObjects, terminal: Terminal, clock: Clock, start: Start) -> Result:
    job, commit = _dated(choose_budget(job, objects, terminal.say)), git_commit()
    with ExitStack() as closing:
        if start.saved is None:
            folder.write_job(to_toml(job))
        watch = Recorder([], terminal, None)
        parts, saver = build(job, folder, objects, watch, clock, closing)
        saver.job, saver.made_by = to_toml(job), _made_by(job, objects, parts)
        if start.saved is not None:
            _take_up(start.saved, start.forked, saver)
        if not start.forked:
            # Only what was read whole, and found to be of this run, takes the place of what came after it.
            folder.cut_back(start.saved.step if start.saved else None, start.rounds_done)
            folder.write_job(saver.job)
        open_sinks(watch, job, folder, start.saved.step if start.saved else None, closing)
        if start.saved is not None and not start.forked:
            warn_of_missing_lines(folder, start.saved, watch)
        parts.rollouts.load_weights(parts.learner)
        try:
            with StopSignals(parts.progress, terminal, saver.unsaved, f"groupwise resume {folder.name}"):
                if start.saved is None or start.forked:
                    parts.evaluation.baseline(watch, parts.progress.step)
                if start.forked:
                    # Only now is it a run: killed before, it must not be resumed from the base model.
                    saver.save(parts.progress.step)
                    folder.write_job(saver.job)
                if start.saved is None:
                    terminal.say("sampling the outputs of the first step")
                loop.train(parts)
        except Exception as error:  # a boundary: whatever ends a run, its last whole step is saved first
            _rescue(saver, error)
            error.add_note(_way_on(folder, saver.saved_step))
            raise
    result = _result(job, folder, parts, saver, commit)
    if result.stopped_by is None:
        folder.write_result(asdict(result))
    return result


def _dated(job: Job) -> Job:
    """The job with a day for chat templates to write, whenever its steps are computed."""
    day = job.data.date or date.today().isoformat()
    return job.model_copy(update={"data": job.data.model_copy(update={"date": day})})


def _made_by(job: Job, objects: PythonObjects, parts: Parts) -> Provenance:
    assert isinstance(parts.learner, PolicyLearner)
    model = parts.learner.policy.model
    held_out = parts.evaluation.prompts if isinstance(parts.evaluation, Evaluation) else ()
    commit = getattr(model.config, "_commit_hash", None)
    return provenance_of(job, objects, commit, model.device, parts.rollouts.prompts.prompts, held_out)


def _take_up(saved: Checkpoint, forked: bool, saver: Saver) -> None:
    word = "forked" if forked else "resumed"
    if forked:
        saver.run.fork(saved)
    else:
        saver.run.restore(saved)
        assert saver.made_by is not None
        saver.made_by = check_resumed(saved, saver.made_by, saver.watch.terminal.warn)
        saver.resumed(saved)
    saver.watch.terminal.say(f"{word} after step {saved.step} of {saver.progress.total}")


def _result(job: Job, folder: RunFolder, parts: Parts, saver: Saver, commit: str | None) -> Result:
    first, last = parts.evaluation.first or {}, parts.evaluation.last or {}
    before, after = first.get("accuracy"), last.get("accuracy")
    progress = parts.progress
    return Result(
        run=folder.name,
        steps=progress.step,
        # Values other than 0 and 1 that came later tell that the first ones were no accuracy either.
        eval_before=None if ABOVE in last else before,
        eval_after=after,
        eval_reward_before=first.get("reward"),
        eval_reward_after=last.get("reward"),
        seconds=round(saver.clock.seconds, 1),
        seed=job.seed,
        commit=commit,
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        version=__version__,
        stopped_by=int(progress.stopped) if progress.stopped and progress.step < progress.total else None,
    )


def _closing_line(result: Result, total: int) -> str:
    if result.stopped_by is not None:
        return f"stopped after step {result.steps} of {total}; go on with: groupwise resume {result.run}"
    took = f"{duration(result.seconds)} · run: {result.run}"
    if result.eval_before is not None and result.eval_after is not None:
        return f"held-out accuracy {result.eval_before:.2f} -> {result.eval_after:.2f} in {took}"
    if result.eval_reward_before is not None and result.eval_reward_after is not None:
        return f"held-out reward {number(result.eval_reward_before)} -> {number(result.eval_reward_after)} in {took}"
    return f"done in {took}"


def _rescue(saver: Saver, error: Exception) -> None:
    """Save what an error would lose; where that fails too, the error says so."""
    try:
        saver.rescue()
    except GroupwiseError as other:
        if str(other) != str(error):  # a full disk says it once
            error.add_note(f"The last step could not be saved: {other}")


def _next_steps(job: Job, result: Result) -> str | None:
    """What can be done with a run that is over, as commands; None where it goes on first."""
    if result.stopped_by is not None:
        return None
    held_out = "" if job.eval.data is not None or job.data.path == BUILTIN else " --data heldout.jsonl"
    return (
        f'what next: groupwise sample {result.run} "TEXT" · groupwise eval {result.run}{held_out} · '
        f"groupwise export {result.run} DIR"
    )


def _way_on(folder: RunFolder, saved_step: int) -> str:
    if not checkpoint.any_in(folder.checkpoints):
        return "Nothing was saved yet."
    return f"The run is saved up to step {saved_step}: mend this and go on with `groupwise resume {folder.name}`."
