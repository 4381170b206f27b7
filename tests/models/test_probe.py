"""What the probe says about architectures, and that it finds the faults it is there for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.cache_utils import DynamicLayer
from transformers.models.llama import modeling_llama

from groupwise.demo.model import character_tokenizer
from groupwise.engines.native.engine import NativeEngine
from groupwise.models import attention
from groupwise.models.clone import WINDOW, tiny_clone
from groupwise.models.head import HeadShape
from groupwise.models.load import load_policy
from groupwise.models.probe import Findings, probe
from groupwise.models.tiles import Options
from groupwise.tokenizer.codec import Codec
from groupwise.types import Request, Sampling
from tests.engines.policies import generate
from tests.tiny_models import GROUPS, SINCE_5_23, VOCABULARY, randomized, stock_logprobs

SHARED = {
    "llama": HeadShape(), "qwen2": HeadShape(), "qwen3": HeadShape(), "mistral": HeadShape(), "phi3": HeadShape(),
    "gemma2": HeadShape(softcap=30.0), "gemma3_text": HeadShape(), "gpt_oss": HeadShape(), "phi": HeadShape(),
    "cohere": HeadShape(scale=0.0625), "granite": HeadShape(), "gpt2": HeadShape(), "opt": HeadShape(),
    "gpt_neox": HeadShape(), "qwen3_moe": HeadShape(), "mixtral": HeadShape(), "deepseek_v3": HeadShape(),
}  # fmt: skip
PLAIN = {
    "stablelm": "does not take another attention function",
    "llama4_text": "layers of type chunked_attention",
    "qwen3_next": "layers of type full_attention, linear_attention",
    "bloom": "0 of 2 layers",
    "gptj": "0 of 2 layers",
    "falcon": "0 of 2 layers",
    "mamba": "layers of type linear_attention",
    "minimax": "layers of type full_attention, linear_attention",
}

WITHOUT_CACHE = {"minimax"}


def timed(config: PreTrainedConfig) -> tuple[Findings, float]:
    start = time.process_time()
    return probe(config), time.process_time() - start


@pytest.mark.parametrize("kind", SHARED)
def test_the_shared_layout_is_taken_where_it_is_right(kind: str) -> None:
    findings, seconds = timed(CONFIG_MAPPING[kind]())
    assert findings.shared, findings.reason
    assert findings.error < 1e-4
    assert findings.head == SHARED[kind]
    assert findings.cached
    assert findings.unfit == ""
    assert seconds < 60, "default configurations are those of large models: the clone is not small"


@pytest.mark.parametrize("kind", PLAIN)
def test_the_plain_layout_is_taken_elsewhere_and_the_reason_is_given(kind: str) -> None:
    findings, seconds = timed(CONFIG_MAPPING[kind]())
    assert not findings.shared
    assert PLAIN[kind] in findings.reason
    assert findings.cached == (kind not in WITHOUT_CACHE)
    assert findings.unfit == ""
    assert seconds < 60


def test_probing_leaves_torchs_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    probe(CONFIG_MAPPING["llama"]())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_window_that_only_later_layers_have_is_reached() -> None:
    config = Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=3, num_hidden_layers=6)
    clone = tiny_clone(config)
    assert clone.config.layer_types == ["full_attention"] * 3 + ["sliding_attention"]
    assert clone.config.sliding_window == WINDOW
    assert config.sliding_window == 4096
    assert probe(config).shared


def test_longrope_is_shrunk_with_its_heads() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    config = CONFIG_MAPPING["phi3"](rope_parameters=rope)
    assert probe(config).shared
    assert len(config.rope_parameters["short_factor"]) == 48


@pytest.mark.parametrize("width, base, scale", [(2560, 256, 0.1), (80, 8, 0.1), (80, 80, 1.0)])
def test_a_factor_that_is_computed_of_a_width_is_the_models_own(width: int, base: int, scale: float) -> None:
    config = CONFIG_MAPPING["minicpm3"](hidden_size=width, dim_model_base=base)
    assert probe(config).head == HeadShape(scale=pytest.approx(scale))


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama4_text", {}),
        ("minimax_m3_vl_text", {"layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 59}),
    ],
)
def test_where_left_padding_moves_something_rows_begin_at_position_0(kind: str, changes: dict[str, Any]) -> None:
    """Blocks of keys and a temperature's floor are longer than any probe's rows unless a clone has smaller ones."""
    findings = probe(CONFIG_MAPPING[kind](**changes))
    assert (findings.shared, findings.cached, findings.aligned, findings.unfit) == (False, True, True, "")


@SINCE_5_23
@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4"])
def test_sparse_attention_is_no_reason_to_refuse_a_model(kind: str) -> None:
    findings = probe(CONFIG_MAPPING[kind]())
    assert (findings.unfit, findings.cached) == ("", True)


def sparse(heads: int) -> PreTrainedModel:
    """A DeepSeek-V3.2 whose rows are longer than what its index heads choose."""
    config = CONFIG_MAPPING["deepseek_v32"](
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        mlp_layer_types=["dense", "sparse"], num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=12, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, index_head_dim=16, index_n_heads=heads, index_topk=6,
        max_position_embeddings=64,
    )  # fmt: skip
    return randomized(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


@SINCE_5_23
@torch.no_grad()
def test_what_sparse_attention_trains_and_samples_is_the_stock_models(tmp_path: Path) -> None:
    stock = sparse(16)
    stock.save_pretrained(tmp_path)
    character_tokenizer("abcdefghijklmnopqrstuvwxyz .!?").save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), device="cpu").policy
    assert policy.cached
    found, expected = policy(policy.stream(GROUPS)).logprobs_T, stock_logprobs(stock, GROUPS)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    settings = Sampling(max_tokens=12)
    asked = [Request(str(i), prompt, 3, settings, 100 * i) for i, prompt in enumerate([[3, 9, 4, 7, 11, 2, 8], [10]])]
    engine = NativeEngine(policy, Codec(character_tokenizer("abcdefghijklmnopqrstuvwxyz .!?")), max_live=4)
    outputs = generate(engine, asked)
    groups = [(r.token_ids, [o.token_ids for o in group]) for r, group in zip(asked, outputs, strict=True)]
    assert max(len(o.token_ids) for group in outputs for o in group) > 6, "more than what is chosen"
    sampled = torch.tensor([x for group in outputs for o in group for x in o.sampled_logprobs])
    torch.testing.assert_close(sampled, stock_logprobs(stock, groups)[0], atol=1e-4, rtol=0)


@SINCE_5_23
@torch.no_grad()
@pytest.mark.parametrize("heads, tied", [(2, True), (4, True), (16, False)])
def test_few_index_heads_rank_keys_alike_and_are_refused(heads: int, tied: bool) -> None:
    stock = sparse(heads)
    ids = torch.randint(VOCABULARY, (16, 48), generator=torch.Generator().manual_seed(0))
    difference = (stock(ids, use_cache=False).logits[:, :24] - stock(ids[:, :24], use_cache=False).logits).abs().max()
    assert (difference > 1e-2) == tied, "the stock model's own tokens depend on those after them"
    assert (f"the sum of {heads} index heads" in probe(stock.config).unfit) == tied
    assert bool(probe(stock.config).unfit) == tied


@SINCE_5_23
def test_a_model_that_exchanges_its_modules_is_unfit() -> None:
    config = CONFIG_MAPPING["big_bird"](is_decoder=True)
    assert "it exchanges its BigBirdBlockSparseAttention for another module" in probe(config).unfit
    assert probe(CONFIG_MAPPING["big_bird"](is_decoder=True, attention_type="original_full")).unfit == ""


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_next", "nemotron_h", "mamba", "mamba2", "falcon_h1", "jamba"])
def test_linear_attention_keeps_its_cache(kind: str) -> None:
    findings = probe(CONFIG_MAPPING[kind]())
    assert (findings.cached, findings.aligned, findings.unfit) == (True, False, "")
    assert findings.head == HeadShape()


def test_layers_that_differ_are_shrunk_each_in_its_way() -> None:
    hybrid = ["linear_attention"] * 5 + ["full_attention"]
    granite = CONFIG_MAPPING["granitemoehybrid"](layer_types=hybrid * 5, num_hidden_layers=30, vocab_size=49160)
    findings = probe(granite)
    assert (findings.cached, findings.head, findings.unfit) == (True, HeadShape(), "")
    gemma = CONFIG_MAPPING["gemma4_text"]()
    assert probe(gemma).shared
    overrides = [layer.head_dim for layer in tiny_clone(gemma).config.per_layer_config]
    assert overrides == [16] * 5 + [32], "twice as wide where the others are half as wide, as in the model"
    assert gemma.per_layer_config[5].head_dim == 512, "and the model's own stays"


@pytest.mark.parametrize("kind, sharing", [("gemma3n_text", 15), ("gemma4_text", 18)])
def test_layers_that_use_others_keys_are_kept_with_those(kind: str, sharing: int) -> None:
    config = CONFIG_MAPPING[kind](num_kv_shared_layers=sharing)
    clone = tiny_clone(config).config
    assert clone.num_kv_shared_layers == clone.num_hidden_layers // 2
    assert set(clone.layer_types) == set(config.layer_types)
    findings = probe(config)
    assert (findings.shared, findings.unfit) == (True, "")


def test_a_window_that_were_ignored_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tiled = attention._tiled

    def without_window(*inputs: Any) -> torch.Tensor:
        asked = inputs[-1]
        return tiled(*inputs[:-1], Options(asked.scale, softcap=asked.softcap, sinks=asked.sinks))

    monkeypatch.setattr(attention, "_tiled", without_window)
    assert probe(CONFIG_MAPPING["llama"]()).shared
    for kind in ("mistral", "gemma2", "gpt_oss"):
        findings = probe(CONFIG_MAPPING[kind]())
        assert "differ by" in findings.reason


def test_a_layer_that_bypasses_the_function_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_llama.LlamaAttention.forward

    def second_layer_is_stock(self: Any, *inputs: Any, **keywords: Any) -> Any:
        if self.layer_idx == 1:
            self.config = LlamaConfig(**self.config.to_dict(), attn_implementation="eager")
        return forward(self, *inputs, **keywords)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", second_layer_is_stock)
    assert probe(CONFIG_MAPPING["llama"]()).reason == "1 of 2 layers call the attention function"


def test_a_head_with_a_scale_that_nobody_told_us_of_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    def halved(self: Any, *inputs: Any, **keywords: Any) -> Any:
        out = forward(self, *inputs, **keywords)
        out.logits = out.logits / 2
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", halved)
    findings = probe(CONFIG_MAPPING["llama"]())
    assert findings.head is None
    assert (findings.shared, findings.reason) == (False, "its head is more than a matrix")


@pytest.mark.parametrize("kind, other", [("bert", "tokens after it")])
def test_a_model_that_sees_more_than_the_past_is_unfit(kind: str, other: str) -> None:
    assert f"depends on {other}" in probe(CONFIG_MAPPING[kind]()).unfit


def test_so_is_one_whose_padding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    def leaking(self: Any, *inputs: Any, **keywords: Any) -> Any:
        out = forward(self, *inputs, **keywords)
        out.logits = out.logits + 0.1 * (keywords["input_ids"][:, :1, None] == 10) * keywords["input_ids"].shape[1]
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", leaking)
    assert "depends on the padding beside it" in probe(CONFIG_MAPPING["llama"]()).unfit


def test_a_model_that_is_asked_to_be_causal_is_fit() -> None:
    assert probe(CONFIG_MAPPING["bert"](is_decoder=True)).unfit == ""


def test_a_model_with_chance_in_its_forward_is_unfit() -> None:
    assert "router_jitter_noise in its PhimoeTopKRouter is chance" in probe(CONFIG_MAPPING["phimoe"]()).unfit
    assert "in train mode it computes something else" in probe(CONFIG_MAPPING["falcon"](hidden_dropout=0.5)).unfit
    assert probe(CONFIG_MAPPING["gpt2"](attn_pdrop=0.1)).unfit == ""


def test_what_cannot_be_shrunk_is_served_by_its_own_forward() -> None:
    findings = probe(CONFIG_MAPPING["blenderbot"]())
    assert (findings.shared, findings.head, findings.cached, findings.unfit) == (False, None, False, "")
    assert "no tiny clone of blenderbot could be made" in findings.reason


def test_a_text_model_inside_another_is_found() -> None:
    findings = probe(CONFIG_MAPPING["gemma3"]())
    assert findings.shared
    assert findings.cached


def test_a_cache_that_forgets_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    update = DynamicLayer.update

    def forgetful(self: Any, key: torch.Tensor, *rest: Any) -> Any:
        return update(self, key if self.get_seq_length() < 6 else torch.zeros_like(key), *rest)

    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    assert not probe(CONFIG_MAPPING["llama"]()).cached


def test_a_clone_that_stays_large_is_not_made() -> None:
    config = CONFIG_MAPPING["xlstm"]()  # names its widths as nobody else does
    findings, seconds = timed(config)
    assert "no tiny clone of xlstm" in findings.reason
    assert seconds < 60


def test_a_class_that_trains_on_rows_of_some_lengths_only_is_unfit() -> None:
    config = CONFIG_MAPPING["reformer"](
        is_decoder=True, attn_layers=["local", "lsh"], axial_pos_shape=(8, 8), axial_pos_embds_dim=(16, 16),
        hidden_size=32, num_attention_heads=2, attention_head_size=8, feed_forward_size=32, num_buckets=4,
        max_position_embeddings=64, local_attn_chunk_length=4, lsh_attn_chunk_length=4, vocab_size=32,
    )  # fmt: skip
    assert "in train mode it takes no row of just any length" in probe(config).unfit
