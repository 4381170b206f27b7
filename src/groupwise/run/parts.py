"""From a job to the objects that run it: the one place that maps names to classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import transformers

from groupwise.config import BUILTIN, Job
from groupwise.data import arithmetic
from groupwise.data.files import PromptSet, load_prompts
from groupwise.data.stream import PromptStream
from groupwise.disk import in_words
from groupwise.engines.base import Engine
from groupwise.engines.native import NativeEngine
from groupwise.errors import ConfigError, DataError, GroupwiseError, ModelError, RewardError
from groupwise.learn.learner import Learner, LearnerSettings
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.learn.reference import NoPenalty, NoReference, Reference, RewardPenalty
from groupwise.models.codec import Codec
from groupwise.models.load import LoadedPolicy, choose_device, choose_dtype, load_config, load_policy
from groupwise.models.size import parameter_count, weight_bytes
from groupwise.objective import PRESETS, Objective, objective_named
from groupwise.rewards.adapters import FunctionCalls, ModelOptions, load_reward, load_stepwise
from groupwise.rewards.base import Reward
from groupwise.rewards.steps import segmenter_of
from groupwise.rewards.stepwise import StepReward, StepScorer, load_step_reward
from groupwise.run.evaluate import Evaluation, NoEvaluation, Schedule
from groupwise.run.folder import RunFolder
from groupwise.run.loop import Parts
from groupwise.run.progress import Progress
from groupwise.run.record import Watch
from groupwise.run.rollouts import Draw, Rollouts, Scorer
from groupwise.run.saving import Clock, Saver, Stateful
from groupwise.run.warmup import ensure_warm
from groupwise.types import Sampling
from groupwise.watch.events import EventsFile, RolloutsFile, Sink
from groupwise.watch.terminal import Terminal

PYTHON = "python:"
"""Marks, in a job, what was handed over as a Python object and cannot be named in a file."""
TRAINING_QUESTIONS = 8192
"""How many of the built-in questions are an epoch."""
BUDGET = 16384
"""Tokens of a micro-batch where memory is no question: more would take memory and no less time."""
CHECKED_PROMPTS = 64
"""How many prompts the tokenizer is tried on."""
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Given:
    """What a job file cannot hold: objects from Python, and the consent to run a model's own code."""

    rewards: Sequence[Callable[..., Any]] = ()
    rows: Rows | None = None
    eval_rows: Rows | None = None
    trust_remote_code: bool = False
    step_rewards: Sequence[Callable[..., Any]] = ()


@dataclass(frozen=True)
class Model:
    """A policy, its codec, and the folder or hub id that both came from."""

    loaded: LoadedPolicy
    codec: Codec
    source: str


def open_model(job: Job, given: Given, say: Callable[[str], None], *, training: bool) -> Model:
    """Load the job's model and tokenizer; the built-in one is made, or taken from the cache."""
    # Their bars would run through the panel, and say nothing that the next line does not.
    transformers.utils.logging.disable_progress_bar()
    section, source = job.model, model_source(job, say)
    if training:
        check_memory(job, source, given.trust_remote_code)
    loaded = load_policy(
        source, revision=section.revision, device=section.device, dtype=section.dtype, layout=section.layout,
        gradient_checkpointing=memory_settings(job)[1] and training, trust_remote_code=given.trust_remote_code,
    )  # fmt: skip
    codec = Codec.load(
        source, revision=section.revision, trust_remote_code=given.trust_remote_code,
        chat_template_kwargs=job.data.chat_template_kwargs,
    )  # fmt: skip
    rows = int(loaded.policy.model.config.get_text_config().vocab_size)
    if codec.vocab_size > rows:
        raise ModelError(
            f"The tokenizer of {source} knows {codec.vocab_size} tokens, the model has rows for {rows}: they do not "
            "belong together. Resize the model's embeddings, or take the tokenizer that it was trained with."
        )
    say(loaded.line)
    return Model(loaded, codec, source)


def model_source(job: Job, say: Callable[[str], None]) -> str:
    """The folder or hub id of the job's model; the built-in one is made first, where the cache does not have it."""
    return str(ensure_warm(job.seed, say=say)) if job.model.path == BUILTIN else job.model.path


def check_memory(job: Job, source: str, trust_remote_code: bool) -> None:
    """Refuse, before any weight is read, a job whose weights cannot fit. Raises ConfigError or ModelError."""
    shortage = lacking_memory(job, source, trust_remote_code)
    if shortage is not None:
        raise shortage


