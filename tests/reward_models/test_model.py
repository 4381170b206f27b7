"""Reward models: what is loaded, what is refused, and that scores are those of the stock classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, MambaConfig, OPTConfig, XLNetConfig

from groupwise.demo.model import character_tokenizer
from groupwise.errors import DataError, ModelError
from groupwise.reward_models.model import CARD, Kind
from groupwise.reward_models.score import scores_of
from groupwise.reward_models.text import Judged, Output, StepEncoder, Steps, Tags
from tests.tiny_judges import ALPHABET, judge, pupil, save_judge, stock_logits
from tests.tiny_models import randomized

TEXTS = ["b", "abcdefgh abc", "", "gh gh"]
OUTPUTS = [Output("ab ", text) for text in TEXTS]
TOKENIZER = character_tokenizer(ALPHABET)
END = TOKENIZER.eos_token_id


def score_at(folder: Path, token_ids: list[int], place: int = -1) -> float:
    """What body and head say at one token of a row, whatever the stock class takes for padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model.score(model.model(input_ids=torch.tensor([token_ids])).last_hidden_state)[0, place, 0])


@pytest.mark.parametrize("pad", [0, None, END, TOKENIZER("a")["input_ids"][0]])
def test_an_output_is_scored_at_the_last_token_of_its_row(tmp_path: Path, pad: int | None) -> None:
    """Also where padding is unknown, is the end token, or is a token that texts have."""
    folder = save_judge(tmp_path, "outcome", pad_token_id=pad)
    outputs = [*OUTPUTS, *(Output("ab ", text, finished=False) for text in TEXTS), Output("", "aa", finished=False)]
    found, unread = scores_of(judge(folder, "outcome"), outputs)
    rows = [[*TOKENIZER("ab " + text)["input_ids"]] for text in TEXTS]
    rows = [*([*row, END] for row in rows), *rows, TOKENIZER("aa")["input_ids"]]
    assert unread == {}
    assert [score for [score] in found] == pytest.approx([score_at(folder, row) for row in rows], abs=1e-5)
    assert len({round(score, 3) for [score] in found}) == len(outputs), "a finished output is not one that was cut off"


def test_a_model_that_others_trained_with_the_end_as_padding_is_remarked_on(tmp_path: Path) -> None:
    folder = save_judge(tmp_path, "outcome", pad_token_id=END)
    assert f"names as padding the token that its rows end with ({END})" in judge(folder, "outcome").remark
    learner = pupil(folder, "outcome")
    assert "names as padding" in learner.remark
    assert learner.model.config.pad_token_id == TOKENIZER.pad_token_id, "stock classes score what is saved as we do"
    learner.write_card(folder)
    assert judge(folder, "outcome").remark == "", "this one was trained here"
    assert judge(save_judge(tmp_path / "own", "outcome"), "outcome").remark == ""


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_rows_that_have_every_token_are_scored_alone(tmp_path: Path, kind: Kind) -> None:
    """There is none left to pad with."""
    tokenizer = character_tokenizer("ab")
    model = judge(save_judge(tmp_path, kind, tokenizer, pad_token_id=END), kind)
    texts = ["ab", "b", "abba"]
    judged: list[Judged] = [Output(text, "") if kind == "outcome" else Steps("", (text, "a")) for text in texts]
    if kind == "process":
        model.encoder = StepEncoder(model.codec, "b")
    together, _ = scores_of(model, judged)
    alone = [scores_of(model, [one])[0][0] for one in judged]
    assert [x for one in together for x in one or ()] == pytest.approx(
        [x for one in alone for x in one or ()], abs=1e-5
    )


def test_a_class_that_looks_at_the_end_of_the_padding_gets_none(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(ALPHABET)
    config = XLNetConfig(
        vocab_size=len(tokenizer), d_model=32, n_layer=1, n_head=2, d_inner=32, num_labels=1, pad_token_id=0,
        eos_token_id=END,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomized(AutoModelForSequenceClassification.from_config(config))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found, _ = scores_of(judge(tmp_path, "outcome"), OUTPUTS)
    rows = [[*TOKENIZER("ab " + text)["input_ids"], END] for text in TEXTS]
    expected = [stock_logits(tmp_path, "outcome", row).item() for row in rows]
    assert [score for [score] in found] == pytest.approx(expected, abs=1e-5)


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
