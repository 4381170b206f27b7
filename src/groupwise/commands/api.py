"""What the command line and Python call: train, plan, doctor, resume, evaluate, sample, label, export."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from groupwise.commands.asking import asked, trained_on
from groupwise.commands.inputs import check_export, check_job, check_overrides, check_reward_model_job, check_weights
from groupwise.commands.resuming import Start, edits, refuse_changes, start_of
from groupwise.commands.session import Result, run_job
from groupwise.config import Job
from groupwise.data.objects import rows_or_splits
from groupwise.diagnosis.doctor import examine
from groupwise.diagnosis.findings import Report
from groupwise.engines.mailbox import Mailbox, generate
from groupwise.errors import ConfigError, DataError, RunFolderError
from groupwise.jobfile import at_home, differences, load_job, refuse_loaded
from groupwise.jobfile.reward_model import load_reward_job
from groupwise.learn.learner import check_shapes
from groupwise.models.load import quiet_transformers, without_bars
from groupwise.models.multimodal import with_towers
from groupwise.run.evaluate import Evaluation
from groupwise.run.guarded import GuardedSampler
from groupwise.run.saving import Clock
from groupwise.store import checkpoint
from groupwise.store.checkpoint import Checkpoint
from groupwise.store.export import DTYPES, exported_dtype, model_card
from groupwise.store.folder import RunFolder
from groupwise.store.written import Rounding, write_folder
from groupwise.streams import ERR, output
from groupwise.types import Completion, Message, Request
from groupwise.watch.record import Record
from groupwise.watch.terminal import Mode
from groupwise.wiring.engines import open_engine, open_guard
from groupwise.wiring.models import Model, cast_policy, open_model
from groupwise.wiring.parts import open_evaluation
from groupwise.wiring.python_objects import PYTHON_PREFIX, PythonObjects
from groupwise.wiring.scoring import as_judged, open_functions, scorer_of
from groupwise.wiring.settings import eval_sampling_of

if TYPE_CHECKING:
    from groupwise.commands.label import LabelResult
    from groupwise.commands.reward_training import RewardResult
    from groupwise.planning.plan import Plan

Rows = str | Path | Iterable[Mapping[str, Any]]
Functions = str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None


@without_bars()
def train(
    job: str | Path | None = None, *, model: str | Path | None = None, data: Rows | None = None,
    reward: Functions = None, step_reward: Functions = None, verifier: Functions = None, eval_data: Rows | None = None,
    run: str | Path | None = None, overrides: Sequence[str] = (), show: Mode = "auto", trust_remote_code: bool = False,
    **options: Any,
) -> Result:  # fmt: skip
    """Train a model by GRPO and return what came of it.

    `job` is a job file or a recipe's name; everything else overrides it: `data` and `eval_data` are paths, hub ids or
    rows (dicts with a `prompt`), `reward`, `step_reward` and `verifier` a `file.py:name`, a function, or several; any
    knob of the job goes by its name (`learning_rate=1e-5`) or in `overrides` (`"train.steps=10"`). `show` is auto,
    plain, quiet or json. Raises GroupwiseError where the job cannot be run.
    """
    clock = Clock()
    objects, named = _hand_over((data, eval_data), (reward, step_reward, verifier), trust_remote_code)
    resolved = load_job(job, overrides, {"model": model, "run": run, **named, **options})
    check_job(resolved.job)
    folder = RunFolder.create(Path(resolved.job.run))
    with folder.lock():
        return run_job(resolved.job, folder, objects, show, clock, Start())


@without_bars()
def plan(
    job: str | Path | None = None, *, model: str | Path | None = None, data: Rows | None = None,
    reward: Functions = None, step_reward: Functions = None, verifier: Functions = None, eval_data: Rows | None = None,
    run: str | Path | None = None, overrides: Sequence[str] = (), trust_remote_code: bool = False, **options: Any,
) -> Plan:  # fmt: skip
    """Tell what `train` of the same arguments would take on this machine: memory by component, seconds by phase.

    Takes seconds and reads no weights: a folder with a config.json is enough. Raises GroupwiseError.
    """
    from groupwise.planning.plan import plan_of  # what traces a model is not needed to train it

    objects, named = _hand_over((data, eval_data), (reward, step_reward, verifier), trust_remote_code)
    resolved = load_job(job, overrides, {"model": model, "run": run, **named, **options})
    check_job(resolved.job, functions=False)
    return plan_of(resolved.job, objects)


@without_bars()
def train_reward_model(
    kind: str, *, model: str | Path, data: Rows, eval_data: Rows | None = None, run: str | Path | None = None,
    overrides: Sequence[str] = (), show: Mode = "auto", trust_remote_code: bool = False, **options: Any,
) -> RewardResult:  # fmt: skip
    """Train a reward model of outputs (`kind` "outcome") or of steps ("process") and return what came of it.

    `model` is its backbone; `data` and `eval_data` are paths, hub ids or rows in TRL's columns (preferences, labelled
    outputs, labelled steps); any key of its job goes by its name (`epochs=2`) or in `overrides`. The trained model is
    the folder `model` of the run: `reward="model:runs/judge/model"` scores with it. Raises GroupwiseError.
    """
    from groupwise.commands import reward_training

    handed, named = {}, {}
    for key, one in (("data", data), ("eval_data", eval_data)):
        if one is None or isinstance(one, str | Path):
            named[key] = None if one is None else str(one)
            continue
        refuse_loaded(key, one)
        found = rows_or_splits(one, key)
        if isinstance(found, Mapping):
            raise ConfigError(f"{key} has several splits ({', '.join(found)}): give one of them.")
        handed[key], named[key] = found, PYTHON_PREFIX + "rows"
    folder = None if run is None else str(run)
    job = load_reward_job({"kind": kind, "model": str(model), "run": folder, **named, **options}, overrides)
    check_reward_model_job(job)
    given = reward_training.RewardData(handed.get("data"), handed.get("eval_data"), trust_remote_code)
    return reward_training.train_reward_model(job, given=given, show=show)


@without_bars()
def resume(
    run: str | Path, *, overrides: Sequence[str] = (), fork: str | Path | None = None,
    data: Iterable[Mapping[str, Any]] | None = None, eval_data: Iterable[Mapping[str, Any]] | None = None,
    reward: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    step_reward: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    verifier: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None, show: Mode = "auto",
    trust_remote_code: bool = False,
) -> Result:  # fmt: skip
    """Continue a run from its last whole checkpoint, exactly as if it had not been interrupted.

    Only resumable keys may be overridden; `fork` names a new folder and lifts that. Objects that were handed over from
    Python are handed over again. Raises GroupwiseError.
    """
    clock = Clock()
    objects, _ = _hand_over((data, eval_data), (reward, step_reward, verifier), trust_remote_code)
    folder = RunFolder.open(Path(run))
    old = load_job(folder.job).job
    new = load_job(folder.job, overrides, {"run": str(run if fork is None else fork)}).job
    if fork is not None:
        start = start_of(folder, new, forked=True)
        if start.saved is None:
            raise RunFolderError(f"{run} has no checkpoint to fork from; start again with `groupwise train`.")
        forked = RunFolder.create(Path(fork))
        with forked.lock():
            return run_job(new, forked, objects, show, clock, start)
    refuse_changes(differences(old, new))  # what is typed is answered before checkpoints are read
    with folder.lock():
        return run_job(new, folder, objects, show, clock, start_of(folder, new, forked=False))


@without_bars()
def evaluate(
    target: str | Path, *, overrides: Sequence[str] = (), which: str = "latest", eval_data: Rows | None = None,
    reward: Functions = None, step_reward: Functions = None, trust_remote_code: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Evaluate a run's weights (`which`: latest, best or base), or a job's model before training; `reward` judges in
    place of the job's verifier or rewards.

    Returns `reward`, `accuracy`, `pass@k`, their intervals and `mean_length`. Raises GroupwiseError.
    """
    objects, named = _hand_over((None, eval_data), (None, step_reward, reward), trust_remote_code)
    job, model, saved = _opened(target, overrides, which, objects, named)
    cast_policy(model)
    judged, objects = as_judged(job, objects)
    with ExitStack() as closing:
        scorer = scorer_of(judged, open_functions(judged, objects, None, closing), model.codec, _to_stderr)
        guard = open_guard(job, model, _to_stderr)
        sampler = GuardedSampler(Mailbox(open_engine(job, model, closing)), guard, "In held-out outputs")
        evaluation = open_evaluation(job, model, objects, sampler, scorer)
        if not isinstance(evaluation, Evaluation):
            raise ConfigError("There is nothing to evaluate on: name held-out prompts with --data, or in eval.data.")
        evaluation.run(Record(saved.step if saved else 0))
    assert evaluation.last is not None
    return evaluation.last


