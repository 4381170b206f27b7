"""Reward models: what is loaded, what is refused, and that scores are those of the stock classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, OPTConfig

from groupwise.errors import DataError, ModelError
from groupwise.models.judging import Output, Steps, Tags
from groupwise.models.reward_model import CARD
from groupwise.models.scorer import scores_of
from groupwise.models.small import character_tokenizer
from tests.tiny_judges import ALPHABET, judge, pupil, save_judge, stock_logits

TEXTS = ["b", "abcdefgh abc", "", "gh gh"]
OUTPUTS = [Output("ab ", text) for text in TEXTS]
TOKENIZER = character_tokenizer(ALPHABET)
END = TOKENIZER.eos_token_id


@pytest.mark.parametrize("pad", [0, None, END])
def test_an_outputs_score_is_the_stock_models_on_its_row_alone(tmp_path: Path, pad: int | None) -> None:
    """Also where padding is unknown, or is the end token."""
    folder = save_judge(tmp_path, "outcome", pad_token_id=pad)
    found, unread = scores_of(judge(folder, "outcome"), OUTPUTS)
    expected = [stock_logits(folder, "outcome", [*TOKENIZER("ab " + text)["input_ids"], END]) for text in TEXTS]
    assert unread == {}
    assert torch.tensor(found) == pytest.approx(torch.stack(expected).numpy(), abs=1e-5)
    assert len({round(score, 3) for [score] in found}) == len(TEXTS)


def test_a_steps_score_is_the_probability_of_label_1_at_its_last_token(tmp_path: Path) -> None:
    folder = save_judge(tmp_path, "process")
    model = judge(folder, "process")
    found, _ = scores_of(model, [Steps("ab", ("cd\n", "e")), Steps("a", ("gh",))])
    logits = stock_logits(folder, "process", TOKENIZER("abcd\ne\n")["input_ids"])
    assert found[0] == pytest.approx(logits.softmax(-1)[[4, 6], 1].tolist(), abs=1e-6)
    alone = stock_logits(folder, "process", TOKENIZER("agh\n")["input_ids"])
    assert found[1] == pytest.approx(alone.softmax(-1)[[3], 1].tolist(), abs=1e-6)


def test_a_causal_model_says_one_of_two_words_after_each_step(tmp_path: Path) -> None:
    folder = save_judge(tmp_path, "causal")
    model = judge(folder, "process", tags=Tags("#", "+", "-"))
    [found], _ = scores_of(model, [Steps("ab", ("cd\n", "e"))])
    ids = TOKENIZER("ab cd #\ne #")["input_ids"]
    plus, minus = TOKENIZER("+-")["input_ids"]
    logits = stock_logits(folder, "causal", ids)[[6, 10]]
    assert found == pytest.approx(logits[:, [plus, minus]].softmax(-1)[:, 0].tolist(), abs=1e-6)


def test_the_separator_is_stored_beside_the_weights_and_read_again(tmp_path: Path) -> None:
    folder = save_judge(tmp_path, "process")
    assert judge(folder, "process").encode(Steps("a", ("b",))).token_ids == tuple(TOKENIZER("ab\n")["input_ids"])
    pupil(folder, "process", separator=" #").write_card(folder)
    assert json.loads((folder / CARD).read_text()) == {"kind": "process", "version": 0, "separator": " #"}
    for again in (judge(folder, "process"), pupil(folder, "process")):
        assert again.encode(Steps("a", ("b",))).token_ids == tuple(TOKENIZER("ab #")["input_ids"])
    (folder / CARD).write_text("{")
    with pytest.raises(ModelError, match=r"reward_model\.json cannot be read"):
        judge(folder, "process")


def test_a_new_head_is_decided_by_the_seed(tmp_path: Path) -> None:
    folder = save_judge(tmp_path, "causal", pad_token_id=None)
    before = torch.random.get_rng_state()
    heads = [pupil(folder, "outcome", seed=seed).model.score.weight for seed in (0, 0, 1)]
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])
    assert torch.random.get_rng_state().equal(before)
    assert heads[0].shape == (1, 32)
    assert pupil(folder, "process").model.score.weight.shape == (2, 32)
    assert pupil(folder, "outcome").model.config.pad_token_id == TOKENIZER.pad_token_id


def test_a_head_that_is_there_is_gone_on_with(tmp_path: Path) -> None:
    folder = save_judge(tmp_path, "outcome")
    assert pupil(folder, "outcome", seed=5).model.score.weight.equal(judge(folder, "outcome").model.score.weight)


@pytest.mark.parametrize(
    "saved, changes, kind, said",
    [
        ("outcome", {"num_labels": 2}, "outcome", "has num_labels 2, and a reward model of kind outcome has 1"),
        ("process", {"num_labels": 3}, "process", "has num_labels 3, and a reward model of kind process has 2"),
        ("process", {}, "outcome", "of kind process: name it with --step-reward"),
        ("outcome", {}, "process", "of kind outcome: name it with --reward"),
        ("causal", {}, "outcome", "Train one from it: groupwise reward-model train"),
        ("causal", {}, "process", "set reward.step_tags"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path: Path, saved: str, changes, kind, said: str) -> None:
    folder = save_judge(tmp_path, saved, **changes)
    with pytest.raises(ModelError) as caught:
        judge(folder, kind)
    assert said in str(caught.value)
    if saved == kind:
        with pytest.raises(ModelError, match="num_labels"):
            pupil(folder, kind)


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    folder = save_judge(tmp_path / "causal", "causal")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "A"}})
    )
    with pytest.raises(ModelError, match=r"lacks 1 of the reward model's weights \(score\.weight\)"):
        judge(folder, "outcome")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the backbone's weights \(model\.norm\.weight\)"):
        pupil(folder, "outcome")


@pytest.mark.parametrize(
    "config, kind, works", [(MambaConfig(), "outcome", "qwen3"), (OPTConfig(), "process", "qwen2")]
)
def test_a_backbone_without_the_class_is_refused_with_those_that_have_it(tmp_path: Path, config, kind, works) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Backbones that work: llama, qwen2") as caught:
        pupil(tmp_path, kind)
    assert works in str(caught.value)
    assert config.model_type in str(caught.value)


def test_what_is_too_long_or_empty_is_told(tmp_path: Path) -> None:
    model = judge(save_judge(tmp_path, "outcome"), "outcome")
    model.limit = 4
    assert len(model.encode(Output("a", "bc")).token_ids) == 4
    with pytest.raises(DataError, match="have 5 tokens, and at most 4 fit"):
        model.encode(Output("a", "bcd"))
    with pytest.raises(DataError, match="no token at all"):
        model.encode(Output("", "", finished=False))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_judge(tmp_path, "outcome")
    character_tokenizer(ALPHABET + "xyz").save_pretrained(folder)
    with pytest.raises(ModelError, match="do not belong together"):
        judge(folder, "outcome")