def lacking_memory(job: Job, source: str, trust_remote_code: bool) -> GroupwiseError | None:
    """What to say where a job's weights cannot fit; None where they do. Raises ModelError where it cannot be told.

    Counted is what is as large as the model, as in a plan. What depends on the batch can be made smaller, so it is no
    reason to refuse a job.
    """
    objective = objective_of(job)
    device = choose_device(job.model.device)
    count = parameter_count(load_config(source, revision=job.model.revision, trust_remote_code=trust_remote_code))
    held = weight_bytes(count, choose_dtype(job.model.dtype, device), objective.needs_reference)
    reference = held.pop("reference")
    training, free = sum(held.values()), available_memory(device)
    room = f"{in_words(training)} are needed to train its {count / 1e6:,.1f}M parameters, {in_words(free)} are free"
    if training > free:
        return ModelError(f"{source} does not fit on {device}: {room}. Use a smaller model or a larger device.")
    if training + reference > free:
        return ConfigError(
            f"`objective.beta` = {objective.beta:g} needs a reference model beside the policy, and there is no room "
            f"for its {in_words(reference)} on {device}: {room}. Set objective.beta to 0, or use a smaller model."
        )
    return None


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def memory_settings(job: Job) -> tuple[int, bool]:
    """A job's token budget, and whether layers are computed twice: where it names none, as if there were room."""
    budget = job.train.tokens_per_micro_batch or max(BUDGET, job.sampling.max_completion_length)
    return budget, bool(job.model.gradient_checkpointing)


def objective_of(job: Job) -> Objective:
    """The job's preset with the job's changes. Raises ObjectiveError where they cannot go together."""
    section = job.objective
    given = ("epsilon", "epsilon_high", "beta", "kl", "dual_clip")
    changes: dict[str, Any] = {name: value for name in given if (value := getattr(section, name)) is not None}
    preset = PRESETS[section.preset]
    if section.epsilon is not None and preset.epsilon == preset.epsilon_high:
        changes.setdefault("epsilon_high", section.epsilon)
    changes |= {name: value for name in ("step_return", "step_normalization") if (value := getattr(section, name))}
    for name, functions in (("outcome", job.reward.functions), ("process", job.reward.step_functions)):
        given_weight = getattr(section, f"{name}_weight")
        changes[f"{name}_weight"] = float(bool(functions)) if given_weight is None else given_weight
    if section.scale_rewards is not None:
        changes["scale"] = section.scale_rewards
    if section.importance_sampling != "none":
        changes |= {
            "importance_sampling": section.importance_sampling,
            "importance_sampling_cap": section.importance_sampling_cap,
        }
    return objective_named(section.preset, max_completion_length=job.sampling.max_completion_length, **changes)


def total_steps(job: Job) -> int:
    """Steps of all outer iterations."""
    return job.train.iterations * job.train.steps


def sampling_of(job: Job) -> Sampling:
    """How training outputs are drawn."""
    section = job.sampling
    return Sampling(temperature=section.temperature, max_tokens=section.max_completion_length, stop=tuple(section.stop))


def eval_sampling_of(job: Job) -> Sampling:
    """How held-out outputs are drawn: settings of their own."""
    section = job.eval
    return Sampling(
        temperature=section.temperature, top_p=section.top_p, top_k=section.top_k, stop=tuple(job.sampling.stop),
        max_tokens=section.max_completion_length or job.sampling.max_completion_length,
    )  # fmt: skip


def training_prompts(job: Job, model: Model, given: Given) -> PromptSet:
    """The job's prompts, encoded, the too long ones left out."""
    return encoded_prompts(job, model.codec, model.loaded.context, given)


def encoded_prompts(job: Job, codec: Codec, context: int | None, given: Given, limit: int | None = None) -> PromptSet:
    """The same for a model that is not loaded, whose rows have at most `context` tokens; the first `limit` of them."""
    rows = _rows(job.data.path, given.rows, "data", lambda: arithmetic.questions("train", job.seed, TRAINING_QUESTIONS))
    longest = _room(job, context, job.sampling.max_completion_length, "sampling.max_completion_length")
    return load_prompts(job.data, codec, longest, rows=rows, limit=limit)


