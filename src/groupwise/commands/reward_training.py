"""Training a reward model in a run folder of its own: the same files, terminal and exact resume as a policy's."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import tomlkit
import torch

from groupwise import __version__
from groupwise.cpu.malloc import keep_freed_memory
from groupwise.errors import ConfigError, DataError, GroupwiseError
from groupwise.jobfile.reward_model import RewardModelJob, changed_keys, load_reward_job
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.models.load import choose_device, choose_dtype, without_bars
from groupwise.progress import Progress, StopSignals, unsaved_steps
from groupwise.readable import duration, number
from groupwise.reward_models.examples import load_examples
from groupwise.reward_models.export import save_reward_model
from groupwise.reward_models.learner import (
    Encoded,
    EncodedSet,
    RewardLearner,
    RewardLearnerSettings,
    encode_examples,
    encode_readable,
    updates_in,
)
from groupwise.reward_models.metrics import PREFIX
from groupwise.reward_models.model import RewardModel, Source, new_reward_model
from groupwise.reward_models.text import Example, prompt_of
from groupwise.run.saving import Clock
from groupwise.seeds import stable_hash
from groupwise.store import checkpoint, events
from groupwise.store.checkpoint import Checkpoint
from groupwise.store.events import EventsFile
from groupwise.store.folder import RunFolder, git_commit
from groupwise.store.provenance import JOB, Provenance, check_resumed
from groupwise.watch.record import Record, Recorder, warn_of_missing_lines, warn_of_refused, with_lost_output
from groupwise.watch.terminal import Mode, Terminal, make_terminal
from groupwise.wiring.provenance import provenance_of_examples

KEEP = 2
"""Checkpoints that are kept: the one before the last serves when the last is damaged."""
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class RewardResult:
    """What training came to. `before` and `after` are held-out metrics; empty where nothing was held out.

    `model` is the folder of the trained model, None where the run was stopped before its end, by `stopped_by`.
    `lost_output` is that of `Result`.
    """

    run: str
    model: str | None
    updates: int
    before: dict[str, float]
    after: dict[str, float]
    model_version: int
    seconds: float
    seed: int
    commit: str | None
    machine: str
    version: str
    stopped_by: int | None = None
    lost_output: tuple[str, ...] = ()


@dataclass(frozen=True)
class RewardData:
    """Examples as they are given from Python, in place of the files that a job names."""

    rows: Rows | None = None
    eval_rows: Rows | None = None
    trust_remote_code: bool = False


NOTHING = RewardData()
"""Everything is named by the job."""


@dataclass
class _Session:
    """One run under way."""

    job: RewardModelJob
    folder: RunFolder
    learner: RewardLearner
    train: list[Encoded]
    held_out: list[Encoded]
    progress: Progress
    clock: Clock
    watch: Recorder
    made_by: Provenance
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    saved_step: int = 0
    saved_seconds: float = 0.0
    _whole: tuple[int, int] = (0, 0)

    def whole(self) -> None:
        """The step under way is over, with its event."""
        self._whole = self.progress.step, self.learner.optimizer.update

    def rescue(self) -> None:
        """Save the last whole step, where that is what the learner still holds, before an error ends the run."""
        step, updates = self._whole
        if step > self.saved_step and updates == self.learner.optimizer.update:
            self.progress.step = step
            self.save()

    def evaluate(self, record: Record) -> None:
        """Put held-out metrics into the event."""
        if not self.held_out:
            return
        with record.time("eval"):
            self.after = self.learner.evaluate_encoded(self.held_out)
        self.before = self.before or self.after
        record.metrics |= {f"{PREFIX}eval/{name}": value for name, value in self.after.items()}

    def save(self) -> None:
        """Save now."""
        tensors, counters = self.learner.state_dict()
        state = {
            "step": self.progress.step, "learner": counters, "seconds": self.clock.seconds, "before": self.before,
            "after": self.after, "made_by": self.made_by.state(), "lines": self.watch.lines(),
        }  # fmt: skip
        texts = {JOB: _as_toml(self.job)}
        checkpoint.save(self.folder.checkpoints, self.progress.step, tensors=tensors, state=state, texts=texts)
        checkpoint.prune(self.folder.checkpoints, KEEP)
        self.saved_step, self.saved_seconds = self.progress.step, self.clock.seconds

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be made after this update."""
        every, minutes = self.job.checkpoint_every, self.job.checkpoint_minutes
        long_ago = 0 < minutes <= (self.clock.seconds - self.saved_seconds) / 60
        return (every > 0 and step % every == 0) or long_ago

    def unsaved(self) -> str | None:
        """What no checkpoint has, the update under way included, in words; None where that is nothing."""
        return unsaved_steps(self.saved_step + 1, self.progress.step, self.clock.seconds - self.saved_seconds)

    def restore(self, saved: Checkpoint) -> None:
        """Take up where `saved` left off."""
        tensors = {name: saved.tensors(name) for name in ("reward_model", "reward_optimizer")}
        self.learner.load_state_dict(tensors, saved.state["learner"])
        self.made_by = check_resumed(saved, self.made_by, self.watch.terminal.warn, "start a new run")
        self.progress.step = self.saved_step = saved.step
        self.clock.before = saved.state["seconds"]
        self.saved_seconds = self.clock.seconds
        self.before, self.after = saved.state["before"], saved.state["after"]
        self.whole()
        self.watch.terminal.say(f"resumed after update {saved.step} of {self.progress.total}")


