"""Labels of steps by Monte Carlo as a file: of the outputs of a run, of those that rows bring, or of sampled ones.

They are labelled block by block: a command that was killed and is given again goes on after the last whole block. Seeds
are by output and step, so it gives the same file."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groupwise.commands.label_file import COUNTED, LabelFile
from groupwise.config import Job, ProcessSection
from groupwise.data.files import PromptSet
from groupwise.engines.mailbox import Mailbox
from groupwise.errors import ConfigError, DataError
from groupwise.jobfile import load_job
from groupwise.learn.agreement import Guard
from groupwise.progress import Progress, StopSignals, unsaved_steps
from groupwise.readable import duration
from groupwise.reward_models.monte_carlo import Completer, MonteCarlo, read_by
from groupwise.rewards.scorer import Scorer
from groupwise.rewards.steps import segmenter_of
from groupwise.run.guarded import GuardedSampler
from groupwise.run.rollouts import GroupSampler
from groupwise.store.events import older, read
from groupwise.store.folder import RunFolder
from groupwise.tokenizer.codec import Codec
from groupwise.types import Completion, Finish, Group, GroupKey, Prompt
from groupwise.watch.record import Record
from groupwise.wiring.engines import open_engine
from groupwise.wiring.models import Model
from groupwise.wiring.prompts import encoded_prompts
from groupwise.wiring.python_objects import PYTHON_PREFIX, PythonObjects
from groupwise.wiring.scoring import as_judged, open_functions
from groupwise.wiring.settings import sampling_of
from groupwise.wording import shown

BLOCK = 32
"""Prompts that are labelled together; a command that was killed goes on after the last block."""
WRITTEN = ("completion", "outputs")
"""Columns that bring outputs: one text, or a list of texts or of objects with a `text` and, where known, a `finish`."""


@dataclass(frozen=True)
class LabelResult:
    """What is in the file: labelled outputs and their steps, how many labels are above one half, outputs left out
    because a step could not be labelled, continuations that were drawn and their tokens; and seconds of this call.
    `stopped_by` is the signal that ended it before the last block."""

    output: str
    outputs: int
    steps: int
    right: int
    left_out: int
    continuations: int
    tokens: int
    seconds: float
    stopped_by: int | None = None


def weights_hash(model: nn.Module) -> str:
    """A name for a model's weights, from their names and bytes: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def own_rows(folder: RunFolder, rows: Iterable[Mapping[str, Any]] | None) -> bool:
    """Whether rows from Python are those that a run was trained on, and bring no outputs that are to be labelled."""
    if rows is None or not load_job(folder.job).job.data.path.startswith(PYTHON_PREFIX):
        return False
    return not any(name in row for row in rows for name in WRITTEN)


def prompts_of_run(folder: RunFolder, codec: Codec) -> PromptSet:
    """The prompts that a run's rollouts hold, without the columns that stood beside them."""
    found = {line["prompt_id"]: line["prompt"] for line in (*read(older(folder.rollouts)), *read(folder.rollouts))}
    return PromptSet(tuple(Prompt(name, said, codec.encode_prompt(said)) for name, said in found.items()), 0)


