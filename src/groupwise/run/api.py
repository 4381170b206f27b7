"""What the command line and Python call: train, resume, evaluate, sample, export."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from groupwise import __version__
from groupwise.config import Job
from groupwise.engines.base import generate
from groupwise.engines.native import NativeEngine
from groupwise.errors import ConfigError, RunFolderError
from groupwise.jobfile import differences, load_job, resumable_keys, to_toml
from groupwise.learn import checkpoint
from groupwise.run import loop
from groupwise.run.evaluate import Evaluation
from groupwise.run.export import export as write_export
from groupwise.run.export import model_card
from groupwise.run.folder import RunFolder, git_commit
from groupwise.run.parts import PYTHON, Given, Model, build, eval_sampling_of, open_evaluation, open_model, open_scorer
from groupwise.run.progress import StopSignals
from groupwise.run.record import Record
from groupwise.run.saving import Clock, Stateful
from groupwise.types import Completion, Message, Request
from groupwise.watch import events
from groupwise.watch.terminal import Mode, Terminal, make_terminal
from groupwise.watch.words import duration

Rows = str | Path | Iterable[Mapping[str, Any]]
RewardFunction = str | Callable[..., Any]


@dataclass(frozen=True)
class Result:
    """What a run came to. Accuracies are shares of held-out outputs whose reward is at least `eval.threshold`.

    `stopped_by` is the signal that ended the run before its last step, or None.
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


def train(
    job: str | Path | None = None, *, model: str | Path | None = None, data: Rows | None = None,
    reward: RewardFunction | Sequence[RewardFunction] | None = None, eval_data: Rows | None = None,
    run: str | Path | None = None, overrides: Sequence[str] = (), show: Mode = "auto", trust_remote_code: bool = False,
    **options: Any,
) -> Result:  # fmt: skip
    """Train a model by GRPO and return what came of it.

    `job` is a job file or a recipe's name; everything else overrides it: `data` and `eval_data` are paths, hub ids or
    rows (dicts with a `prompt`), `reward` a `file.py:name`, a function, or several; any knob of the job goes by its
    name (`learning_rate=1e-5`) or in `overrides` (`"train.steps=10"`). `show` is auto, plain, quiet or json. Raises
    GroupwiseError where the job cannot be run.
    """
    start = time.perf_counter()
    given, named = _hand_over(data, eval_data, reward, trust_remote_code)
    resolved = load_job(job, overrides, {"model": model, "run": run, **named, **options})
    folder = RunFolder.create(Path(resolved.job.run))
    with folder.lock():
        folder.write_job(to_toml(resolved.job))
        return _run(resolved.job, folder, given, show, Clock(start=start), None)


def resume(
    run: str | Path, *, overrides: Sequence[str] = (), fork: str | Path | None = None,
    data: Iterable[Mapping[str, Any]] | None = None, eval_data: Iterable[Mapping[str, Any]] | None = None,
    reward: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None, show: Mode = "auto",
    trust_remote_code: bool = False,
) -> Result:  # fmt: skip
    """Continue a run from its last whole checkpoint, exactly as if it had not been interrupted.

    Only resumable keys may be overridden; `fork` names a new folder and lifts that. Objects that were handed over from
    Python are handed over again. Raises GroupwiseError.
    """
    start = time.perf_counter()
    given, _ = _hand_over(data, eval_data, reward, trust_remote_code)
    folder = RunFolder.open(Path(run))
    terminal = make_terminal("quiet", total_steps=0, title="")
    old = _read_job(folder)
    new = load_job(folder.job, overrides, {"run": str(fork or run)}).job
    _check_changes(old, new, fork is not None, terminal.say if show == "json" else print)
    saved = checkpoint.latest(folder.checkpoints, terminal.warn)
    if fork is None:
        with folder.lock():
            folder.write_job(to_toml(new))
            folder.cut_back(saved.step if saved else None)
            return _run(new, folder, given, show, Clock(start=start), saved)
    if saved is None:
        raise RunFolderError(f"{run} has no checkpoint to fork from; start again with `groupwise train`.")
    forked = RunFolder.create(Path(fork))
    with forked.lock():
        forked.write_job(to_toml(new))
        return _run(new, forked, given, show, Clock(start=start), saved)