@without_bars()
def train_reward_model(job: RewardModelJob, *, given: RewardData = NOTHING, show: Mode = "auto") -> RewardResult:
    """Train a reward model in a new run folder; it is saved as a Hugging Face folder, `RUN/model`.

    Raises GroupwiseError where the job cannot be run.
    """
    clock = Clock()
    RunFolder.free(Path(job.run))
    prepared = _prepared(job, given)  # which may refuse the job: there is no folder yet
    folder = RunFolder.create(Path(job.run))
    with folder.lock():
        return _run(prepared, folder, show, clock, None)


@without_bars()
def resume_reward_model(
    run: str | Path, *, overrides: Sequence[str] = (), given: RewardData = NOTHING, show: Mode = "auto"
) -> RewardResult:  # fmt: skip
    """Continue a reward model's run from its last whole checkpoint, as if it had not been interrupted.

    Raises ConfigError for a key that may not change, and GroupwiseError as training does.
    """
    clock, folder = Clock(), RunFolder.open(Path(run))
    old = load_reward_job({}, base=folder.job)
    new = load_reward_job({"run": str(run)}, overrides, base=folder.job)
    _refuse_changes(old, new, "")
    with folder.lock():
        warnings: list[str] = []
        saved = checkpoint.latest(folder.checkpoints, warnings.append)
        if saved is not None:
            edited = (
                f"The job.toml of this run was edited since update {saved.step} ({saved.path / JOB} is as it was). "
            )
            _refuse_changes(load_reward_job({}, base=saved.path / JOB), new, edited)
        return _run(_prepared(new, given), folder, show, clock, saved, resumed=True, warnings=warnings)


def _refuse_changes(old: RewardModelJob, new: RewardModelJob, found: str) -> None:
    if fixed := [key for key, may in changed_keys(old, new).items() if not may]:
        keys = ", ".join(fixed)
        raise ConfigError(f"{found}A resumed run would not be the same run with another {keys}: start a new one.")


@dataclass(frozen=True)
class _Prepared:
    """What is ready before a run has a folder: the model, and examples that it can read."""

    job: RewardModelJob
    model: RewardModel
    train: EncodedSet
    held_out: EncodedSet

    def remarks(self) -> Iterator[str]:
        """What the user should know beforehand."""
        if self.model.remark:
            yield self.model.remark
        for name, found in (("examples", self.train), ("held-out examples", self.held_out)):
            if found.dropped:
                none = "" if found.examples else ", and none is left: nothing tells how good the model is"
                yield f"{found.dropped} {name} were left out, the first because: {found.reason.rstrip('.')}{none}"
        if self.job.eval_share > 0 and not self.held_out.examples and not self.held_out.dropped:
            yield "no example is held out: nothing tells how good the model is; raise eval_share or name --eval-data"
        yield from self.train.remarks()