@without_bars()
def sample(
    target: str | Path, prompt: str | list[Message], *, raw: bool = False, system: str | None = None, n: int = 1,
    temperature: float | None = None, seed: int = 0, which: str = "latest", overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> list[Completion]:  # fmt: skip
    """Continue a prompt `n` times with a run's weights, by the job's evaluation settings.

    A text is a user's message where the run was trained on messages, unless it is `raw`; `system` begins the
    conversation. `temperature` replaces that of evaluation; 0 is greedy. Raises GroupwiseError.
    """
    objects = PythonObjects(trust_remote_code=trust_remote_code)
    job, model, _ = _opened(target, overrides, which, objects, {})
    cast_policy(model)
    known = None if raw else trained_on(job, RunFolder(Path(target)) if Path(target).expanduser().is_dir() else None)
    prompt = asked(prompt, known, raw=raw, system=system, usual=job.data.system, say=_to_stderr)
    model.codec.check([model.codec.render(prompt)])
    token_ids = model.codec.encode_prompt(prompt)
    sampling = eval_sampling_of(job)
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)
    if n > 1 and sampling.temperature == 0:
        raise ConfigError(f"At temperature 0 all {n} outputs would be the same: give a temperature above 0.")
    if model.loaded.context is not None:
        room = model.loaded.context - len(token_ids)
        if room < 1 or not token_ids:
            raise DataError(f"The prompt has {len(token_ids)} tokens; the model's context is {model.loaded.context}.")
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
    with ExitStack() as closing:
        return list(
            generate(Mailbox(open_engine(job, model, closing)), [Request("sample", token_ids, n, sampling, seed)])[0]
        )


