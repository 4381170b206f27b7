"""Models that no clone speaks for, and models that change their weights while they compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from groupwise.engines.base import finished
from groupwise.engines.native.engine import NativeEngine
from groupwise.errors import ModelError
from groupwise.models import probe as probing
from groupwise.models.load import load_policy
from groupwise.models.policy import Policy
from groupwise.models.probe import probe, unfit_itself
from tests.engines.policies import CODEC, difference, requests, sample
from tests.tiny_models import randomized

SIZES: dict[str, dict[str, Any]] = {
    "prophetnet": {
        "hidden_size": 32, "num_decoder_layers": 2, "num_encoder_layers": 2, "num_decoder_attention_heads": 4,
        "num_encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "is_decoder": True,
        "is_encoder_decoder": False,
    },
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 8, "rescale_every": 2},
}  # fmt: skip


def model_of(kind: str) -> PreTrainedModel:
    return randomized(AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](vocab_size=32, **SIZES[kind])))


def unclonable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("it stays large")

    monkeypatch.setattr(probing, "tiny_clone", refuse)


@pytest.mark.parametrize("kind", ["prophetnet", "xlnet"])
def test_what_sees_more_than_the_past_is_refused_without_a_clone_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unclonable(monkeypatch)
    model_of(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"\({kind}\) cannot be trained: what a token predicts depends on"):
        load_policy(str(tmp_path), device="cpu")


def test_a_sound_model_without_a_clone_is_tried_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unclonable(monkeypatch)
    model_of("llama").save_pretrained(tmp_path)
    loaded = load_policy(str(tmp_path), device="cpu")
    assert "no tiny clone of llama could be made" in loaded.line
    assert "tried on a few rows of its own" in loaded.line
    assert loaded.policy.training
    assert difference(loaded.policy, requests(), sample(loaded.policy, requests())) < 5e-5


def test_a_model_that_cannot_read_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wants_more(self: Any, *inputs: Any, **keywords: Any) -> Any:
        raise ValueError("You have to specify decoder_input_ids")

    model = model_of("llama")
    monkeypatch.setattr(LlamaForCausalLM, "forward", wants_more)
    assert unfit_itself(model) == (
        "it does not compute rows of tokens (ValueError: You have to specify decoder_input_ids)"
    )


def test_one_that_changes_its_weights_in_eval_mode_is_found_without_a_clone() -> None:
    assert unfit_itself(model_of("rwkv")) == "it changes its weights in eval mode"


def test_a_model_that_divides_its_weights_in_eval_mode_is_never_in_it(tmp_path: Path) -> None:
    """RWKV does, every `rescale_every` layers: what is saved or copied between two passes is a part of itself."""
    model = model_of("rwkv")
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = load_policy(str(tmp_path), device="cpu")
    assert "always in train mode" in loaded.line
    asked = requests(n=2)
    assert difference(loaded.policy, asked, sample(loaded.policy, asked)) < 5e-5
    now = loaded.policy.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        stock = model.eval()(input_ids=torch.tensor([[3, 4, 5]])).logits
    assert not all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        ours = loaded.policy.model(input_ids=torch.tensor([[3, 4, 5]])).logits
    torch.testing.assert_close(ours, stock, atol=1e-2, rtol=0)


def test_weights_that_change_in_any_mode_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    def drifting(self: Any, *inputs: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            self.lm_head.weight.mul_(1 + 1e-6)
        return forward(self, *inputs, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "forward", drifting)
    assert probe(CONFIG_MAPPING["llama"]()).unfit == "it changes its weights while it computes"


def test_other_models_sample_in_eval_mode() -> None:
    policy = Policy(model_of("llama"), "plain", None)
    modes: list[bool] = []
    policy.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    engine = NativeEngine(policy, CODEC)
    for request in requests(n=1, max_tokens=2):
        engine.submit(request)
    list(finished(engine))
    assert set(modes) == {False}
    assert policy.training
