"""From a job to the objects that run it: the one place that maps names to classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial

import psutil
import torch

from groupwise.config import BUILTIN, TRAINED_REWARD_MODEL, Job
from groupwise.cpu.malloc import keep_freed_memory
from groupwise.data.files import PromptSet, check_keys, load_prompts
from groupwise.data.objects import Splits, of_split
from groupwise.data.remarks import in_both, remarks
from groupwise.data.stream import PromptStream
from groupwise.demo import task
from groupwise.demo.warmup import ensure_warm
from groupwise.disk import fixed, in_words
from groupwise.engines.base import Engine
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.processes import PooledEngine
from groupwise.errors import ConfigError, DataError, GroupwiseError, ModelError
from groupwise.learn.agreement import Guard
from groupwise.learn.learner import Learner
from groupwise.learn.reference import NoPenalty, NoReference, Reference, RewardPenalty
from groupwise.models.cast import cast_to_compute_dtype
from groupwise.models.load import LoadedPolicy, choose_device, choose_dtype, load_config, load_policy
from groupwise.models.size import parameter_count, weight_bytes
from groupwise.progress import Progress
from groupwise.reward_models.labels import FileLabels, LabelSource, MonteCarloLabels, VerifierLabels, VerifierPairs
from groupwise.reward_models.learner import RewardLearner
from groupwise.reward_models.model import RewardModel
from groupwise.reward_models.monte_carlo import Completer, MonteCarlo
from groupwise.reward_models.reservoir import RoundSamples
from groupwise.reward_models.rounds import NoRounds, RewardModelRounds, Rounds, Task
from groupwise.rewards.functions.calls import FunctionCalls
from groupwise.rewards.patience import Patience
from groupwise.rewards.scorer import Scorer
from groupwise.rewards.steps import segmenter_of
from groupwise.run.evaluate import Evaluation, NoEvaluation, Schedule
from groupwise.run.guarded import GuardedEngine
from groupwise.run.loop import Parts
from groupwise.run.rollouts import GroupSampler, Rollouts
from groupwise.run.saving import Clock, Saver, Stateful
from groupwise.seeds import stable_hash
from groupwise.store.events import EventsFile, RolloutsFile
from groupwise.store.folder import RunFolder
from groupwise.tokenizer.codec import Codec
from groupwise.types import Group, Prompt
from groupwise.watch.record import Record, Recorder
from groupwise.wiring.python_objects import PYTHON_PREFIX, PythonObjects, Rows
from groupwise.wiring.reward_models import open_trained
from groupwise.wiring.scoring import as_judged, check_thread, open_functions, say_unread, scorer_of
from groupwise.wiring.settings import (
    eval_sampling_of,
    learner_settings,
    memory_settings,
    objective_of,
    reward_learner_settings,
    sampling_of,
    total_steps,
    trains_reward_model,
)

TRAINING_QUESTIONS = 8192
"""How many of the built-in questions are an epoch."""
CHECKED_PROMPTS = 64
"""How many prompts the tokenizer is tried on."""


@dataclass(frozen=True)
class Model:
    """A policy, its codec, and the folder or hub id that both came from."""

    loaded: LoadedPolicy
    codec: Codec
    source: str


def open_model(job: Job, objects: PythonObjects, say: Callable[[str], None], *, training: bool) -> Model:
    """Load the job's model and tokenizer; the built-in one is made, or taken from the cache."""
    section, source = job.model, model_source(job, say)
    if training:
        check_memory(job, source, objects.trust_remote_code)
    keep_freed_memory(choose_device(section.device))
    say(f"loading {source}")
    loaded = load_policy(
        source, revision=section.revision, device=section.device, dtype=section.dtype, layout=section.layout,
        gradient_checkpointing=memory_settings(job)[1] and training, trust_remote_code=objects.trust_remote_code,
    )  # fmt: skip
    codec = Codec.load(
        source, revision=section.revision, trust_remote_code=objects.trust_remote_code,
        chat_template_kwargs=job.data.chat_template_kwargs, date=job.data.date,
        skip_special_tokens=job.sampling.skip_special_tokens,
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


def training_prompts(job: Job, model: Model, objects: PythonObjects) -> PromptSet:
    """The job's prompts, encoded, the too long ones left out."""
    return encoded_prompts(job, model.codec, model.loaded.context, objects)


def encoded_prompts(
    job: Job, codec: Codec, context: int | None, objects: PythonObjects, limit: int | None = None
) -> PromptSet:
    """The same for a model that is not loaded, whose rows have at most `context` tokens; the first `limit` of them."""
    built_in = partial(task.questions, "train", job.seed, TRAINING_QUESTIONS)
    rows = _rows(job.data.path, objects.rows, "data", job.data.split, built_in)
    longest = _room(job, context, job.sampling.max_completion_length, "sampling.max_completion_length")
    prompts = load_prompts(job.data, codec, longest, rows=rows, limit=limit)
    if limit is None:
        check_keys(job.data, prompts)
    return prompts


def held_out_prompts(job: Job, model: Model, objects: PythonObjects) -> PromptSet | None:
    """The job's held-out prompts; None where it names none."""
    section = job.eval
    if section.data is None and job.data.path != BUILTIN:
        return None
    path = section.data or BUILTIN
    rows = _rows(path, objects.eval_rows, "eval_data", section.split, task.held_out)
    # Another split of the same data set is of the same revision; another data set has none of its own.
    other = {} if path == job.data.path else {"revision": None, "subset": None}
    data = job.data.model_copy(update={"path": path, "split": section.split, **other})
    own = "eval" if section.max_completion_length else "sampling"
    longest = _room(job, model.loaded.context, eval_sampling_of(job).max_tokens, f"{own}.max_completion_length")
    return load_prompts(data, model.codec, longest, rows=rows, limit=section.limit)


def _rows(path: str, handed: Rows | Splits | None, name: str, split: str, built_in: Callable[[], Rows]) -> Rows | None:
    """Rows that are in memory already; None where `path` names them."""
    if path == BUILTIN:
        return built_in()
    if not path.startswith(PYTHON_PREFIX):
        return None
    if handed is None:
        raise DataError(f"This job's {name} ({path}) was handed over from Python; hand it over again: {name}=rows.")
    return of_split(handed, split, "eval.split" if name == "eval_data" else "data.split")


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


def open_evaluation(
    job: Job, model: Model, objects: PythonObjects, engine: Engine, scorer: Scorer
) -> Evaluation | NoEvaluation:
    """Held-out evaluation, or its stand-in where the job names no data for it."""
    held_out = held_out_prompts(job, model, objects)
    if held_out is None:
        return NoEvaluation()
    if held_out.dropped_long:
        scorer.warn(f"{held_out.dropped_long} held-out prompts are too long and were left out")
    draw = GroupSampler(eval_sampling_of(job), job.eval.num_generations, job.seed, "eval")
    schedule = Schedule(job.eval.every, total_steps(job))
    return Evaluation(
        held_out.prompts, engine, scorer, draw, schedule, job.eval.threshold, verified=bool(job.reward.verifier)
    )


def open_engine(job: Job, model: Model, closing: ExitStack) -> Engine:
    """What samples."""
    own = NativeEngine(model.loaded.policy, model.codec, max_live=job.sampling.max_live_outputs)
    engine = PooledEngine(own)
    closing.callback(engine.close)
    return engine


def open_guard(job: Job, model: Model, warn: Callable[[str], None]) -> Guard:
    """What judges whether the sampler draws from the model that is trained."""
    return Guard(model.loaded.policy, warn, corrected=job.objective.importance_sampling != "none")


def open_sinks(watch: Recorder, job: Job, folder: RunFolder, last_step: int | None, closing: ExitStack) -> None:
    """Give `watch` its files: events and rollouts, after those of `last_step` where a run is resumed."""
    closing.callback(watch.close)
    watch.sinks.append(EventsFile(folder.events))
    if job.watch.tensorboard:
        from groupwise.watch.tensorboard import TensorBoardSink

        watch.sinks.append(TensorBoardSink(folder.tensorboard, last_step))
    watch.rollouts = RolloutsFile(folder.rollouts, job.watch.rollouts_max_bytes) if job.watch.rollouts else None


def build(
    job: Job, folder: RunFolder, objects: PythonObjects, watch: Recorder, clock: Clock, closing: ExitStack
) -> tuple[Parts, Stateful, Saver]:
    """Everything the loop needs, and what saves and restores it; what holds something is closed by `closing`.

    What is quick to refuse is opened first.
    """
    objective, warn = objective_of(job), watch.terminal.warn
    trained = cache(lambda: open_trained(job, model_source(job, watch.terminal.say), objects))
    functions = open_functions(job, objects, folder, closing, trained)
    judged, judged_given = as_judged(job, objects)
    judges = functions if judged is job else open_functions(judged, judged_given, folder, closing)
    model = open_model(job, objects, watch.terminal.say, training=True)
    patience = Patience(job.reward.patience, total_steps(job))
    scorer = scorer_of(job, functions, model.codec, warn, patience)
    judge = scorer_of(judged, judges, model.codec, warn, patience)
    check_thread(objects, warn)
    prompts = training_prompts(job, model, objects)
    _check_prompts(prompts, model.codec, warn)
    say_unread(job, prompts.prompts, (functions, judges), watch.terminal.say)
    engine, guard = open_engine(job, model, closing), open_guard(job, model, warn)
    evaluation = open_evaluation(job, model, objects, GuardedEngine(engine, guard, "In held-out outputs"), judge)
    if isinstance(evaluation, Evaluation) and (known := in_both(prompts.prompts, evaluation.prompts)):
        warn(known)
    learner = Learner(model.loaded.policy, objective, learner_settings(job, model.loaded.compute_dtype), guard)
    reference = Reference(learner.policy) if objective.needs_reference else NoReference()
    penalty = (
        RewardPenalty(learner, reference, objective.beta)
        if objective.kl_in_reward and isinstance(reference, Reference)
        else NoPenalty()
    )
    stream = PromptStream(prompts.prompts, seed=job.seed, shuffle=job.data.shuffle)
    draw = GroupSampler(sampling_of(job), job.sampling.num_generations, job.seed, "train")
    progress = Progress(job.train.iterations, job.train.steps)
    for one in (scorer, judge):
        one.follow(stream, job.train.prompts_per_step)
    rounds: Rounds = NoRounds()
    verifier: Scorer | None = None
    if trains_reward_model(job):
        first = GuardedEngine(engine, guard, "In outputs for the reward model")
        if job.reward.verifier:
            verifier = Scorer(judges.rewards, None, total_steps(job), warn, patience=patience)
            verifier.follow(stream, job.train.prompts_per_step)
        rounds = _open_rounds(
            _Opened(_placed(job), objects, folder, watch, model, prompts.prompts, first, progress), trained(), verifier,
            functions.segmenter,
        )  # fmt: skip
    stateful = Stateful(progress, stream, learner, reference, evaluation, clock, rounds, patience)
    saver = Saver(folder, job.checkpoint, stateful, watch)
    parts = Parts(
        progress=progress,
        rollouts=Rollouts(stream, engine, scorer, draw, job.train.prompts_per_step, prompts.dropped_long),
        objective=objective,
        learner=learner,
        reference=reference,
        penalty=penalty,
        rounds=rounds,
        evaluation=evaluation,
        checkpoints=saver,
        watch=watch,
        num_iterations=job.train.num_iterations,
    )
    return parts, stateful, saver


def _placed(job: Job) -> Job:
    """The job with the folders that a round opens by and by, wherever a reward has taken this process until then."""
    completer = job.reward_model.completer
    changes = {
        "model": job.model.model_copy(update={"path": fixed(job.model.path)}),
        "reward_model": job.reward_model.model_copy(update={"completer": completer and fixed(completer)}),
    }
    return job.model_copy(update=changes)


@dataclass(frozen=True)
class _Opened:
    """What of a job is open when its reward model's rounds are."""

    job: Job
    objects: PythonObjects
    folder: RunFolder
    watch: Recorder
    model: Model
    prompts: Sequence[Prompt]
    engine: Engine
    progress: Progress


def _open_rounds(
    opened: _Opened, trained: RewardModel, verifier: Scorer | None, segmenter: FunctionCalls | None
) -> RewardModelRounds:
    """The rounds of the reward model that a run trains."""
    job, section, prompts = opened.job, opened.job.reward_model, opened.prompts
    draw = GroupSampler(sampling_of(job), job.sampling.num_generations, job.seed, TRAINED_REWARD_MODEL)

    def first() -> Sequence[Group]:
        stream = PromptStream(prompts, seed=stable_hash(job.seed, TRAINED_REWARD_MODEL), shuffle=True)
        return draw.sample(opened.engine, stream.take(min(section.first_prompts, len(prompts))), 0)

    sources: dict[str | None, LabelSource] = {
        "verifier": VerifierLabels(job.eval.threshold),
        "pairs": VerifierPairs(job.eval.threshold),
        "monte_carlo": MonteCarloLabels(lambda closing: _open_labeller(opened, verifier, segmenter, closing)),
    }
    dtype = choose_dtype(job.model.dtype, trained.device)
    task = Task(
        learner=RewardLearner(trained, reward_learner_settings(job, dtype)),
        labels=sources.get(section.labels) or FileLabels(str(section.labels)),
        verifier=verifier,
        threshold=job.eval.threshold,
        first=first,
        settings=section,
        seed=job.seed,
        progress=opened.progress,
        watch=opened.watch,
        model_folder=opened.folder.path / TRAINED_REWARD_MODEL,
    )
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    return RewardModelRounds(task, RoundSamples(section.prompts_per_round, job.seed, by_id))


def _open_labeller(
    opened: _Opened, verifier: Scorer | None, segmenter: FunctionCalls | None, closing: ExitStack
) -> tuple[MonteCarlo, Codec | None]:
    """What labels steps by continuations of a completer, which is loaded now: the policy as it was before training, or
    a model of its own, with its own tokenizer."""
    assert verifier is not None
    job, section, step = opened.job, opened.job.reward_model, opened.progress.step
    if section.completer is not None:
        own = job.model.model_copy(update={"path": section.completer, "revision": None})
        job = job.model_copy(update={"model": own})
    completer = open_model(job, opened.objects, lambda line: None, training=False)
    cast_policy(completer)
    guard = Guard(completer.loaded.policy, opened.watch.terminal.warn)
    engine = GuardedEngine(open_engine(job, completer, closing), guard, "In continuations")
    labeller = MonteCarlo(
        engine, lambda groups: verifier(groups, Record(step)), completer.codec,
        segmenter_of(job.process, completer.codec, segmenter),
        Completer(section.continuations, sampling_of(job), job.seed, completer.loaded.context),
        soft=section.soft_labels, threshold=job.eval.threshold,
    )  # fmt: skip
    return labeller, completer.codec if section.completer is not None else None


def cast_policy(model: Model) -> None:
    """Compute as training does, which samples in the narrow type."""
    cast_to_compute_dtype(model.loaded.policy.model, model.loaded.compute_dtype)


def _check_prompts(prompts: PromptSet, codec: Codec, warn: Callable[[str], None]) -> None:
    """Say what was left out, and hold the tokenizer against what is left. Raises ModelError where it loses text."""
    if prompts.dropped_long:
        warn(f"{prompts.dropped_long} prompts are too long and were left out")
    first = prompts.prompts[:CHECKED_PROMPTS]
    texts = [codec.render(prompt.content, prompt.template_options) for prompt in first]
    for warning in [*codec.check(texts), *remarks(prompts.prompts, codec)]:
        warn(warning)
