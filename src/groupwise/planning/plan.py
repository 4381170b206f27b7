"""What a job will take on this machine, told before its weights are read: memory by component, time by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedConfig

from groupwise.config import BUILTIN, Job
from groupwise.demo.model import character_tokenizer, small_model
from groupwise.demo.task import ALPHABET
from groupwise.disk import in_words
from groupwise.errors import DataError, ModelError
from groupwise.learn.lanes import most_lanes
from groupwise.models.load import choose_device, choose_dtype, choose_layout, context_length, load_config
from groupwise.models.probe import probe
from groupwise.models.size import parameter_count, weight_bytes
from groupwise.objective import Objective
from groupwise.planning.fit import NOTHING_FITS
from groupwise.planning.hardware import measure
from groupwise.planning.meter import Cost
from groupwise.planning.sampling import SamplingCosts, sampling_costs
from groupwise.planning.trace import Shape, TracedModel
from groupwise.readable import duration
from groupwise.reward_models.model import Source
from groupwise.tokenizer.codec import Codec
from groupwise.wiring.memory import available_memory
from groupwise.wiring.prompts import encoded_prompts
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.reward_models import reward_model_bytes
from groupwise.wiring.settings import memory_settings, objective_of
from groupwise.wording import one_line

READ_PROMPTS = 4096
"""How many prompts are looked at, at most, for their lengths."""
ASSUMED_PROMPT = 512
"""Tokens of a prompt where neither the data nor `data.max_prompt_length` tells."""
ROOM = 0.95
"""The share of what is free that a plan may fill: allocators round up."""

OPTIMIZER_BYTES = 44
"""Read and written per parameter by an update: norm 4, clipping 8, AdamW 28, gradients to zero 4."""
CAST_BYTES = 6
"""The same for the narrow copy."""


@dataclass(frozen=True)
class Plan:
    """What a job takes on this machine, with outputs at their full length.

    Bytes: `memory` stays, by component; `passes` come one after the other, so that `needed` is all that stays and the
    largest of them. `activations` tells what forward and backward of the largest micro-batch are made of, and what
    they would be with gradient checkpointing switched. `seconds` are those of a step, by phase. What would do is
    `tokens_per_micro_batch` and `gradient_checkpointing`: the job's own values where it fits.
    """

    model: str
    device: str
    dtype: str
    layout: str
    prompts: str
    longest_prompt: int
    memory: Mapping[str, int]
    passes: Mapping[str, int]
    activations: Mapping[str, int]
    needed: int
    free: int
    verdict: str
    fits: bool
    tokens_per_micro_batch: int
    gradient_checkpointing: bool
    seconds: Mapping[str, float]

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, without rewards and evaluation."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self) | {"step_seconds": self.step_seconds}


@dataclass(frozen=True)
class _Prompts:
    """How long prompts are, in tokens, and how that is known."""

    longest: int
    mean: float
    source: str


@dataclass(frozen=True)
class _Planned:
    """A job, and what is known of its model before there are weights."""

    job: Job
    traced: TracedModel
    device: torch.device
    objective: Objective
    parameters: int
    cached: bool
    prompts: _Prompts
    trust: bool = False
    _costs: dict[tuple[tuple[int, ...], bool], Cost] = field(default_factory=dict)

    def shape(self, prompt: int) -> Shape:
        """A step of prompts of this length, with outputs at full length."""
        sampling = self.job.sampling
        return Shape(self.job.train.prompts_per_step, sampling.num_generations, prompt, sampling.max_completion_length)

    def update(self, prompt: int) -> Shape:
        """What one optimizer update takes of a step: its share of the groups."""
        step = self.shape(prompt)
        return replace(step, groups=-(-step.groups // self.job.train.updates_per_batch))

    def sampling(self, prompt: int) -> SamplingCosts:
        """What sampling a step of prompts of this length takes."""
        most = self.job.sampling.max_live_outputs
        return sampling_costs(
            self.traced, self.shape(prompt), most, self.cached, self.parameters, alone=self.job.engine.kind == "native"
        )

    @property
    def most_lanes(self) -> int:
        """How many micro-batches may be computed at once."""
        return most_lanes(self.parameters, self.device)

    @property
    def lanes(self) -> int:
        """How many are, in an update of the longest prompts."""
        return self.update(self.prompts.longest).lanes(self.most_lanes)

    def peak(self, budget: int, checkpointing: bool) -> int:
        """Bytes of the largest micro-batches, one in each lane."""
        return self.lanes * round(self.training(budget, checkpointing).peak)

    def training(self, budget: int, checkpointing: bool) -> Cost:
        """Forward and backward of the largest micro-batch within a budget; the same one is looked at once."""
        shape = self.update(self.prompts.longest)
        part = shape.parts(budget, self.traced.layout == "shared", self.most_lanes)[0]
        if (part, checkpointing) not in self._costs:
            self._costs[part, checkpointing] = self.traced.training(shape, part, checkpointing)
        return self._costs[part, checkpointing]


def plan_of(job: Job, objects: PythonObjects | None = None, *, memory_only: bool = False) -> Plan:
    """What a job will take on this machine, told in seconds and without its weights. Raises GroupwiseError.

    With `memory_only` it tells no time and no other way to keep activations, which takes two thirds as long.
    """
    planned = _planned(job, objects or PythonObjects())
    traced, prompts = planned.traced, planned.prompts
    held = weight_bytes(planned.parameters, traced.dtype, planned.objective.needs_reference)
    sampling = planned.sampling(prompts.longest)
    held["gradients of other lanes"] = 4 * planned.parameters * (planned.lanes - 1)
    held |= sampling.stores
    own = planned.parameters if job.model.path == BUILTIN else Source(job.model.path, job.model.revision, planned.trust)
    held |= reward_model_bytes(job, own, planned.trust, traced.dtype)
    stays, free = sum(held.values()), available_memory(planned.device)
    budget, checkpointing = memory_settings(job)
    training = planned.training(budget, checkpointing)
    peak = planned.peak(budget, checkpointing)
    passes = {**sampling.passes, "forward and backward of the largest micro-batch": peak}
    would_do = _what_fits(planned, int(ROOM * free) - stays, max(sampling.passes.values()))
    return Plan(
        model=f"{job.model.path}: {traced.config.model_type}, {planned.parameters / 1e6:,.1f}M parameters",
        device=str(planned.device), dtype=str(traced.dtype).removeprefix("torch."), layout=traced.layout,
        prompts=prompts.source, longest_prompt=prompts.longest,
        memory={name: size for name, size in held.items() if size}, passes=passes,
        activations={} if memory_only else _activations(planned, training),
        needed=stays + max(passes.values()), free=free,
        verdict=_verdict(job, would_do), fits=would_do == (budget, checkpointing),
        tokens_per_micro_batch=would_do[0] if would_do else budget,
        gradient_checkpointing=would_do[1] if would_do else checkpointing,
        seconds={} if memory_only else _seconds(planned, sampling, training),
    )  # fmt: skip


def _planned(job: Job, objects: PythonObjects) -> _Planned:
    device = choose_device(job.model.device)
    config = _config(job, objects)
    findings = probe(config, objects.trust_remote_code)
    if findings.unfit:
        raise ModelError(f"The model {job.model.path} ({config.model_type}) cannot be trained: {findings.unfit}.")
    layout = choose_layout(job.model.layout, findings, job.model.path)
    traced = TracedModel(
        config, layout, findings.head, choose_dtype(job.model.dtype, device), device, objects.trust_remote_code,
        direct=findings.direct,
    )  # fmt: skip
    count = parameter_count(config, objects.trust_remote_code)
    return _Planned(
        job,
        traced,
        device,
        objective_of(job),
        count,
        findings.cached,
        _prompts(job, objects, config),
        objects.trust_remote_code,
    )


def _config(job: Job, objects: PythonObjects) -> PreTrainedConfig:
    if job.model.path == BUILTIN:
        made: PreTrainedConfig = small_model(len(character_tokenizer(ALPHABET))).config
        return made
    return load_config(job.model.path, revision=job.model.revision, trust_remote_code=objects.trust_remote_code)


def _prompts(job: Job, objects: PythonObjects, config: PreTrainedConfig) -> _Prompts:
    context = context_length(config)
    try:
        codec = _codec(job, objects)
        found = encoded_prompts(job, codec, context, objects, READ_PROMPTS).prompts
    except (ModelError, DataError) as error:
        # Without a tokenizer or data there is still a plan, for prompts of an assumed length.
        limit, room = job.data.max_prompt_length, (context or ASSUMED_PROMPT * 2) - job.sampling.max_completion_length
        length = limit or max(1, min(ASSUMED_PROMPT, room))
        why = "data.max_prompt_length" if limit else "assumed: set data.max_prompt_length"
        return _Prompts(length, length, f"{length:,} tokens ({why}), because they cannot be read: {one_line(error)}")
    lengths = [len(prompt.token_ids) for prompt in found]
    mean = fmean(lengths)
    return _Prompts(max(lengths), mean, f"at most {max(lengths):,} tokens, {mean:,.0f} on average, of {len(found):,}")


def _codec(job: Job, objects: PythonObjects) -> Codec:
    if job.model.path == BUILTIN:
        return Codec(character_tokenizer(ALPHABET))
    return Codec.load(
        job.model.path, revision=job.model.revision, trust_remote_code=objects.trust_remote_code,
        chat_template_kwargs=job.data.chat_template_kwargs, date=job.data.date,
    )  # fmt: skip


def _what_fits(planned: _Planned, room: int, sampling: int) -> tuple[int, bool] | None:
    """A token budget, and whether layers are computed twice, with which a step fits into `room`; None: nothing does.

    As the job has it; else smaller micro-batches of whole groups, which cost next to nothing; else gradient
    checkpointing, which costs a third more time; else both, down to single outputs.
    """
    if sampling > room:
        return None
    job, shape = planned.job, planned.update(planned.prompts.longest)
    shared, (asked, own) = planned.traced.layout == "shared", memory_settings(job)
    group, one = (planned.lanes * shape.tokens((outputs,), shared) for outputs in (shape.outputs, 1))
    budgets = [asked]
    most = min(budgets[0], -(-shape.groups // planned.lanes) * group)
    budgets += [most >> halvings for halvings in range(1, 32) if most >> halvings >= one]
    whole = [(budget, own) for budget in budgets if budget >= group]
    again = [(budget, True) for budget in budgets] if planned.traced.can_checkpoint else []
    rest = [(budget, own) for budget in budgets]
    for budget, checkpointing in dict.fromkeys([*rest[:1], *whole, *again, *rest]):
        if planned.peak(budget, checkpointing) <= room:
            return budget, checkpointing
    return None


def _verdict(job: Job, would_do: tuple[int, bool] | None) -> str:
    if would_do is None:
        return NOTHING_FITS
    changes = []
    if would_do[1] != memory_settings(job)[1]:
        changes.append("gradient checkpointing")
    if would_do[0] != memory_settings(job)[0]:
        changes.append(f"tokens_per_micro_batch = {would_do[0]}")
    return f"fits with {' and '.join(changes)}" if changes else "fits"


def _activations(planned: _Planned, training: Cost) -> dict[str, int]:
    """What forward and backward are made of, and what they would be the other way."""
    found = {
        "kept for the backward pass": planned.lanes * round(training.kept),
        "a chunk of the head, a layer's backward": planned.lanes * round(training.peak - training.kept),
    }
    budget, own = memory_settings(planned.job)
    if planned.traced.can_checkpoint:
        found[f"in all {'without' if own else 'with'} gradient checkpointing"] = planned.peak(budget, not own)
    return found


def _seconds(planned: _Planned, sampling: SamplingCosts, training: Cost) -> dict[str, float]:
    """Seconds of a step by phase, with prompts of mean length; the costs given are those of the longest."""
    job, traced, objective = planned.job, planned.traced, planned.objective
    prompt, shared = max(1, round(planned.prompts.mean)), traced.layout == "shared"
    shape, update = planned.shape(prompt), planned.update(prompt)
    budget, checkpointing = memory_settings(job)
    parts = update.parts(budget, shared, planned.most_lanes)
    if shape.prompt < planned.prompts.longest:
        sampling = planned.sampling(prompt)
        training = traced.training(shape, parts[0], checkpointing)
    first = shape.tokens(parts[0], shared)
    share = sum(shape.tokens(part, shared) for part in parts) / first * shape.groups / update.groups
    weights = planned.parameters * traced.dtype.itemsize
    rates = measure(traced, few=sampling.rows, many=first, cached=planned.cached)
    outputs = shape.groups * shape.outputs
    decoding = rates.decoding(sampling.halfway, weights)
    updates = job.train.num_iterations * job.train.updates_per_batch
    forwards = (updates > 1) + objective.kl_in_loss + 2 * objective.kl_in_reward
    scoring = share * rates.seconds(traced.scoring(shape, parts[0])) if forwards else 0.0
    learning = share * rates.seconds(training, training=True)
    cast_policy = traced.dtype.itemsize < torch.float32.itemsize
    touched = planned.parameters * (OPTIMIZER_BYTES + (CAST_BYTES if cast_policy else 0))
    found = {
        "prefill": rates.seconds(sampling.prefill) * outputs / sampling.rows,
        "decode": decoding * shape.length * -(-outputs // sampling.rows),
        "old and reference log-probs": forwards * scoring,
        "forward and backward": learning * job.train.num_iterations,
        "optimizer": updates * touched / rates.bytes_memory,
    }
    return {name: value for name, value in found.items() if value}


def in_text(plan: Plan) -> str:
    """A plan for people."""
    lines = [
        plan.model, f"{plan.dtype} on {plan.device}, {plan.layout} layout; prompts: {plan.prompts}",
        "", "memory, outputs at full length",
        *(_line(name, in_words(size)) for name, size in plan.memory.items()),
        "  and one after the other",
        *(_line(name, in_words(size)) for name, size in plan.passes.items()),
        "  of the last",
        *(_line(name, in_words(size)) for name, size in plan.activations.items()),
        _line("needed", in_words(plan.needed)), _line("free", in_words(plan.free)),
        f"verdict: {plan.verdict}; tokens_per_micro_batch = {plan.tokens_per_micro_batch}",
        "", "time per step, outputs at full length, without rewards and evaluation",
        *(_line(name, duration(seconds)) for name, seconds in plan.seconds.items()),
        _line("in all", duration(plan.step_seconds)),
    ]  # fmt: skip
    return "\n".join(lines)


def _line(name: str, value: str) -> str:
    return f"  {name:<48}{value:>12}"