@without_bars()
def label(
    target: str | Path | None = None, *, output: str | Path, model: str | Path | None = None, data: Rows | None = None,
    reward: Functions = None, which: str = "base", overrides: Sequence[str] = (),
    say: Callable[[str], None] | None = None, trust_remote_code: bool = False, **ask: Any,
) -> LabelResult:  # fmt: skip
    """Label the steps of outputs by continuations from the end of each, into the file `output` (`.jsonl`).

    The outputs are those of a run (`target` without `data`, or with the rows that it was handed from Python), those
    that rows bring (`completion` or `outputs`), or are sampled. What goes on is a run's weights (`which`: base, latest
    or best) or a job's model. A file that was begun by the same call is continued. `ask` is `n`, `soft`, `limit`,
    `pattern`: see `Ask`. `say` takes a line per block. Raises GroupwiseError.
    """
    from groupwise.commands.label import Ask, own_rows, write_labels

    objects, named = _hand_over((data, None), (reward, None, None), trust_remote_code)
    handed = None if isinstance(objects.rows, Mapping) else objects.rows
    named |= {"model": model}
    folder = RunFolder(Path(target)) if target is not None and Path(target).expanduser().is_dir() else None
    run = folder if folder is not None and (data is None or own_rows(folder, handed)) else None
    job, opened, saved = _opened(target, overrides, which, objects, named)
    cast_policy(opened)
    completer = {
        "model": opened.source, "revision": job.model.revision, "step": saved.step if saved else 0,
        "commit": getattr(opened.loaded.policy.model.config, "_commit_hash", None),
    }  # fmt: skip
    return write_labels(
        job, Ask(**ask), opened, objects, Path(output), run=run, completer=completer,
        say=say or _to_stderr,
    )  # fmt: skip


@without_bars()
def export(
    run: str | Path, target: str | Path, *, which: str = "latest", dtype: str = "auto", trust_remote_code: bool = False
) -> Path:  # fmt: skip
    """Write a run's weights (`which`: latest, best or base) as a Hugging Face folder and return it.

    `dtype` is float32, bfloat16, float16 or auto: that of the base model, unless it would lose much of what training
    changed, then float32. What it loses is said on standard error and in the folder's README. The folder is read back
    and compared before it takes its place. Raises GroupwiseError.
    """
    check_export(str(run), str(target), which, dtype)
    job, model, saved = _opened(run, (), which, PythonObjects(trust_remote_code=trust_remote_code), {}, load=False)
    rounding = Rounding(DTYPES.get(dtype, model.loaded.source_dtype))
    if saved is not None:
        _load(model, saved, rounding)
    chosen, lost = exported_dtype(dtype, model.loaded.source_dtype, rounding)
    if lost:
        _to_stderr(lost)
    card = model_card(job.model_dump(mode="json"), saved, lost)
    with quiet_transformers():
        whole, without = with_towers(model.loaded.policy.model, model.source, job.model.revision, trust_remote_code)
    if without:
        _to_stderr(without)
    write_folder(whole, model.codec, Path(target), source=model.source, dtype=chosen, card=card)
    return Path(target)