def _prepared(job: RewardModelJob, given: RewardData) -> _Prepared:
    """Load the data and the model. Raises GroupwiseError where they cannot be used, or nothing is left to learn."""
    job = job.model_copy(update={"date": job.date or date.today().isoformat()})
    train, held_out = _examples(job, given)
    keep_freed_memory(choose_device(job.device))
    model = new_reward_model(
        Source(job.model, job.revision, given.trust_remote_code, job.date), job.kind, seed=job.seed,
        separator=job.separator, device=job.device, max_length=job.max_length,
    )  # fmt: skip
    return _Prepared(job, model, encode_examples(model, train), encode_readable(model, held_out))


def _run(
    prepared: _Prepared, folder: RunFolder, show: Mode, clock: Clock, saved: Checkpoint | None, *,
    resumed: bool = False, warnings: Sequence[str] = (),
) -> RewardResult:  # fmt: skip
    job, train = prepared.job, prepared.train.examples
    learner = RewardLearner(prepared.model, settings_of(job, len(train), prepared.model.device))
    progress = Progress(1, updates_in(len(train), learner.settings))
    terminal = make_terminal(show, total_steps=progress.total, title=folder.name, history=_history(folder, saved))
    with ExitStack() as closing:
        closing.callback(terminal.close)
        for warning in (*warnings, *prepared.remarks()):
            terminal.warn(warning)
        watch = Recorder([], terminal, None)
        closing.callback(watch.close)
        held_out = prepared.held_out.examples
        made_by = provenance_of_examples(job, prepared.model, train, held_out)
        session = _Session(job, folder, learner, train, held_out, progress, clock, watch, made_by)
        terminal.say(_line(session))
        if saved is not None:
            session.restore(saved)
        if resumed:
            # Only what was read whole, and found to be of this run, takes the place of what came after it.
            folder.cut_back(saved.step if saved else None)
        folder.write_job(_as_toml(job))
        watch.sinks.append(EventsFile(folder.events))
        if saved is not None:
            warn_of_missing_lines(folder, saved, watch)
        return _rest(session, saved, terminal)


def _as_toml(job: RewardModelJob) -> str:
    return tomlkit.dumps(job.model_dump(exclude_none=True))


def _rest(session: _Session, saved: Checkpoint | None, terminal: Terminal) -> RewardResult:
    """What is left of a run, to its result."""
    try:
        with StopSignals(session.progress, terminal, session.unsaved, f"groupwise resume {session.folder.name}"):
            if saved is None and session.held_out:
                with session.watch.step(0) as record:
                    session.evaluate(record)
            _train(session)
    except GroupwiseError as error:
        session.rescue()
        where = f"is saved up to update {session.saved_step}" if session.saved_step else "has saved nothing yet"
        error.add_note(f"The run {where}; go on with `groupwise resume {session.folder.name}`.")
        raise
    result = _result(session)
    if result.stopped_by is None:
        session.folder.write_result(asdict(result))
    terminal.close(_closing_line(result, session.progress.total))
    return with_lost_output(result, session.folder, terminal)


def _train(session: _Session) -> None:
    """The updates that are left, with their events, evaluations and checkpoints; then the model's folder."""
    job, progress, learner = session.job, session.progress, session.learner
    updates = learner.updates(session.train)
    for step in (step for _ in progress.iterations() for step in progress.steps()):
        with session.watch.step(step) as record:
            with record.time("update"):
                metrics = next(updates)
            warn_of_refused(metrics, session.watch)
            record.metrics |= {f"{PREFIX}{name}": value for name, value in metrics.items()}
            if step == progress.total or (job.eval_every > 0 and step % job.eval_every == 0):
                session.evaluate(record)
        if session.due(step):
            session.save()
        session.whole()
        learner.check(progress.total)
    if progress.step != session.saved_step:
        session.save()
    if progress.step == progress.total:
        save_reward_model(learner, session.folder.path / "model", _card_of(session))


