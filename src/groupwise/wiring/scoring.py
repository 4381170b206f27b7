"""From a job's names to what scores outputs: those that are trained on, and those that are held out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from groupwise.config import TRAINED_REWARD_MODEL, Job
from groupwise.data.remarks import unread
from groupwise.errors import RewardError
from groupwise.reward_models.model import RewardModel
from groupwise.reward_models.reward import ModelReward, ModelStepReward
from groupwise.rewards.base import Reward
from groupwise.rewards.functions.calls import FunctionCalls
from groupwise.rewards.functions.load import load_stepwise
from groupwise.rewards.patience import Patience
from groupwise.rewards.scorer import Scorer, SpecialTokens
from groupwise.rewards.steps import segmenter_of
from groupwise.rewards.stepwise import StepReward, StepScorer
from groupwise.store.folder import RunFolder
from groupwise.tokenizer.codec import Codec
from groupwise.types import Prompt
from groupwise.wiring.python_objects import PYTHON_PREFIX, PythonObjects
from groupwise.wiring.reward_models import ModelOptions, open_reward, open_step_reward
from groupwise.wiring.settings import total_steps


class _Closes(Protocol):
    def close(self) -> None: ...


Closing = TypeVar("Closing", bound=_Closes)


def _untold() -> RewardModel:
    raise AssertionError("the reward model of a run was asked for where none is trained")


@dataclass(frozen=True)
class Functions:
    """A job's functions, loaded: those that score outputs, those that score steps, and the one that finds them."""

    rewards: Sequence[Reward]
    step_rewards: Sequence[StepReward]
    segmenter: FunctionCalls | None

    def reads(self, column: str) -> bool:
        """Whether any of them is handed a column of the data set; of an object that does not tell, it is taken so."""
        every = [*self.rewards, *self.step_rewards, *([self.segmenter] if self.segmenter else [])]
        return any(not hasattr(one, "takes") or one.takes(column) for one in every)


def open_functions(
    job: Job,
    objects: PythonObjects,
    folder: RunFolder | None,
    closing: ExitStack,
    trained: Callable[[], RewardModel] = _untold,
) -> Functions:
    """Load the job's functions; files start their workers now, so that a broken one is found at once.

    `trained` gives the reward model that the run trains, once all else is loaded, where the job names it.
    """
    section = job.reward
    limits: dict[str, Any] = {"timeout": section.timeout, "output_timeout": section.output_timeout}
    limits["log"] = folder.rewards_log if folder else None
    limits["models"] = ModelOptions(
        section.device or job.model.device, job.model.dtype, section.step_tags, objects.trust_remote_code, job.data.date
    )
    option = ("verifier", "verifier") if objects.judges else ("reward function", "reward")
    named = _named_or_handed(section.functions, objects.rewards, *option)
    rewards = [None if f == TRAINED_REWARD_MODEL else _opened(open_reward(f, **limits), closing) for f in named]
    named = _named_or_handed(section.step_functions, objects.step_rewards, "step reward function", "step_reward")
    step_rewards = [
        None if f == TRAINED_REWARD_MODEL else _opened(open_step_reward(f, **limits), closing) for f in named
    ]
    segmenter = None
    if job.process.function is not None:
        del limits["models"]
        segmenter = _opened(load_stepwise(job.process.function, place="segmenter", kind="segmenter", **limits), closing)
    return Functions(
        [one or ModelReward(trained(), TRAINED_REWARD_MODEL) for one in rewards],
        [one or ModelStepReward(trained(), TRAINED_REWARD_MODEL) for one in step_rewards],
        segmenter,
    )


def _opened(found: Closing, closing: ExitStack) -> Closing:
    closing.callback(found.close)
    return found


def as_judged(job: Job, objects: PythonObjects) -> tuple[Job, PythonObjects]:
    """A job as its held-out outputs are judged: by its verifier, where it names one, and never by a model in training.

    Steps are then scored by what else scores them.
    """
    section = job.reward
    if not section.verifier:
        return job, objects
    weights = section.step_weights or [1.0] * len(section.step_functions)
    kept = [(f, weight) for f, weight in zip(section.step_functions, weights, strict=True) if f != TRAINED_REWARD_MODEL]
    changes = {
        "functions": section.verifier, "weights": None,
        "step_functions": [function for function, _ in kept], "step_weights": [weight for _, weight in kept] or None,
    }  # fmt: skip
    return job.model_copy(update={"reward": section.model_copy(update=changes)}), replace(
        objects, rewards=objects.verifier, judges=True
    )


def _named_or_handed(
    specs: Sequence[str], handed: Sequence[Callable[..., Any]], kind: str, option: str
) -> Iterator[str | Callable[..., Any]]:
    objects = iter(handed)
    for spec in specs:
        function = next(objects, None) if spec.startswith(PYTHON_PREFIX) else spec
        if function is None:
            raise RewardError(
                f"The {kind} {spec} was handed over from Python, not by name. Hand it over again, as in "
                f"groupwise.resume(run, {option}=function), or name one with --{option.replace('_', '-')} where that "
                "is offered."
            )
        yield function


def scorer_of(
    job: Job, functions: Functions, codec: Codec, warn: Callable[[str], None], patience: Patience | None = None
) -> Scorer:
    """What scores outputs and, where the job says so, their steps; `patience` says when they end a run."""
    patience = patience or Patience()
    steps = None
    if functions.step_rewards:
        segmenter = segmenter_of(job.process, codec, functions.segmenter)
        steps = StepScorer(segmenter, functions.step_rewards, job.reward.step_weights, patience)
    look = SpecialTokens(codec, warn)
    return Scorer(functions.rewards, job.reward.weights, total_steps(job), warn, steps, patience=patience, look=look)


def check_thread(objects: PythonObjects, warn: Callable[[str], None]) -> None:
    """Say where functions from Python do not run in the main thread, without which they can set no signal."""
    named = any(map(callable, (*objects.rewards, *objects.step_rewards, *objects.verifier)))
    if named and threading.current_thread() is not threading.main_thread():
        warn(
            f"this runs in the thread {threading.current_thread().name!r}, and so do the reward functions that were "
            "handed over: what needs the main thread (signal.alarm, as in math_verify) fails in them. Call groupwise "
            "from the main thread, or name the functions as `file.py:name`"
        )


def say_unread(job: Job, prompts: Sequence[Prompt], functions: Sequence[Functions], say: Callable[[str], None]) -> None:
    """Name the columns that neither the prompt, its template nor any function reads."""
    column = job.data.prompt_column
    if found := unread(prompts, lambda name: any(some.reads(name) for some in functions), column):
        say(found)
