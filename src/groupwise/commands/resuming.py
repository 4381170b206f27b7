"""Where a run begins: at nothing, at its own checkpoint or, as a fork, at another run's; and what may differ there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from groupwise.config import Job
from groupwise.errors import ConfigError, RunFolderError
from groupwise.jobfile import Difference, differences, load_job, resumable_keys
from groupwise.store import checkpoint
from groupwise.store.checkpoint import Checkpoint
from groupwise.store.folder import RunFolder
from groupwise.store.provenance import JOB


@dataclass(frozen=True)
class Start:
    """Where a run begins: at nothing, at its own checkpoint or, as a fork, at that of another run.

    `notes` and `warnings` are what there is to say about it.
    """

    saved: Checkpoint | None = None
    forked: bool = False
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()

    @property
    def rounds_done(self) -> int:
        """The rounds of a reward model that were over at the checkpoint."""
        return int(self.saved.state.get("rounds", {}).get("done", 0)) if self.saved else 0


def start_of(folder: RunFolder, new: Job, *, forked: bool) -> Start:
    """The last whole checkpoint of a run, and what there is to say about it and about how `new` differs from its job.

    Raises ConfigError where a resumed run would not be the same run, RunFolderError where no checkpoint is whole.
    """
    warnings: list[str] = []
    saved = checkpoint.latest(folder.checkpoints, warnings.append)
    old = load_job(folder.job).job if saved is None else job_of(saved)
    changed = differences(old, new)
    if not forked:
        _refuse_edits(changed, saved)
        _refuse_other_iterations(old, new, saved)
    notes = [in_words(one) for one in changed if one.key != "run"]  # that one was typed just now
    if saved is None:
        notes.append("there is no checkpoint yet: starting over")
    return Start(saved, forked, notes, warnings)


def job_of(saved: Checkpoint) -> Job:
    """The job that a checkpoint was made with. Raises RunFolderError where this version cannot read it."""
    try:
        return load_job(saved.path / JOB).job
    except ConfigError as error:
        raise RunFolderError(f"The job of checkpoint {saved.path} is of another groupwise: {error}") from error


def edits(folder: RunFolder, saved: Checkpoint) -> str:
    """What was written into a run folder's job since a checkpoint that makes it another job, in a line; empty where
    nothing was. Of weights that were kept as the best there is no job to compare with."""
    if not (saved.path / JOB).is_file():
        return ""
    old, new = job_of(saved), load_job(folder.job, training=False).job
    changed = [in_words(one) for one in differences(old, new) if not one.resumable]
    return f"the job.toml of this run was edited since step {saved.step}: {', '.join(changed)}" if changed else ""


def refuse_changes(changed: Sequence[Difference]) -> None:
    """Raise ConfigError where one of them may not be made in a run that is resumed."""
    if fixed := [one for one in changed if not one.resumable]:
        raise ConfigError(
            f"A resumed run would not be the same run with {', '.join(map(in_words, fixed))}. Keys that may change: "
            f"{', '.join(resumable_keys())}. Use --fork FOLDER to start a new run from the checkpoint."
        )


def _refuse_edits(changed: Sequence[Difference], saved: Checkpoint | None) -> None:
    """The same for what was written into the run folder's job, which is not that of the checkpoint any more."""
    fixed = [one for one in changed if not one.resumable]
    if fixed and saved is not None:
        raise ConfigError(
            f"The job.toml of this run was edited since step {saved.step}, and a resumed run would not be the same run "
            f"with {', '.join(map(in_words, fixed))}. Put it back ({saved.path / JOB} has it as it was), or use "
            "--fork FOLDER to start a new run from the checkpoint."
        )
    refuse_changes(changed)


def _refuse_other_iterations(old: Job, new: Job, saved: Checkpoint | None) -> None:
    """An iteration that is over, and the refresh of the reference after it, cannot move any more."""
    before, after = old.train, new.train
    several = max(before.iterations, after.iterations) > 1
    if several and before.steps != after.steps and saved and saved.step > min(before.steps, after.steps):
        raise ConfigError(
            f"`train.steps` counts the steps of one iteration. This run is at step {saved.step}, so with {after.steps} "
            f"instead of {before.steps} iterations that are over would have ended elsewhere. Change train.iterations, "
            "or use --fork FOLDER."
        )


def in_words(one: Difference) -> str:
    """`"train.steps: 100 -> 200"`."""
    return f"{one.key}: {one.old!r} -> {one.new!r}"
