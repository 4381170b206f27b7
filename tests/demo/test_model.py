"""Models and tokenizers built in code survive a round trip through Hugging Face's own loaders."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupwise.demo.model import END_ID, PAD_ID, character_tokenizer, small_model
from groupwise.demo.task import ALPHABET, held_out, solution


def test_a_saved_tokenizer_loses_no_character(tmp_path: Path) -> None:
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "\t", "é", "中"]
    text = "  a  b\n\n\tC é中 .\n " + "".join(alphabet)
    tokenizer = character_tokenizer(alphabet)
    small_model(len(tokenizer), hidden=32, layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for one in (tokenizer, loaded):
        token_ids = one(text)["input_ids"]
        assert len(token_ids) == len(text)
        assert one.decode(token_ids) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (PAD_ID, END_ID)
    assert loaded.decode([*loaded("a")["input_ids"], END_ID], skip_special_tokens=True) == "a"


def test_a_character_outside_the_alphabet_raises() -> None:
    with pytest.raises(Exception, match="Missing"):
        character_tokenizer("ab")("abc")


def test_a_question_and_its_solution_have_one_token_per_character() -> None:
    tokenizer = character_tokenizer(ALPHABET)
    for question in held_out(20):
        text = question["prompt"] + solution(question)
        assert len(tokenizer(text)["input_ids"]) == len(text)


def test_a_saved_model_computes_the_same(tmp_path: Path) -> None:
    model = small_model(15, hidden=32, layers=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    token_ids = torch.arange(10).reshape(1, 10)
    assert torch.equal(model(token_ids).logits, loaded(token_ids).logits)
    assert loaded.config.model_type == "qwen3"
    assert loaded.generation_config.eos_token_id == END_ID


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (small_model(15, hidden=32, layers=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    for name, weight in one.named_parameters():
        assert torch.equal(weight, same.get_parameter(name))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_the_default_shape_has_about_a_million_parameters() -> None:
    assert 0.8e6 < small_model(len(character_tokenizer(ALPHABET))).num_parameters() < 1.2e6
