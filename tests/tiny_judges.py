"""Tiny reward models with random weights, made in the test, and what the stock classes say of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from groupwise.demo.model import character_tokenizer, small_model
from groupwise.reward_models.model import Kind, RewardModel, Source, load_reward_model, new_reward_model
from tests.tiny_models import randomized

ALPHABET = "abcdefgh \n#+-"
CLASSES = {"outcome": AutoModelForSequenceClassification, "process": AutoModelForTokenClassification}


def config_of(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PreTrainedConfig:
    """A Qwen3 of two layers for a tokenizer."""
    config = small_model(len(tokenizer), hidden=32, layers=2, max_length=64).config
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def save_judge(folder: Path, kind: str, tokenizer: PreTrainedTokenizerBase | None = None, **changes: Any) -> Path:
    """A folder with a classifier of a kind, or a causal model (`causal`), whose every weight is random."""
    tokenizer = tokenizer or character_tokenizer(ALPHABET)
    labels = {"outcome": {"num_labels": 1}, "process": {"num_labels": 2}, "causal": {}}[kind]
    config = config_of(tokenizer, **labels | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {**CLASSES, "causal": AutoModelForCausalLM}[kind].from_config(config)
    randomized(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def judge(folder: Path, kind: Kind, **options: Any) -> RewardModel:
    """A folder's reward model, to score with on the CPU."""
    return load_reward_model(Source(str(folder)), kind, device="cpu", **options)


def pupil(folder: Path, kind: Kind, **options: Any) -> RewardModel:
    """A folder's model, to be trained on the CPU."""
    return new_reward_model(Source(str(folder)), kind, device="cpu", **options)


def stock_logits(folder: Path, kind: str, token_ids: list[int]) -> torch.Tensor:
    """What transformers says of one row: `[labels]`, or `[N, labels]` per token."""
    model = {**CLASSES, "causal": AutoModelForCausalLM}[kind].from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
