"""The doctor's checks of what a user brings: tokenizer, chat template, rewards, and a machine with so much memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch

from groupwise.data.remarks import remarks
from groupwise.diagnosis.findings import Finding, Verdict, measured
from groupwise.diagnosis.opened_job import LOOKED_AT, OpenedJob, credit, unscored
from groupwise.disk import in_words
from groupwise.learn.budget import peak_memory
from groupwise.objective import token_advantages
from groupwise.readable import duration, percent
from groupwise.rewards.combine import unique_names
from groupwise.tokenizer.codec import Codec
from groupwise.types import Completion, Group, GroupKey, Message, Prompt, ScoredGroup
from groupwise.watch.record import Record, frac_zero
from groupwise.wiring.settings import memory_settings

NEARLY_ALL = 0.9
"""The share of the free memory above which a warning is due: other processes, and longer outputs, want some too."""
MOST_ENDS = 8
"""How many end tokens are tried: models have one to three."""


def tokenizer(opened: OpenedJob) -> list[Finding]:
    """The tokenizer against its own file, and against the prompts. A ModelError of it is the finding."""
    codec, prompts = opened.model.codec, _first(opened)
    warnings = codec.check([codec.render(prompt.content, prompt.template_options) for prompt in prompts])
    if warnings:
        return [Finding("tokenizer", "warning", words=" ".join(warnings))]
    return [Finding("tokenizer", "passed", 0.0, 0.0, words=f"{len(prompts)} prompts read back as they were written")]


def end_token(opened: OpenedJob) -> list[Finding]:
    """Whether outputs end with their end token, and whether that token is trained, also where it is the pad token."""
    codec, learner, name = opened.model.codec, opened.learner, "end token"
    ends = sorted(codec.end_token_ids)[:MOST_ENDS]
    if not ends:
        return [Finding(name, "warning", words="none is known: outputs only end at stop strings or at their longest")]
    prompt = opened.chosen[0]
    outputs = tuple(Completion((prompt.token_ids[-1], end), "", (0.0, 0.0), "stop") for end in ends)
    made = unscored(Group(GroupKey(0, 0, prompt.prompt_id), prompt, outputs))
    batch = learner.pack([made], credit([made]))
    trained_T = (batch.trained_T & learner.logprobs(batch).isfinite()).tolist()
    lasts = [output.start + len(output.token_ids) - 1 for output in batch.outputs]
    lost = [end for end, last in zip(ends, lasts, strict=True) if not trained_T[last]]
    stopped = [c for group in opened.groups for c in group.completions if c.finish == "stop"]
    headless = [] if opened.job.sampling.stop else [c for c in stopped if c.token_ids[-1] not in codec.end_token_ids]
    words = f"token {', '.join(map(str, ends))}; {len(stopped)} sampled outputs stopped"
    if codec.tokenizer.pad_token_id in codec.end_token_ids:
        words += "; pad is an end token too, and it is trained all the same"
    fault = f"Never trained: {lost}; outputs that stopped without one: {len(headless)}. The model cannot learn to end."
    return [measured(name, float(len(lost) + len(headless)), 0.0, words=words, fault=fault)]


def chat_template(opened: OpenedJob) -> list[Finding]:
    """What the template makes of prompts that are messages: the assistant's turn is open, and BOS comes once.

    What there is to say of prompts is said here, also of those that no template renders.
    """
    codec = opened.model.codec
    prompts = [prompt for prompt in _first(opened) if not isinstance(prompt.content, str)]
    said = " ".join(remarks(opened.prompts.prompts, codec))
    if not prompts:
        return [Finding("chat template", "warning" if said else "not used", words=said or "the prompts are strings")]
    faults = [_template_fault(codec, prompt) for prompt in prompts]
    found = [fault for fault in faults if fault]
    end = codec.render(prompts[0].content, prompts[0].template_options)[-40:]
    words = ". ".join([f"prompts end in {end!r}", *([said] if said else [])])
    fault = f"{next(iter(found), '')}, in {len(found)} of {len(prompts)} prompts: correct the tokenizer's chat template"
    return [measured("chat template", float(len(found)), 0.0, words=words, fault=fault)]


def _template_fault(codec: Codec, prompt: Prompt) -> str:
    """What is wrong with a prompt of messages; empty where nothing is."""
    assert not isinstance(prompt.content, str)
    messages, bos = list(prompt.content), codec.tokenizer.bos_token_id
    text = codec.render(messages, prompt.template_options)
    if codec.render(messages, prompt.template_options) != text or codec.encode_text(text) != prompt.token_ids:
        return "It renders differently the second time"
    if bos is not None and prompt.token_ids[:2] == (bos, bos):
        return "The prompt begins with two BOS tokens"
    if not _is_open(codec, messages, text, prompt.template_options):
        return "The prompt does not end where the assistant begins"
    return ""


def _is_open(codec: Codec, messages: list[Message], text: str, options: Mapping[str, Any]) -> bool:
    """Whether an answer may follow `text` directly.

    Either the template adds something when it is asked to (a generation prompt), or an answered conversation is the
    prompt with the answer behind it (templates that end a user's turn so, as Mistral's). A turn of the assistant that
    is to be continued is open if it ends as it was given.
    """
    if messages and messages[-1].get("role") == "assistant":
        return text.rstrip().endswith(str(messages[-1].get("content", "")).rstrip())

    if text != codec.render_whole(messages, options):
        return True
    answered = codec.render_whole([*messages, {"role": "assistant", "content": "yes"}], options)
    return answered.startswith(text) and answered[len(text) :].lstrip().startswith("yes")


def rewards(opened: OpenedJob) -> list[Finding]:
    """The job's rewards on the sampled outputs. A RewardError of theirs (NaN, a string) is the finding."""
    opened.warnings.clear()
    groups, record = opened.groups, Record(1)
    start = time.perf_counter()
    scored = opened.scorer(groups, record, training=True)
    took = time.perf_counter() - start
    scores = [score for group in scored for score in group.scores]
    missing = sum(score.reward is None and all(s.reward is None for s in score.steps) for score in scores) / len(scores)
    names = unique_names([reward.name for reward in opened.scorer.rewards])
    silent = [name for name in names if all(score.parts[name] is None for score in scores)]
    steps = [step for score in scores for step in score.steps]
    silent += ["of the steps"] if steps and all(step.reward is None for step in steps) else []
    flat = frac_zero(token_advantages(scored, opened.learner.objective))
    words = [f"not scored: {percent(missing)}; groups without variance: {percent(flat)}; {duration(took)}"]
    if silent:
        words += [f"{', '.join(silent)} scored nothing"]
    if flat == 1.0 and not silent:
        words += ["all outputs of a group earned the same, from which nothing is learned; other prompts may differ"]
    if (flat == 1.0 or silent) and opened.longest_output < opened.job.sampling.max_completion_length:
        words += [f"outputs were cut at {opened.longest_output} tokens here"]
    words += [" ".join(warning.split())[:300] for warning in opened.warnings[:1]]
    verdict: Verdict = "failed" if silent else "warning" if missing or flat == 1.0 or opened.warnings else "passed"
    return [Finding("rewards", verdict, missing, 0.0, words=". ".join(words))]