def _examples(job: RewardModelJob, given: RewardData) -> tuple[list[Example], list[Example]]:
    """What is trained on, and what is held out: no prompt is on both sides."""
    examples = load_examples(job.data if given.rows is None else given.rows, job.kind, split=job.split)
    other = job.eval_data if given.eval_rows is None else given.eval_rows
    if other is not None:
        return examples, load_examples(other, job.kind, split=job.split)
    held = [stable_hash(job.seed, "held-out", prompt_of(one)) < job.eval_share * 2**63 for one in examples]
    train = [one for one, out in zip(examples, held, strict=True) if not out]
    if not train:
        raise DataError(
            f"All {len(examples)} examples of {job.data} would be held out (eval_share {job.eval_share:g}): give more "
            "prompts, name --eval-data, or set eval_share to 0."
        )
    return train, [one for one, out in zip(examples, held, strict=True) if out]


def settings_of(job: RewardModelJob, examples: int, device: torch.device) -> RewardLearnerSettings:
    """How the learner works for this job and so many examples."""
    optimizer = OptimizerSettings(
        learning_rate=job.learning_rate, total_updates=job.epochs * -(-examples // job.batch_size),
        lr_scheduler_type=job.lr_scheduler_type, warmup_steps=job.warmup_steps, weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
    )  # fmt: skip
    return RewardLearnerSettings(
        optimizer=optimizer, batch_size=job.batch_size, epochs=job.epochs,
        tokens_per_micro_batch=job.tokens_per_micro_batch, compute_dtype=choose_dtype(job.dtype, device), seed=job.seed,
    )  # fmt: skip


def _history(folder: RunFolder, saved: Checkpoint | None) -> list[dict[str, Any]]:
    return [event for event, _ in events.read_to(folder.events, saved.step)] if saved else []


def _line(session: _Session) -> str:
    """What is trained, on what."""
    model = session.learner.model
    size = sum(parameter.numel() for parameter in model.model.parameters()) / 1e6
    return (
        f"{type(model.model).__name__}, {size:.1f}M parameters on {model.device}: {len(session.train):,} examples, "
        f"{len(session.held_out):,} held out"
    )


def _result(session: _Session) -> RewardResult:
    progress = session.progress
    finished = progress.step == progress.total
    return RewardResult(
        run=session.folder.name,
        model=str(Path(session.folder.name) / "model") if finished else None,
        updates=progress.step,
        before=session.before,
        after=session.after,
        model_version=session.learner.version,
        seconds=round(session.clock.seconds, 1),
        seed=session.job.seed,
        commit=git_commit(),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        version=__version__,
        stopped_by=int(progress.stopped) if progress.stopped and not finished else None,
    )


def _closing_line(result: RewardResult, total: int) -> str:
    if result.model is None:
        return f"stopped after update {result.updates} of {total}; go on with: groupwise resume {result.run}"
    took = f"{duration(result.seconds)} · model: {result.model}"
    if not result.after:
        return f"done in {took}"
    return f"held-out accuracy {number(result.before['accuracy'])} -> {number(result.after['accuracy'])} in {took}"


def _card_of(session: _Session) -> str:
    """The README of the trained model."""
    job, after = session.job, session.after
    tags = {"outcome": "text-classification", "process": "token-classification"}[job.kind]
    held_out = ", ".join(f"{name} {value:.3f}" for name, value in after.items())
    return "\n".join([
        "---", "library_name: transformers", f"pipeline_tag: {tags}", "tags: [reward-model, groupwise]", "---", "",
        f"# {Path(job.model).name}, a reward model of kind {job.kind}", "",
        f"Trained with groupwise from `{job.model}` on `{job.data}`, version {session.learner.version}.",
        f"Held out: {held_out or 'nothing'}.", "", "## Job", "", "```json",
        json.dumps(job.model_dump(mode="json"), indent=2, ensure_ascii=False), "```", "",
    ])  # fmt: skip
