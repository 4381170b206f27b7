"""The built-in model: supervised first on demonstrations of mixed quality, made once per seed, kept in a cache.

What it is shown decides what it can do. Most demonstrations are careless: they never carry from the ones to the tens,
so their lines are well formed and their answers usually wrong. The others carry. A model warmed up on both answers
greedily as the majority does, and carries now and then when it is sampled: that is what a reward can find."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from groupwise.cpu.cores import threads
from groupwise.demo.model import END_ID, PAD_ID, character_tokenizer, small_model
from groupwise.demo.task import ALPHABET, demonstrations
from groupwise.disk import cache_folder
from groupwise.errors import ModelError
from groupwise.wording import one_line

IGNORED = -100
"""A target that cross-entropy leaves out."""
THREADS = 2
"""Sums in another order give other bits: the same number of threads whatever the environment says."""


@dataclass(frozen=True)
class WarmUp:
    """Everything that decides the warmed-up weights, beside the seed and the libraries.

    The learning rate stays at its peak until the running loss falls below `ready_loss`, the end of a plateau on which
    the model writes well-formed lines with wrong digits and which some seeds leave 150 steps before others. Over the
    `tail_steps` that follow it falls to 0. A rate that falls by the step count would stop some seeds on the plateau.
    """

    hidden: int = 192
    layers: int = 2
    careless: float = 0.65
    lucky: float = 0.0
    demonstrations: int = 32_000
    batch_size: int = 32
    learning_rate: float = 2e-3
    rise_steps: int = 20
    ready_loss: float = 0.18
    tail_steps: int = 650
    max_steps: int = 1_500


def ensure_warm(
    seed: int,
    cache_dir: Path | None = None,
    *,
    settings: WarmUp | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """The Hugging Face folder of the warmed-up model of a seed: found in the cache, or made there in about a minute.

    `cache_dir` defaults to `cache_folder()`. `say` is told what takes time, a line at a
    time. Processes that race make the same folder, and the first to finish wins. Raises ModelError where the cache
    cannot be written or the model does not learn.
    """
    settings = settings or WarmUp()
    cache = cache_dir
    try:
        cache = cache or cache_folder()
        folder = cache / f"arithmetic-{seed}-{_fingerprint(seed, settings)}"
        if folder.is_dir():
            if (damage := _damage(folder)) is None:
                return folder
            say(f"the built-in model in the cache is damaged and made again: {folder} ({damage})")
            shutil.rmtree(folder)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=cache) as workshop:
            made = Path(workshop) / folder.name
            tokenizer = character_tokenizer(ALPHABET)
            model = warm_up(tokenizer, seed, settings, say)
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            _put(made, folder)
    except OSError as error:
        raise ModelError(
            f"The built-in model cannot be kept in the cache {cache or ''}: {error}. "
            "Set GROUPWISE_CACHE to a folder that can be written and has 10 MB of room."
        ) from error
    return folder


def warm_up(
    tokenizer: PreTrainedTokenizerFast, seed: int, settings: WarmUp, say: Callable[[str], None] = lambda line: None
) -> Qwen3ForCausalLM:
    """Train a new small model on demonstrations: next-token loss on the answer's tokens, AdamW, float32, on the CPU."""
    examples = _encode(tokenizer, seed, settings)
    model = small_model(len(tokenizer), hidden=settings.hidden, layers=settings.layers, seed=seed)
    say(f"warming up the built-in model ({model.num_parameters() / 1e6:.1f}M parameters) on demonstrations, once")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    running, ready = None, None
    with threads(THREADS):
        for step in range(settings.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, ready)
            start = step * settings.batch_size % settings.demonstrations
            loss = _update(model, optimizer, examples[start : start + settings.batch_size])
            running = loss if running is None else 0.95 * running + 0.05 * loss
            if ready is None and running < settings.ready_loss:
                ready = step
            if (step + 1) % 100 == 0:
                say(f"warm-up step {step + 1}: loss {running:.3f}")
            if ready is not None and step == ready + settings.tail_steps:
                model.eval()
                return model
    raise ModelError(
        f"The built-in model did not learn its demonstrations with seed {seed}: after {settings.max_steps} steps its "
        f"loss is {running:.3f}, and {settings.ready_loss} was to be reached early. Try another seed."
    )


def learning_rate(settings: WarmUp, step: int, ready: int | None) -> float:
    """The rate of a step (from 0), where `ready` is the step at which the loss was low enough, if it was."""
    rise = min(1.0, (step + 1) / settings.rise_steps)
    fall = 1.0 if ready is None else 1.0 - (step - ready) / (settings.tail_steps + 1)
    return settings.learning_rate * rise * fall


def _update(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, batch: list[tuple[list[int], int]]) -> float:
    token_ids, targets = _pad(batch)
    logits = model(input_ids=token_ids[:, :-1]).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _encode(tokenizer: PreTrainedTokenizerFast, seed: int, settings: WarmUp) -> list[tuple[list[int], int]]:
    """Per demonstration: all its token ids, and how many of them are the prompt's."""
    shown = demonstrations(seed, settings.demonstrations, settings.careless, settings.lucky)
    prompts = tokenizer([question["prompt"] for question, _ in shown])["input_ids"]
    answers = tokenizer([answer for _, answer in shown])["input_ids"]
    return [([*p, *a, END_ID], len(p)) for p, a in zip(prompts, answers, strict=True)]


def _pad(batch: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets `[B, L]`, padded on the right, the targets of prompts and padding ignored."""
    longest = max(len(ids) for ids, _ in batch)
    token_ids = torch.full((len(batch), longest), PAD_ID)
    targets = torch.full((len(batch), longest), IGNORED)
    for row, (ids, prompt) in enumerate(batch):
        token_ids[row, : len(ids)] = torch.tensor(ids)
        targets[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return token_ids, targets


def _fingerprint(seed: int, settings: WarmUp) -> str:
    """Changes with whatever may change the weights."""
    versions = [torch.__version__, transformers.__version__, tokenizers.__version__, platform.machine()]
    text = json.dumps({"seed": seed, "settings": asdict(settings), "versions": versions}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _damage(folder: Path) -> str | None:
    """What is wrong with a model in the cache, as by a disk that was full or a tool that deletes old files; None where
    it is whole."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{name}: {one_line(error, 100).rstrip('.')}"
    try:
        with safe_open(folder / "model.safetensors", "pt") as weights:
            weights.keys()
    except (OSError, SafetensorError) as error:
        return f"model.safetensors: {one_line(error, 100).rstrip('.')}"
    return None


def _put(made: Path, folder: Path) -> None:
    """Give the finished folder its name in one step; the same one, made by another process meanwhile, is as good."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
