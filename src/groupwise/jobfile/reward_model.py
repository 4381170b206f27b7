"""The job of training a reward model: its keys, and reading them from options, `--set` and the run folder."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from groupwise.config import Section, is_resumable
from groupwise.errors import ConfigError
from groupwise.jobfile.checks import day_problems
from groupwise.jobfile.effects import beside
from groupwise.jobfile.elsewhere import OF_REWARD_MODELS
from groupwise.jobfile.load import at_home, parse_override
from groupwise.jobfile.phrases import advice, as_toml, choices, found, suggestion, wanted

TASK: Final = "reward-model"
"""What the job file of such a run says that it is."""


def _resumable(default: Any = ..., **constraints: Any) -> Any:
    return Field(default, json_schema_extra={"resumable": True}, **constraints)


class RewardModelJob(Section):
    """The training of a reward model."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    task: Literal["reward-model"] = "reward-model"
    """What the run is."""
    kind: Literal["outcome", "process"]
    """`outcome` scores whole outputs, `process` each step of them."""
    model: str
    """The backbone, or a reward model to go on with: a Hugging Face folder or hub id."""
    data: str
    """Examples: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a `datasets` folder or a hub id."""
    run: str = _resumable("runs/reward-model")
    """The run folder; the trained model is in its `model`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id of `model`."""
    split: str = "train"
    """Split of a `datasets` folder or hub data set."""
    eval_data: str | None = None
    """Held-out examples, as `data`."""
    eval_share: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts of `data` that is held out where there is no `eval_data`."""
    eval_every: int = _resumable(0, ge=0)
    """Updates between evaluations; 0: before the first and after the last only."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides a new head, what is held out, and the order of examples."""
    device: str = _resumable("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", examples=["auto", "cpu", "cuda", "cuda:1"])
    """Where it trains; `auto` is CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What forward and backward compute in (master weights are float32). `auto`: bfloat16 on CUDA, else float32."""
    separator: str | None = None
    """For `process`: what follows each step; its last token is judged. Default: as stored with `model`, else a line
    break."""
    date: str | None = Field(None, pattern=r"^\d{4}-\d{2}-\d{2}$", examples=["2026-12-01"])
    """The day that a chat template is told it is. Default: that on which the run starts; it stands in the run's job."""
    max_length: int | None = Field(None, ge=1)
    """Longest example in tokens; longer ones are counted and left out. Default: the model's context."""
    epochs: int = Field(1, ge=1)
    """Passes over the examples."""
    batch_size: int = Field(32, ge=1)
    """Examples per update; a pair of outputs is one."""
    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate of AdamW (the default is the paper's)."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up; `linear` and `cosine` would reach 0 at the update after the last."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the learning rate rises to its peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay; not applied to biases and norms."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient is clipped to this norm."""
    tokens_per_micro_batch: int = Field(16384, ge=1)
    """Tokens of a forward and backward pass, padding included; less takes less memory and changes no gradient."""
    checkpoint_every: int = _resumable(50, ge=0)
    """Updates between checkpoints; 0: none by their number."""
    checkpoint_minutes: float = _resumable(10.0, ge=0)
    """An update that ends so many minutes after the last checkpoint makes one too; 0: none by time. There is always one
    at the end and when interrupted."""


def load_reward_job(
    options: Mapping[str, Any], overrides: Sequence[str] = (), base: Path | None = None
) -> RewardModelJob:
    """The job that options by name and `--set` texts describe, on top of the job file `base` where there is one.

    An option of None was not given. Raises ConfigError.
    """
    values: dict[str, Any] = {} if base is None else _read(base)
    values |= {key: value for key, value in options.items() if value is not None}
    for text in overrides:
        key, value = parse_override(text)
        values[key] = value
    known = list(RewardModelJob.model_fields)
    for key in values:
        if key not in known:
            raise ConfigError(f"A reward model's job has no key `{key}`.{suggestion(key, known, OF_REWARD_MODELS)}")
    missing = [name for name in ("kind", "model", "data") if name not in values]
    if missing:
        raise ConfigError(f"Training a reward model needs --{missing[0]}.")
    values |= {key: at_home(values[key]) for key in ("model", "data", "eval_data", "run") if key in values}
    try:
        job = RewardModelJob.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_complaint(str(error.errors()[0]["loc"][0]), values)) from None
    if not job.run.strip():
        raise ConfigError("`run` is empty, and a run needs a folder of its own: name one, as in --run runs/mine.")
    for problem in day_problems("date", job.date):
        raise ConfigError(problem)
    if job.kind == "outcome" and job.separator is not None:
        raise ConfigError("`separator` has no effect with --kind outcome, which judges no steps. Remove it.")
    for problem in _without_effect(job):
        raise ConfigError(problem)
    return job


def _without_effect(job: RewardModelJob) -> Iterator[str]:
    """Keys that this training would not read."""
    fields = RewardModelJob.model_fields
    if job.revision is not None and Path(job.model).is_dir():
        yield f"`revision` has no effect beside the folder {job.model}: revisions are those of the hub. Remove it."
    whys = [beside(path, "split") for path in (job.data, job.eval_data) if path is not None]
    if all(whys) and job.split != fields["split"].default:
        yield f'`split` = "{job.split}" has no effect beside {whys[0]}. Remove it.'
    if job.eval_data is not None and job.eval_share != fields["eval_share"].default:
        yield "`eval_share` has no effect beside `eval_data`, which is what is held out. Remove one of them."
    if job.eval_data is None and job.eval_share == 0 and job.eval_every:
        yield "`eval_every` has no effect where `eval_share` is 0: nothing is held out. Remove it."


def changed_keys(old: RewardModelJob, new: RewardModelJob) -> dict[str, bool]:
    """The keys in which two jobs differ, and whether they may when a run is resumed."""
    fields = RewardModelJob.model_fields
    return {key: is_resumable(fields[key]) for key in fields if getattr(old, key) != getattr(new, key)}


def is_reward_model_run(run: Path) -> bool:
    """Whether a run folder is one of a reward model's training."""
    try:
        return _read(run / "job.toml").get("task") == TASK
    except ConfigError:
        return False


def reference() -> str:
    """The keys as a table, for the documentation."""
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for name, field in RewardModelJob.model_fields.items():
        default = "" if field.is_required() else "not set" if field.default is None else f"`{as_toml(field.default)}`"
        meaning = " ".join(str(field.description).split())
        mark = " †" if is_resumable(field) else ""
        cells = (f"`{name}`{mark}", wanted(field), default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The job file {path} cannot be read: {error}.") from error


def _complaint(key: str, values: Mapping[str, Any]) -> str:
    value, field = values[key], RewardModelJob.model_fields[key]
    near = suggestion(value, choices(field)) if isinstance(value, str) and choices(field) else ""
    return f"`{key}` takes {wanted(field)}; found {found(value)}.{near}{advice(field, value)}"