def groups_of_run(folder: RunFolder, prompts: PromptSet, codec: Codec) -> list[Group]:
    """A run's sampled groups, with the data set's columns. Raises DataError where the data set is not the run's."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts.prompts}
    groups = []
    for line in (*read(older(folder.rollouts)), *read(folder.rollouts)):
        prompt = by_id.get(line["prompt_id"])
        if prompt is None or prompt.content != line["prompt"]:
            raise DataError(
                f"{folder.rollouts} has the prompt {shown(line['prompt'])} as number {line['prompt_id']}, and the "
                f"job's data has {shown(prompt and prompt.content)} there: it has changed since. Give outputs with "
                "--data."
            )
        key = GroupKey(line["step"], line["slot"], line["prompt_id"])
        groups.append(Group(key, prompt, _outputs(line["outputs"], codec, str(folder.rollouts))))
    if not groups:
        raise DataError(f"{folder.rollouts} has no outputs to label. Give outputs or prompts with --data.")
    return groups


def written_groups(prompts: PromptSet, codec: Codec) -> list[Group] | None:
    """The outputs that rows bring in the columns of `WRITTEN`; None where no row brings any.

    Raises DataError where only some do, or where they cannot be used.
    """
    bring = [next((name for name in WRITTEN if name in prompt.row), None) for prompt in prompts.prompts]
    if not any(bring):
        return None
    groups = []
    for slot, (prompt, name) in enumerate(zip(prompts.prompts, bring, strict=True)):
        where = f"row {prompt.prompt_id} (counted from 0)"
        if name is None:
            raise DataError(f"{where} has no {' or '.join(WRITTEN)}, and other rows have: give all of them, or none.")
        found = [prompt.row[name]] if name == "completion" else prompt.row[name]
        row = {key: value for key, value in prompt.row.items() if key not in WRITTEN}
        outputs = _outputs(found, codec, f"{where}, column {name!r}")
        groups.append(Group(GroupKey(0, slot, prompt.prompt_id), replace(prompt, row=row), outputs))
    return groups


def _outputs(found: Any, codec: Codec, where: str) -> tuple[Completion, ...]:
    items = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(items, list) or not items:
        raise DataError(f"{where} has to be a list of outputs, but is {shown(found)}.")
    return tuple(_completion(item, codec, where) for item in items)


def _completion(item: Any, codec: Codec, where: str) -> Completion:
    """An output by its text. What does not say how it ended is taken to be finished."""
    text = item.get("text") if isinstance(item, Mapping) else item
    if not isinstance(text, str):
        raise DataError(f"{where}: an output has to be a text, or an object with a 'text', but is {shown(item)}.")
    finish: Finish = "length" if isinstance(item, Mapping) and item.get("finish", "stop") != "stop" else "stop"
    return read_by(codec, text, finish)


Blocks = Sequence[Callable[[], Sequence[Group]]]
"""What gives the groups of each block, by sampling them or by having them."""


def in_blocks(groups: Sequence[Group]) -> Blocks:
    """Groups that are there."""
    return [lambda part=groups[i : i + BLOCK]: part for i in range(0, len(groups), BLOCK)]  # type: ignore[misc]


def sampled_blocks(prompts: Sequence[Prompt], sample: Callable[[Sequence[Prompt], int], Sequence[Group]]) -> Blocks:
    """Groups that are sampled when they are asked for; `sample` takes prompts and the block's number."""
    return [
        lambda part=prompts[i : i + BLOCK], block=i // BLOCK: sample(part, block)  # type: ignore[misc]
        for i in range(0, len(prompts), BLOCK)
    ]  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """What is asked for beside a job: continuations per step, soft labels or hard ones, the first so many prompts or
    all, and a regular expression that steps end with in place of the job's `[process]`."""

    n: int = 8
    soft: bool = False
    limit: int | None = None
    pattern: str | None = None


def write_labels(
    job: Job, ask: Ask, model: Model, objects: PythonObjects, output: Path, *, run: RunFolder | None,
    completer: Mapping[str, Any], say: Callable[[str], None],
) -> LabelResult:  # fmt: skip
    """Label outputs into a file: those of `run` where it is given, else those of the job's data, else sampled ones.

    `completer` says which weights the model has. Raises GroupwiseError.
    """
    process = _process(job, ask)
    job, objects = as_judged(job, objects)
    if not job.reward.functions:
        raise ConfigError("What is right is said by a reward of whole outputs: name one with --reward.")
    with ExitStack() as closing:
        functions = open_functions(job, objects, None, closing)
        scorer = Scorer(functions.rewards, job.reward.weights, 1, say)
        guard, codec = Guard(model.loaded.policy, say), model.codec
        sampler = GuardedSampler(Mailbox(open_engine(job, model, closing)), guard, "In outputs and continuations")
        labeller = MonteCarlo(
            sampler, lambda groups: scorer(groups, Record(0)), codec, segmenter_of(process, codec, functions.segmenter),
            Completer(ask.n, sampling_of(job), job.seed, model.loaded.context),
            soft=ask.soft, threshold=job.eval.threshold,
        )  # fmt: skip
        if run and objects.rows is None and job.data.path.startswith(PYTHON_PREFIX):
            say("the run's rows were handed over from Python: without data=rows, a reward gets none of their columns")
            prompts = prompts_of_run(run, codec)
        else:
            prompts = encoded_prompts(job, codec, model.loaded.context, objects, None if run else ask.limit)
        groups = groups_of_run(run, prompts, codec)[: ask.limit] if run else written_groups(prompts, codec)
        if groups is None:
            draw = GroupSampler(sampling_of(job), job.sampling.num_generations, job.seed, "label")
            blocks = sampled_blocks(prompts.prompts, lambda part, block: draw.sample(sampler, part, block))
        else:
            blocks = in_blocks(groups)
        own = labeller.completer
        made_by = {
            "by": labeller.name, "completer": dict(completer) | {"weights": weights_hash(model.loaded.policy.model)},
            "n": own.n, "soft": ask.soft, "threshold": labeller.threshold, "seed": own.seed,
            "sampling": asdict(own.sampling), "sampled": job.sampling.num_generations if groups is None else 0,
            "reward": job.reward.functions, "steps": process.model_dump(exclude_none=True), "data": job.data.path,
            "inputs": _digest(groups or prompts.prompts),
        }  # fmt: skip
        return _write(LabelFile(output, made_by), blocks, labeller, say)