def held_out_prompts(job: Job, model: Model, given: Given) -> PromptSet | None:
    """The job's held-out prompts; None where it names none."""
    section = job.eval
    if section.data is None and job.data.path != BUILTIN:
        return None
    path = section.data or BUILTIN
    rows = _rows(path, given.eval_rows, "eval_data", arithmetic.held_out)
    # Another split of the same data set is of the same revision; another data set has none of its own.
    other = {} if path == job.data.path else {"revision": None, "subset": None}
    data = job.data.model_copy(update={"path": path, "split": section.split, **other})
    own = "eval" if section.max_completion_length else "sampling"
    longest = _room(job, model.loaded.context, eval_sampling_of(job).max_tokens, f"{own}.max_completion_length")
    return load_prompts(data, model.codec, longest, rows=rows, limit=section.limit)


def _rows(path: str, handed: Rows | None, name: str, built_in: Callable[[], Rows]) -> Rows | None:
    """Rows that are in memory already; None where `path` names them."""
    if path == BUILTIN:
        return built_in()
    if not path.startswith(PYTHON):
        return None
    if handed is None:
        raise DataError(f"This job's {name} ({path}) was handed over from Python; hand it over again: {name}=rows.")
    return handed


def _room(job: Job, context: int | None, completion: int, key: str) -> int | None:
    """The longest prompt, in tokens, that leaves an output its length. Raises ConfigError where none does."""
    limit = job.data.max_prompt_length
    if context is None:
        return limit
    if completion + (limit or 1) > context:
        prompts = f"prompts of up to {limit} tokens (data.max_prompt_length)" if limit else "any prompt"
        raise ConfigError(
            f"`{key}` = {completion} leaves no room for {prompts} in the model's context of {context} tokens. Lower it."
        )
    return limit or context - completion


@dataclass(frozen=True)
class Functions:
    """A job's functions, loaded: those that score outputs, those that score steps, and the one that finds them."""

    rewards: Sequence[Reward]
    step_rewards: Sequence[StepReward]
    segmenter: FunctionCalls | None


def open_functions(job: Job, given: Given, folder: RunFolder | None, closing: ExitStack) -> Functions:
    """Load the job's functions; files start their workers now, so that a broken one is found at once."""
    section = job.reward
    limits: dict[str, Any] = {"timeout": section.timeout, "output_timeout": section.output_timeout}
    limits["log"] = folder.rewards_log if folder else None
    models = ModelOptions(
        section.device or job.model.device, job.model.dtype, section.step_tags, given.trust_remote_code
    )
    rewards, step_rewards = [], []
    for function in _named_or_handed(section.functions, given.rewards, "reward function", "reward"):
        rewards.append(load_reward(function, models=models, **limits))
        closing.callback(rewards[-1].close)
    for function in _named_or_handed(section.step_functions, given.step_rewards, "step reward function", "step_reward"):
        step_rewards.append(load_step_reward(function, models=models, **limits))
        closing.callback(step_rewards[-1].close)
    segmenter = None
    if job.process.function is not None:
        segmenter = load_stepwise(job.process.function, place="segmenter", kind="segmenter", **limits)
        closing.callback(segmenter.close)
    return Functions(rewards, step_rewards, segmenter)


def _named_or_handed(
    specs: Sequence[str], handed: Sequence[Callable[..., Any]], kind: str, option: str
) -> Iterator[str | Callable[..., Any]]:
    objects = iter(handed)
    for spec in specs:
        function = next(objects, None) if spec.startswith(PYTHON) else spec
        if function is None:
            raise RewardError(
                f"The {kind} {spec} was handed over from Python, not by name. Hand it over again, as in "
                f"groupwise.resume(run, {option}=function), or name one with --{option.replace('_', '-')} where that "
                "is offered."
            )
        yield function


def scorer_of(job: Job, functions: Functions, codec: Codec, warn: Callable[[str], None]) -> Scorer:
    """What scores outputs and, where the job says so, their steps."""
    steps = None
    if functions.step_rewards:
        segmenter = segmenter_of(job.process, codec, functions.segmenter)
        steps = StepScorer(segmenter, functions.step_rewards, job.reward.step_weights)
    return Scorer(functions.rewards, job.reward.weights, total_steps(job), warn, steps)


def open_evaluation(job: Job, model: Model, given: Given, engine: Engine, scorer: Scorer) -> Evaluation | NoEvaluation:
    """Held-out evaluation, or its stand-in where the job names no data for it."""
    held_out = held_out_prompts(job, model, given)
    if held_out is None:
        return NoEvaluation()
    if held_out.dropped_long:
        scorer.warn(f"{held_out.dropped_long} held-out prompts are too long and were left out")
    draw = Draw(eval_sampling_of(job), job.eval.num_generations, job.seed, "eval")
    schedule = Schedule(job.eval.every, total_steps(job))
    return Evaluation(held_out.prompts, engine, scorer, draw, schedule, job.eval.threshold)


