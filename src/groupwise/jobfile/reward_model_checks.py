"""What cannot work, or would be without effect, where a run trains a reward model of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from groupwise.config import BUILTIN, TRAINED_REWARD_MODEL, Job, RewardModelSection
from groupwise.jobfile.phrases import suggestion

SOURCES = {"verifier": "outcome", "pairs": "outcome", "monte_carlo": "process"}
"""What labels may come from, beside a file, and the kind of reward model that they are for."""
_OFF = RewardModelSection()


def problems(job: Job) -> Iterator[str]:
    """Every reason why a job's reward model cannot be trained as written."""
    section, named = job.reward_model, (*job.reward.functions, *job.reward.step_functions)
    if TRAINED_REWARD_MODEL not in named:
        if section != _OFF:
            key = next(key for key in RewardModelSection.model_fields if getattr(section, key) != getattr(_OFF, key))
            yield (
                f"`reward_model.{key}` has no effect: no reward model is trained in this run. Name it, as in "
                f"--reward {TRAINED_REWARD_MODEL} (it scores outputs) or --step-reward {TRAINED_REWARD_MODEL} (steps), "
                "or remove it."
            )  # fmt: skip
        return
    if (count := named.count(TRAINED_REWARD_MODEL)) > 1:
        yield (
            f'"{TRAINED_REWARD_MODEL}" is named {count} times: the one model that a run trains scores outputs '
            "(`reward.functions`) or steps (`reward.step_functions`). Name it once."
        )
    yield from _labels(job)
    yield from _monte_carlo(section)
    yield from _start(section)


def _labels(job: Job) -> Iterator[str]:
    section, labels, verifier = job.reward_model, job.reward_model.labels, job.reward.verifier
    kind = "outcome" if TRAINED_REWARD_MODEL in job.reward.functions else "process"
    wanted = " or ".join(f'"{source}"' for source in SOURCES if SOURCES[source] == kind)
    if labels is None:
        yield (
            "`reward_model.labels` is not set: nothing says what is right, so there is nothing to train the reward "
            f"model on after an iteration. Take {wanted}, or a file of labelled examples."
        )
        return
    if labels == TRAINED_REWARD_MODEL or TRAINED_REWARD_MODEL in verifier or f"model:{section.path}" in verifier:
        key = f'`reward_model.labels` = "{labels}"' if labels == TRAINED_REWARD_MODEL else "`reward.verifier`"
        yield (
            f"{key} is the reward model that is being trained: it would learn what it says already. Labels come from "
            "something that knows: a function (`reward.verifier`), or a file."
        )
        return
    if SOURCES.get(labels, kind) != kind:
        what = {"outcome": "outputs", "process": "steps"}
        yield (
            f'`reward_model.labels` = "{labels}" labels {what[SOURCES[labels]]}, and this reward model scores '
            f"{what[kind]}. Take {wanted}, or a file of labelled examples."
        )
    if labels in SOURCES and not verifier:
        yield (
            f'`reward_model.labels` = "{labels}" needs `reward.verifier`: a function that says whether an output is '
            'right, as in verifier = ["verify.py:correct"] under [reward].'
        )
    if labels not in SOURCES and not _is_file(labels):
        yield (
            f'`reward_model.labels` = "{labels}" is no file, and labels come from `verifier`, `pairs`, `monte_carlo` '
            f"or a file.{suggestion(labels, list(SOURCES))}"
        )
    if not verifier and (job.eval.data is not None or job.data.path == BUILTIN):
        yield (
            "There are held-out prompts, and they are not judged by a model in training: name a function in "
            "`reward.verifier`."
        )


def _is_file(labels: str) -> bool:
    """Whether it may be one: what is not there may still be of the hub, or come later."""
    return "/" in labels or "." in labels or Path(labels).exists()


def _monte_carlo(section: RewardModelSection) -> Iterator[str]:
    for key in ("continuations", "soft_labels", "completer"):
        if section.labels != "monte_carlo" and getattr(section, key) != getattr(_OFF, key):
            yield f'`reward_model.{key}` has no effect unless `reward_model.labels` = "monte_carlo". Remove it.'


def _start(section: RewardModelSection) -> Iterator[str]:
    if section.path is None and section.first_prompts == 0:
        yield (
            "`reward_model.first_prompts` = 0 leaves the first iteration without a reward model: name one that is "
            "trained in `reward_model.path`, or let the policy answer some prompts first."
        )
    if section.path is None and section.revision is not None:
        yield "`reward_model.revision` has no effect without `reward_model.path`. Remove it."
    if section.first_prompts == 0 and section.first_epochs is not None:
        yield "`reward_model.first_epochs` has no effect where `reward_model.first_prompts` = 0. Remove it."