def _write(file: LabelFile, blocks: Blocks, labeller: MonteCarlo, say: Callable[[str], None]) -> LabelResult:
    """Label the blocks that the file lacks."""
    start, first = time.monotonic(), file.so_far["blocks"]
    if first:
        say(f"{file.path} has {first} of {len(blocks)} blocks already")
    progress, saved = Progress(1, len(blocks), done=first), [start]

    def unsaved() -> str | None:
        return unsaved_steps(file.so_far["blocks"] + 1, progress.step, time.monotonic() - saved[-1], "block")

    with file.writing(), StopSignals(progress, _Said(say), unsaved, "the same command", "block"):
        for number in (step - 1 for _ in progress.iterations() for step in progress.steps()):
            before = labeller.continuations, labeller.tokens
            labelled = labeller.label(labeller.verifier(blocks[number]()))
            drawn = {"continuations": labeller.continuations - before[0], "tokens": labeller.tokens - before[1]}
            file.add(labelled, labeller.soft, drawn)
            saved.append(time.monotonic())
            seconds = time.monotonic() - start
            left = seconds / (number + 1 - first) * (len(blocks) - number - 1)
            say(_progress(file, f"block {number + 1} of {len(blocks)}", labeller.tokens / max(seconds, 1e-9), left))
    counts = {name: count for name, count in file.so_far.items() if name in COUNTED}
    stopped = progress.stopped if progress.step < progress.total else None
    if stopped is not None:
        say(f"stopped after block {progress.step} of {progress.total}; go on with the same command")
    by = None if stopped is None else int(stopped)
    return LabelResult(str(file.path), **counts, seconds=time.monotonic() - start, stopped_by=by)


class _Said:
    """One place for all that there is to say."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = self.warn = say


def _progress(file: LabelFile, block: str, speed: float, left: float) -> str:
    outputs, steps, right = (file.so_far[name] for name in ("outputs", "steps", "right"))
    share = f", {right / steps:.0%} of them right" if steps else ""
    return f"{block}: {outputs:,} outputs, {steps:,} steps{share}; {speed:,.0f} tokens/s, {duration(left)} left"


def _process(job: Job, ask: Ask) -> ProcessSection:
    if ask.pattern is None:
        return job.process
    try:
        re.compile(ask.pattern)
    except re.error as error:
        raise ConfigError(f"--pattern {ask.pattern!r} is no regular expression: {error}.") from error
    return ProcessSection(segmenter="pattern", pattern=ask.pattern)


def _digest(inputs: Sequence[Group] | Sequence[Prompt]) -> str:
    """Tells whether prompts and outputs are the same."""
    found = hashlib.sha256()
    for one in inputs:
        prompt, outputs = (one.prompt, one.completions) if isinstance(one, Group) else (one, ())
        found.update(repr((prompt.token_ids, [output.token_ids for output in outputs])).encode())
    return found.hexdigest()[:16]