def open_engine(job: Job, model: Model, closing: ExitStack) -> Engine:
    """What samples."""
    engine = NativeEngine(model.loaded.policy, model.codec, max_live=job.sampling.max_live_outputs)
    closing.callback(engine.close)
    return engine


def open_watch(job: Job, folder: RunFolder, terminal: Terminal, last_step: int | None, closing: ExitStack) -> Watch:
    """What writes events and rollouts, after those of `last_step` where a run is resumed."""
    sinks: list[Sink] = [EventsFile(folder.events)]
    if job.watch.tensorboard:
        from groupwise.watch.tensorboard import TensorBoardSink

        sinks.append(TensorBoardSink(folder.tensorboard, last_step))
    rollouts = RolloutsFile(folder.rollouts, job.watch.rollouts_max_bytes) if job.watch.rollouts else None
    watch = Watch(sinks, terminal, rollouts)
    closing.callback(watch.close)
    return watch


def build(
    job: Job, folder: RunFolder, given: Given, watch: Watch, clock: Clock, closing: ExitStack
) -> tuple[Parts, Stateful, Saver]:
    """Everything the loop needs, and what saves and restores it; what holds something is closed by `closing`.

    What is quick to refuse is opened first.
    """
    objective = objective_of(job)
    functions = open_functions(job, given, folder, closing)
    model = open_model(job, given, watch.terminal.say, training=True)
    scorer = scorer_of(job, functions, model.codec, watch.terminal.warn)
    prompts = training_prompts(job, model, given)
    _check_prompts(prompts, model.codec, watch.terminal.warn)
    engine = open_engine(job, model, closing)
    evaluation = open_evaluation(job, model, given, engine, scorer)
    learner = Learner(model.loaded.policy, objective, learner_settings(job, model.loaded.compute_dtype))
    reference = Reference(learner.policy) if objective.needs_reference else NoReference()
    penalty = (
        RewardPenalty(learner, reference, objective.beta, memory_settings(job)[0])
        if objective.kl_in_reward and isinstance(reference, Reference)
        else NoPenalty()
    )
    stream = PromptStream(prompts.prompts, seed=job.seed, shuffle=job.data.shuffle)
    draw = Draw(sampling_of(job), job.sampling.num_generations, job.seed, "train")
    progress = Progress(job.train.iterations, job.train.steps)
    stateful = Stateful(progress, stream, learner, reference, evaluation, clock)
    saver = Saver(folder, job.checkpoint, stateful, watch)
    parts = Parts(
        progress=progress,
        rollouts=Rollouts(stream, engine, scorer, draw, job.train.prompts_per_step, prompts.dropped_long),
        objective=objective,
        learner=learner,
        reference=reference,
        penalty=penalty,
        evaluation=evaluation,
        checkpoints=saver,
        watch=watch,
        num_iterations=job.train.num_iterations,
    )
    return parts, stateful, saver


def _check_prompts(prompts: PromptSet, codec: Codec, warn: Callable[[str], None]) -> None:
    """Say what was left out, and hold the tokenizer against what is left. Raises ModelError where it loses text."""
    if prompts.dropped_long:
        warn(f"{prompts.dropped_long} prompts are too long and were left out")
    for warning in codec.check([codec.render(prompt.content) for prompt in prompts.prompts[:CHECKED_PROMPTS]]):
        warn(warning)


def learner_settings(job: Job, compute_dtype: torch.dtype) -> LearnerSettings:
    """How the learner works for this job."""
    section = job.train
    optimizer = OptimizerSettings(
        learning_rate=section.learning_rate,
        total_updates=total_steps(job) * section.num_iterations * section.updates_per_batch,
        lr_scheduler_type=section.lr_scheduler_type, warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay, adam_beta1=section.adam_beta1, adam_beta2=section.adam_beta2,
        adam_epsilon=section.adam_epsilon, max_grad_norm=section.max_grad_norm,
    )  # fmt: skip
    return LearnerSettings(
        optimizer=optimizer, temperature=job.sampling.temperature, num_iterations=section.num_iterations,
        updates_per_batch=section.updates_per_batch, tokens_per_micro_batch=memory_settings(job)[0],
        mask_truncated=job.objective.mask_truncated_completions,
        correct_sampler=job.objective.importance_sampling != "none", compute_dtype=compute_dtype, seed=job.seed,
    )  # fmt: skip