def memory(opened: OpenedJob) -> list[Finding]:
    """One update with a full micro-batch of the longest prompt and outputs of full length, against what was free."""
    learner, job, room = opened.learner, opened.job, opened.room
    groups = _largest(opened)
    tokens = sum(len(c.token_ids) for group in groups for c in group.group.completions)
    opened.say(f"one update over {len(groups)} groups of the longest prompt, {tokens} output tokens")
    device = learner.policy.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    settings, words = learner.settings, f"{in_words(room.free)} were free before the model was loaded"
    cure = "Lower train.tokens_per_micro_batch, turn model.gradient_checkpointing on, or use a larger device"
    learner.settings = replace(settings, num_iterations=job.train.num_iterations)
    try:
        learner.update(learner.prepare(groups, credit(groups)))
    except torch.OutOfMemoryError:  # a boundary: this is what was to be found out
        return [Finding("memory", "failed", None, room.free, "bytes", f"{words}, and it was not enough. {cure}.")]
    finally:
        learner.settings = settings
    needed = max(0, peak_memory(device) - room.held)
    if needed > room.free:
        return [Finding("memory", "failed", needed, room.free, "bytes", f"{words}. {cure}.")]
    if needed > NEARLY_ALL * room.free:
        return [Finding("memory", "warning", needed, room.free, "bytes", f"{words}: this is nearly all. {cure}.")]
    return [Finding("memory", "passed", needed, room.free, "bytes", words)]


def _largest(opened: OpenedJob) -> list[ScoredGroup]:
    """As many groups as fill a micro-batch, each with the longest prompt of all and outputs of full length."""
    job, shared = opened.job, opened.learner.policy.layout == "shared"
    longest = max(opened.prompts.prompts, key=lambda prompt: len(prompt.token_ids))
    length, n = job.sampling.max_completion_length, job.sampling.num_generations
    tokens = tuple(islice(cycle(longest.token_ids), length))
    size = n * length + len(longest.token_ids) * (1 if shared else n)
    count = max(1, min(job.train.prompts_per_step, memory_settings(job)[0] // size))
    outputs = (Completion(tokens, "", (-1.0,) * length, "length"),) * n
    return [unscored(Group(GroupKey(0, slot, longest.prompt_id), longest, outputs)) for slot in range(count)]


def _first(opened: OpenedJob) -> list[Prompt]:
    held_out = opened.held_out.prompts[:LOOKED_AT] if opened.held_out else ()
    return [*opened.prompts.prompts[:LOOKED_AT], *held_out]
