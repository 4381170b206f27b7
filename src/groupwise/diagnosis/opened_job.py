"""What the doctor looks at: a job opened as training opens it, and a few outputs sampled from its own prompts.

Nothing is written, and no update moves a weight: the learner's rate is 0, and its gradient is not clipped."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import inf

import psutil
import torch

from groupwise.config import Job
from groupwise.data.files import PromptSet
from groupwise.data.remarks import in_both
from groupwise.engines.base import Engine
from groupwise.engines.mailbox import Mailbox, generate
from groupwise.learn.learner import PolicyLearner
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.learn.pack import Batch
from groupwise.models.load import choose_device
from groupwise.rewards.scorer import Scorer
from groupwise.seeds import group_seed
from groupwise.types import Group, GroupKey, Prompt, Request, Score, ScoredGroup
from groupwise.wiring import memory
from groupwise.wiring.engines import open_engine
from groupwise.wiring.models import Model, model_source, open_model
from groupwise.wiring.prompts import held_out_prompts, training_prompts
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.reward_models import open_trained
from groupwise.wiring.scoring import open_functions, say_unread, scorer_of
from groupwise.wiring.settings import learner_settings, objective_of, sampling_of

LOOKED_AT = 64
"""How many prompts the tokenizer and the template are tested on."""
PROMPTS, OUTPUTS, TOKENS = 4, 8, 48
"""How many prompts are sampled, the most outputs of each, and the most tokens of one: seconds on a small model."""
SHORT = 256
"""Prompts of at most so many tokens are preferred: the plain layout repeats them for every output."""
FEW = (3, 2, 3)
"""How many outputs of each of the first groups are computed with gradient."""


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that were free, and that this process held, before the model was loaded."""

    free: int
    held: int


@dataclass
class OpenedJob:
    """The objects of a job, as a run would have them before its first step. `warnings` gathers what rewards say."""

    job: Job
    model: Model
    prompts: PromptSet
    held_out: PromptSet | None
    scorer: Scorer
    engine: Engine
    learner: PolicyLearner
    room: FreeMemory
    say: Callable[[str], None]
    warnings: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """What forward and backward compute in."""
        return self.model.loaded.compute_dtype

    @cached_property
    def chosen(self) -> list[Prompt]:
        """The prompts that are sampled: short ones first, repeated where there are fewer."""
        first = self.prompts.prompts[:LOOKED_AT]
        short = [prompt for prompt in first if len(prompt.token_ids) <= SHORT]
        pool = short or sorted(first, key=lambda prompt: len(prompt.token_ids))
        return [pool[i % len(pool)] for i in range(PROMPTS)]

    @cached_property
    def longest_output(self) -> int:
        """The most tokens that are sampled for one output."""
        return min(self.job.sampling.max_completion_length, TOKENS)

    @cached_property
    def groups(self) -> list[Group]:
        """Outputs sampled by the job's engine and settings, for the rewards and the sampler."""
        n = min(self.job.sampling.num_generations, OUTPUTS)
        self.say(f"sampling {PROMPTS} x {n} outputs of at most {self.longest_output} tokens")
        return self._draw("whole", n, [self.longest_output] * PROMPTS)

    @cached_property
    def cut(self) -> list[Group]:
        """The same prompts with outputs cut at unlike lengths: a model's own may all be equally long."""
        return self._draw("cut", 2, [max(1, self.longest_output * i // (PROMPTS + 1)) for i in range(1, PROMPTS + 1)])

    def _draw(self, purpose: str, n: int, lengths: Sequence[int]) -> list[Group]:
        self.engine.load_weights(self.learner.weights(), self.learner.version)
        sampling = sampling_of(self.job)
        requests = [
            Request(
                f"{purpose}/{slot}", prompt.token_ids, n, replace(sampling, max_tokens=length),
                group_seed(self.job.seed, f"doctor/{purpose}", 0, slot),
            )
            for slot, (prompt, length) in enumerate(zip(self.chosen, lengths, strict=True))
        ]  # fmt: skip
        keys = [GroupKey(0, slot, prompt.prompt_id) for slot, prompt in enumerate(self.chosen)]
        return [Group(*one) for one in zip(keys, self.chosen, generate(Mailbox(self.engine), requests), strict=True)]

    @cached_property
    def few(self) -> list[ScoredGroup]:
        """Some of the outputs, whole ones and cut ones: what is computed with gradient, several times over."""
        chosen = zip(self.groups, self.cut, FEW, strict=False)
        return [unscored(replace(a, completions=(*a.completions, *b.completions)[-n:])) for a, b, n in chosen]

    @cached_property
    def batch(self) -> Batch:
        """The few outputs with advantages, old log-probs and, where the loss has a KL term, the reference's."""
        return self.learner.prepare(self.few, credit(self.few))


def open_job(job: Job, objects: PythonObjects, say: Callable[[str], None], closing: ExitStack) -> OpenedJob:
    """Open a job as training does, what is quick to refuse first. Raises GroupwiseError where it cannot be opened."""
    warnings: list[str] = []
    trained = cache(lambda: open_trained(job, model_source(job, say), objects))
    functions = open_functions(job, objects, None, closing, trained)
    device = choose_device(job.model.device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    room = FreeMemory(memory.available_memory(device), int(held))
    model = open_model(job, objects, say, training=True)
    scorer = scorer_of(job, functions, model.codec, warnings.append)
    prompts = training_prompts(job, model, objects)
    held_out = held_out_prompts(job, model, objects)
    if not job.reward.verifier:  # which is not opened here
        say_unread(job, prompts.prompts, [functions], say)
    if held_out and (known := in_both(prompts.prompts, held_out.prompts)):
        say(known)
    settings = learner_settings(job, model.loaded.compute_dtype)
    settings = replace(
        settings, optimizer=OptimizerSettings(learning_rate=0.0, total_updates=1, max_grad_norm=inf),
        num_iterations=2, updates_per_batch=1,  # so that old log-probs are computed by a forward of their own
        mask_truncated=False,  # outputs are cut here that would not be cut in a run
    )  # fmt: skip
    learner = PolicyLearner(model.loaded.policy, objective_of(job), settings)
    learner.refresh(0)
    engine = open_engine(job, model, closing)
    return OpenedJob(job, model, prompts, held_out, scorer, engine, learner, room, say, warnings)


def unscored(group: Group) -> ScoredGroup:
    """A group as the learner takes it, where only its credit matters."""
    return ScoredGroup(group, (Score(None),) * len(group.completions))


def credit(groups: Sequence[ScoredGroup]) -> list[list[float]]:
    """Advantages of both signs, none of them 0, the same each time: rewards may have none to offer."""
    draw = random.Random(0)
    return [[draw.choice((-1, 1)) * draw.uniform(0.5, 1.5) for _ in group.scores] for group in groups]