@without_bars()
def doctor(
    job: str | Path | None = None, *, model: str | Path | None = None, data: Rows | None = None,
    reward: Functions = None, step_reward: Functions = None, verifier: Functions = None, eval_data: Rows | None = None,
    overrides: Sequence[str] = (), trust_remote_code: bool = False, **options: Any,
) -> Report:  # fmt: skip
    """Try the library's own properties on a job's model, data and rewards, before training; nothing is written.

    The job is given as to `train`. `Report.healthy` tells whether no check failed. Raises GroupwiseError where the job
    cannot be opened at all.
    """
    objects, named = _hand_over((data, eval_data), (reward, step_reward, verifier), trust_remote_code)
    resolved = load_job(job, overrides, {"model": model, **named, **options})
    check_job(resolved.job)
    return examine(resolved.job, objects, _to_stderr)


def _hand_over(
    rows: tuple[Rows | None, Rows | None], functions: tuple[Functions, Functions, Functions], trust: bool
) -> tuple[PythonObjects, dict[str, Any]]:
    """What is named goes into the job, what is an object goes beside it under a name of its own. `rows` are those of
    training and held-out ones, `functions` score outputs, steps, and judge."""
    named: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for key, one in zip(("data", "eval_data"), rows, strict=True):
        if isinstance(one, str | Path) or one is None:
            named[key] = one
        else:
            refuse_loaded(key, one)
            data[key] = rows_or_splits(one, key)
            named[key] = PYTHON_PREFIX + ("splits" if isinstance(data[key], Mapping) else "rows")
    handed: dict[str, list[Callable[..., Any]]] = {}
    for key, those in zip(("reward", "step_reward", "verifier"), functions, strict=True):
        several = [those] if isinstance(those, str) or callable(those) else list(those or ())
        handed[key] = [function for function in several if not isinstance(function, str)]
        if several:
            named[key] = [f if isinstance(f, str) else PYTHON_PREFIX + getattr(f, "__name__", key) for f in several]
    return PythonObjects(
        handed["reward"], data.get("data"), data.get("eval_data"), trust, handed["step_reward"],
        handed["verifier"],
    ), named  # fmt: skip


def _opened(
    target: str | Path | None, overrides: Sequence[str], which: str, objects: PythonObjects, named: Mapping[str, Any],
    *, load: bool = True,
) -> tuple[Job, Model, Checkpoint | None]:  # fmt: skip
    """A job (None: the embedded one) and its model, with a run's weights where the target is a run, and the checkpoint
    that they are from; the model is as before training where `load` is false."""
    refuse_loaded("target", target)
    target = at_home(str(target)) if isinstance(target, Path) else at_home(target)
    check_weights(None if target is None else str(target), which)
    check_overrides(overrides)
    in_run = target is not None and Path(target).is_dir()
    folder = RunFolder.open(Path(target or "")) if in_run else RunFolder(Path(target or ""))
    job = load_job(folder.job if in_run else target, overrides, named, training=False).job
    saved = None
    if in_run and which != "base":
        saved = checkpoint.load(folder.best) if which == "best" else checkpoint.latest(folder.checkpoints, _to_stderr)
        if saved is None:
            raise RunFolderError(f"{target} has no checkpoint yet. Its model before training is --which base.")
        if edited := edits(folder, saved):
            _to_stderr(edited)
    model = open_model(job, objects, _to_stderr, training=False)
    if saved is not None and load:
        _load(model, saved)
    return job, model, saved


@torch.no_grad()
def _load(model: Model, saved: Checkpoint, rounding: Rounding | None = None) -> None:
    found = saved.tensors("model")
    # Parameters that the class never trains are not in a checkpoint: they stay as the base model has them.
    own: dict[str, torch.Tensor] = {n: p for n, p in model.loaded.policy.model.named_parameters() if p.requires_grad}
    own |= {name: buffer for name, buffer in model.loaded.policy.model.named_buffers() if name in found}
    check_shapes(own, found, str(saved.path))
    for name, tensor in found.items():
        if rounding is not None:
            rounding.add(own[name], tensor)
        own[name].copy_(tensor)


def _to_stderr(message: str) -> None:
    output(sys.stderr, ERR).put(message)
