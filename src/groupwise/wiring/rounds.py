"""From a job to the rounds of the reward model that a run trains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from groupwise.config import TRAINED_REWARD_MODEL, Job
from groupwise.data.stream import PromptStream
from groupwise.disk import fixed
from groupwise.engines.mailbox import Mailbox, Sampler
from groupwise.learn.agreement import Guard
from groupwise.models.load import choose_dtype
from groupwise.progress import Progress
from groupwise.reward_models.labels import FileLabels, LabelSource, MonteCarloLabels, VerifierLabels, VerifierPairs
from groupwise.reward_models.learner import RewardLearner
from groupwise.reward_models.model import RewardModel
from groupwise.reward_models.monte_carlo import Completer, MonteCarlo
from groupwise.reward_models.reservoir import RoundSamples
from groupwise.reward_models.rounds import RewardModelRounds, Task
from groupwise.rewards.functions.calls import FunctionCalls
from groupwise.rewards.scorer import Scorer
from groupwise.rewards.steps import segmenter_of
from groupwise.run.guarded import GuardedSampler
from groupwise.run.rollouts import GroupSampler
from groupwise.seeds import stable_hash
from groupwise.store.folder import RunFolder
from groupwise.tokenizer.codec import Codec
from groupwise.types import Group, Prompt
from groupwise.watch.record import Record, Recorder
from groupwise.wiring.engines import open_engine
from groupwise.wiring.models import Model, cast_policy, open_model
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.settings import (
    reward_learner_settings,
    sampling_of,
)


@dataclass(frozen=True)
class Opened:
    """What of a job is open when its reward model's rounds are."""

    job: Job
    objects: PythonObjects
    folder: RunFolder
    watch: Recorder
    model: Model
    prompts: Sequence[Prompt]
    sampler: Sampler
    progress: Progress


def open_rounds(
    opened: Opened, trained: RewardModel, verifier: Scorer | None, segmenter: FunctionCalls | None
) -> RewardModelRounds:
    """The rounds of the reward model that a run trains."""
    job, section, prompts = opened.job, opened.job.reward_model, opened.prompts
    draw = GroupSampler(sampling_of(job), job.sampling.num_generations, job.seed, TRAINED_REWARD_MODEL)

    def first() -> Sequence[Group]:
        stream = PromptStream(prompts, seed=stable_hash(job.seed, TRAINED_REWARD_MODEL), shuffle=True)
        return draw.sample(opened.sampler, stream.take(min(section.first_prompts, len(prompts))), 0)

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
    opened: Opened, verifier: Scorer | None, segmenter: FunctionCalls | None, closing: ExitStack
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
    sampler = GuardedSampler(Mailbox(open_engine(job, completer, closing)), guard, "In continuations")
    labeller = MonteCarlo(
        sampler, lambda groups: verifier(groups, Record(step)), completer.codec,
        segmenter_of(job.process, completer.codec, segmenter),
        Completer(section.continuations, sampling_of(job), job.seed, completer.loaded.context),
        soft=section.soft_labels, threshold=job.eval.threshold,
    )  # fmt: skip
    return labeller, completer.codec if section.completer is not None else None


def placed(job: Job) -> Job:
    """The job with the folders that a round opens by and by, wherever a reward has taken this process until then."""
    completer = job.reward_model.completer
    changes = {
        "model": job.model.model_copy(update={"path": fixed(job.model.path)}),
        "reward_model": job.reward_model.model_copy(update={"completer": completer and fixed(completer)}),
    }
    return job.model_copy(update=changes)