def evaluate(
    target: str | Path, *, overrides: Sequence[str] = (), which: str = "latest", eval_data: Rows | None = None,
    reward: RewardFunction | Sequence[RewardFunction] | None = None, trust_remote_code: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Evaluate a run's weights (`which`: latest, best or base), or a job's model before training.

    Returns `reward`, `accuracy`, `pass@k`, their intervals and `mean_length`. Raises GroupwiseError.
    """
    given, named = _hand_over(None, eval_data, reward, trust_remote_code)
    job, model, step = _opened(target, overrides, which, given, named)
    scorer = open_scorer(job, given, None, 0, _to_stderr)
    engine = NativeEngine(model.loaded.policy, model.codec, max_live=job.sampling.max_live_outputs)
    try:
        evaluation = open_evaluation(job, model, given, engine, scorer)
        if not isinstance(evaluation, Evaluation):
            raise ConfigError("There is nothing to evaluate on: name held-out prompts with --data or eval.data.")
        evaluation.run(Record(step))
    finally:
        scorer.close()
    assert evaluation.last is not None
    return evaluation.last


def sample(
    target: str | Path, prompt: str | list[Message], *, n: int = 1, seed: int = 0, which: str = "latest",
    overrides: Sequence[str] = (), trust_remote_code: bool = False,
) -> list[Completion]:  # fmt: skip
    """Continue a prompt `n` times with a run's weights, by the job's evaluation settings. Raises GroupwiseError."""
    given = Given(trust_remote_code=trust_remote_code)
    job, model, _ = _opened(target, overrides, which, given, {})
    engine = NativeEngine(model.loaded.policy, model.codec, max_live=job.sampling.max_live_outputs)
    request = Request("sample", model.codec.encode_prompt(prompt), n, eval_sampling_of(job), seed)
    return list(generate(engine, [request])[0])


def export(
    run: str | Path, target: str | Path, *, which: str = "latest", trust_remote_code: bool = False
) -> Path:
    """Write a run's weights as a Hugging Face folder and return it. Raises GroupwiseError."""
    folder = RunFolder.open(Path(run))
    job, model, step = _opened(run, (), which, Given(trust_remote_code=trust_remote_code), {})
    result = folder.read_result()
    card = model_card(job.model_dump(mode="json"), result, step)
    masters = {name: p.detach() for name, p in model.loaded.policy.model.named_parameters()}
    write_export(
        model.loaded.policy, model.codec, masters, Path(target), source=model.source,
        dtype=model.loaded.source_dtype, card=card,
    )  # fmt: skip
    return Path(target)


def _run(
    job: Job, folder: RunFolder, given: Given, show: Mode, clock: Clock, saved: checkpoint.Checkpoint | None
) -> Result:
    history = list(events.read(folder.events)) if saved else []
    total = job.train.iterations * job.train.steps
    terminal = make_terminal(show, total_steps=total, title=str(folder.path), history=history)
    try:
        parts, stateful = build(job, folder, given, terminal, clock)
        if saved is not None:
            stateful.restore(saved)
            parts.rollouts.load_weights(parts.learner)
            terminal.say(f"resumed after step {saved.step} of {total}")
        with _closing(parts), StopSignals(parts.progress, terminal.say):
            if parts.progress.step == 0:
                _baseline(parts)
            loop.train(parts)
        result = _result(job, folder, stateful)
        if result.stopped_by is None:
            folder.write_result(asdict(result))
        terminal.say(_closing_line(result, total))
        return result
    finally:
        terminal.close()


def _baseline(parts: loop.Parts) -> None:
    """Where the run starts from, as step 0."""
    with parts.watch.step(0) as record:
        parts.evaluation.run(record)


@contextmanager
def _closing(parts: loop.Parts) -> Iterator[None]:
    try:
        yield
    finally:
        parts.rollouts.scorer.close()
        parts.rollouts.engine.close()
        parts.watch.close()


def _result(job: Job, folder: RunFolder, stateful: Stateful) -> Result:
    first, last = stateful.evaluation.first or {}, stateful.evaluation.last or {}
    stopped = stateful.progress.stopped
    return Result(
        run=str(folder.path),
        steps=stateful.progress.step,
        eval_before=first.get("accuracy"),
        eval_after=last.get("accuracy"),
        eval_reward_before=first.get("reward"),
        eval_reward_after=last.get("reward"),
        seconds=round(stateful.clock.seconds, 1),
        seed=job.seed,
        commit=git_commit(),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        version=__version__,
        stopped_by=None if stopped is None or stateful.progress.step == stateful.progress.total else int(stopped),
    )


def _closing_line(result: Result, total: int) -> str:
    if result.stopped_by is not None:
        return f"stopped after step {result.steps} of {total}; go on with: groupwise resume {result.run}"
    took = f"{duration(result.seconds)} · run: {result.run}"
    if result.eval_before is None or result.eval_after is None:
        return f"done in {took}"
    return f"held-out accuracy {result.eval_before:.2f} -> {result.eval_after:.2f} in {took}"


def _hand_over(
    data: Rows | None, eval_data: Rows | None, reward: RewardFunction | Sequence[RewardFunction] | None, trust: bool
) -> tuple[Given, dict[str, Any]]:
    """What is named goes into the job, what is an object goes beside it under a name of its own."""
    named: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    for key, rows in (("data", data), ("eval_data", eval_data)):
        if isinstance(rows, str | Path) or rows is None:
            named[key] = rows
        else:
            named[key], objects[key] = f"{PYTHON}rows", rows
    functions = [reward] if isinstance(reward, str) or callable(reward) else list(reward or ())
    handed = [function for function in functions if not isinstance(function, str)]
    if functions:
        named["reward"] = [f if isinstance(f, str) else PYTHON + getattr(f, "__name__", "reward") for f in functions]
    return Given(handed, objects.get("data"), objects.get("eval_data"), trust), named


def _opened(
    target: str | Path, overrides: Sequence[str], which: str, given: Given, named: Mapping[str, Any]
) -> tuple[Job, Model, int]:
    """A job and its model, with a run's weights where the target is a run. Also the step that they are from."""
    folder = RunFolder(Path(target))
    in_run = folder.job.is_file()
    job = load_job(folder.job if in_run else target, overrides, named).job
    model = open_model(job.model_copy(update={"objective": job.objective.model_copy(update={"beta": 0.0})}), given, _to_stderr)
    if not in_run or which == "base":
        return job, model, 0
    saved = checkpoint.load(folder.best) if which == "best" else checkpoint.latest(folder.checkpoints, _to_stderr)
    if saved is None:
        raise RunFolderError(f"{target} has no checkpoint yet.")
    own = dict(model.loaded.policy.model.named_parameters()) | dict(model.loaded.policy.model.named_buffers())
    with torch.no_grad():
        for name, tensor in saved.tensors("model").items():
            own[name].copy_(tensor)
    return job, model, saved.step


def _read_job(folder: RunFolder) -> Job:
    return load_job(folder.job).job


def _check_changes(old: Job, new: Job, fork: bool, say: Callable[[str], None]) -> None:
    changed = differences(old, new)
    for one in changed:
        say(f"{one.key}: {one.old!r} -> {one.new!r}")
    fixed = [one.key for one in changed if not one.resumable]
    if fixed and not fork:
        raise ConfigError(
            f"A resumed run cannot change {', '.join(fixed)}: it would no longer be the same run. Keys that may change: "
            f"{', '.join(resumable_keys())}. Use --fork NEW_FOLDER to start a new run from the checkpoint."
        )


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)
