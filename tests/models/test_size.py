"""Parameters are counted without making them."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, Qwen3Config

from groupwise.errors import ModelError
from groupwise.models.size import parameter_count
from tests.tiny_models import clone_of


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bloom"])
def test_the_count_is_that_of_the_model_itself(kind: str) -> None:
    model = clone_of(kind)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


def test_a_tied_matrix_counts_once() -> None:
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 8}
    tied, untied = (parameter_count(Qwen3Config(**sizes, tie_word_embeddings=tie)) for tie in (True, False))
    assert untied - tied == 100 * 32


def test_seventy_billion_are_counted_in_no_time_and_no_memory() -> None:
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    )  # fmt: skip
    start = time.process_time()
    assert parameter_count(config) == 70_553_706_496
    assert time.process_time() - start < 10
    assert torch.get_default_device() == torch.device("cpu")


def test_a_configuration_without_a_causal_model_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match="transformers has no causal language model of this type"):
        parameter_count(CONFIG_MAPPING["t5"]())


def test_a_class_that_cannot_be_made_from_its_configuration_is_a_clear_error() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    config.rope_parameters = None  # which its class reads without looking: another error than ValueError
    with pytest.raises(ModelError, match="No causal language model can be made from a configuration of type llama: "):
        parameter_count(config)
