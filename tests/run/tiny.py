"""Tiny Hugging Face folders, made in the test, and a job that learns something on them within seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from groupwise.demo.model import character_tokenizer, small_model

ALPHABET = "abcdefgh \n"
CONTEXT = 64

REWARDS = '''
"""Rewards in TRL's convention."""


def share(prompts, completions, want, **kwargs):
    """The share of the wanted character."""
    return [text.count(letter) / max(1, len(text)) for text, letter in zip(completions, want, strict=True)]
'''


def save_model(folder: Path, *, alphabet: str = ALPHABET, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A folder with a random Qwen3 of two layers and a character tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = character_tokenizer(alphabet)
    model = small_model(len(tokenizer), **{"hidden": 32, "layers": 2, "max_length": CONTEXT, **sizes})
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_rows(file: Path, rows: Iterable[Mapping[str, Any]] | None = None) -> Path:
    """A JSONL file; by default with 24 prompts of two letters, each of which wants `a`."""
    rows = rows or [{"prompt": first + second, "want": "a"} for first in "abcdefgh" for second in "abc"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def save_rewards(file: Path, text: str = REWARDS) -> Path:
    """A reward file with the function `share`."""
    file.write_text(text)
    return file


def events(run: Path) -> list[dict[str, Any]]:
    """A run's events."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def rollouts(run: Path) -> list[dict[str, Any]]:
    """A run's groups."""
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
