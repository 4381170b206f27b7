"""Models that read more than text: their text is trained, and the rest leaves an export as it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlavaConfig, PreTrainedModel

import groupwise
from groupwise.demo.model import character_tokenizer
from groupwise.errors import ModelError
from groupwise.models.load import load_policy
from groupwise.models.multimodal import check_causal, towers
from groupwise.store import checkpoint
from tests.tiny_models import SINCE_5_23, VOCABULARY, randomized
from tests.wide.shrink import small_config

ALPHABET = "abcdefghijklmnopqrstuvwxyz .!?"
SETTINGS = [
    "sampling.num_generations=4", "sampling.max_completion_length=4", "train.prompts_per_step=2", "train.steps=2",
    "train.learning_rate=1e-2", "train.weight_decay=0.5", "model.device=cpu",
]  # fmt: skip


def folder_of(kind: str, at: Path) -> Path:
    """What people download: the whole model, in bfloat16."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(small_config(kind, VOCABULARY + 8), dtype=torch.float32)
    randomized(model).bfloat16().save_pretrained(at)
    character_tokenizer(ALPHABET).save_pretrained(at)
    return at


def whole(folder: Path) -> PreTrainedModel:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    assert not report["missing_keys"]
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kind, loaded", [("qwen3_5", "vision is not loaded"), ("gemma3", "parameters for vision stay")]
)
def test_text_is_trained_and_the_rest_is_exported_as_it_was(
    kind: str, loaded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = folder_of(kind, tmp_path / "base"), tmp_path / "run"
    rows = [{"prompt": letter} for letter in "abcd"]
    groupwise.train(
        model=source, data=rows, run=run, show="quiet", overrides=SETTINGS,
        reward=lambda completions, **_: [text.count("a") + 0.1 * len(text) for text in completions],
    )  # fmt: skip
    exported = groupwise.export(run, tmp_path / "exported", dtype="float32")
    assert loaded in capsys.readouterr().err
    before, after = whole(source), whole(exported)
    assert type(after) is type(before)
    assert AutoConfig.from_pretrained(exported).model_type == kind
    text = {f"model.language_model.{name}" for name, _ in before.get_decoder().named_parameters()} | {"lm_head.weight"}
    moved = {name for name, p in after.named_parameters() if not p.equal(before.get_parameter(name))}
    assert moved
    assert moved <= text
    assert any("vision" in name or "visual" in name for name, _ in after.named_parameters())
    own = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    saved = checkpoint.load(run / "checkpoints/step-00000002").tensors("model")
    assert not any("vision" in name for name in saved)
    assert all(own.get_parameter(name).equal(tensor) for name, tensor in saved.items() if "rotary" not in name)


def test_what_has_no_class_for_text_alone_is_refused_in_a_sentence(tmp_path: Path) -> None:
    LlavaConfig().save_pretrained(tmp_path)
    named: dict[str, Any] = {"model": tmp_path, "data": [{"prompt": "a"}], "reward": lambda completions, **_: [0.0]}
    for ask in (lambda: load_policy(str(tmp_path), device="cpu"), lambda: groupwise.plan(**named)):
        with pytest.raises(ModelError, match="reads vision besides text, and transformers has no class") as caught:
            ask()
        assert "AfmoeConfig" not in str(caught.value), "no list of all that would be right"


@pytest.mark.parametrize(
    "kind, why",
    [
        pytest.param("musicgen", "several text models", marks=SINCE_5_23),
        ("t5", "no causal language model"),
    ],
)
def test_so_is_what_continues_no_text(kind: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        check_causal(AutoConfig.for_model(kind), "org/name")


def test_a_text_model_has_no_towers() -> None:
    assert towers(AutoConfig.for_model("llama")) == ()
    assert towers(AutoConfig.for_model("blt")) == ()
    assert set(towers(AutoConfig.for_model("gemma3n"))) == {"vision", "audio"}
