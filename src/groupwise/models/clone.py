"""A tiny model of the same class as a large one: every switch of its configuration, few layers, small widths."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from groupwise.models.size import parameter_count

WINDOW: Final = 5
"""What windows and other limits of attention are shrunk to, so that a few tokens are enough to feel them."""

_MOST_PARAMETERS = 20_000_000
_LIMIT = re.compile(r"window(_size|_len)?$|attention_chunk_size|index_topk|local_attention|extent$")
_WIDTHS = {
    "hidden_size": 64, "intermediate_size": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "word_embed_proj_dim": 64,
    "num_attention_heads": 4, "head_dim": 16, "rotary_dim": 8,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32,
    "v_head_dim": 12, "index_n_heads": 2, "index_head_dim": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 96,
    "chunk_size": 8, "mamba_chunk_size": 8, "block_size": 8, "linear_num_heads": 4, "linear_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16,
}  # fmt: skip
_ALWAYS = {"vocab_size": 32, "vocab_size_per_layer_input": 32, "max_position_embeddings": 128}


def tiny_clone(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A randomly initialised model of `config`'s class in float32, on the CPU, the same each time; nested ones too.

    Raises ValueError where no small one can be made, and whatever else the class raises.
    """
    config.get_text_config()  # raises where it is not clear which of several nested ones that is
    try:
        return _build(_shrunk(config, _ALWAYS | _WIDTHS), trust_remote_code)
    except Exception:  # noqa: BLE001 - a boundary: some classes tie their widths together, so drop nothing but layers
        return _build(_shrunk(config, _ALWAYS), trust_remote_code)


def _shrunk(config: PreTrainedConfig, small: Mapping[str, int]) -> PreTrainedConfig:
    tiny = copy.deepcopy(config)
    for name, value in small.items():
        if getattr(config, name, None) and not _is_computed(config, name):
            setattr(tiny, name, value)
    for name in vars(config):
        if _LIMIT.search(name) and _is_number(getattr(config, name)):
            setattr(tiny, name, WINDOW)
        if name.endswith("_token_id") and _is_number(getattr(config, name)):
            setattr(tiny, name, 0)
    if "num_attention_heads" in small:
        heads = getattr(config, "num_attention_heads", None)
        for name in ("num_key_value_heads", "num_kv_heads"):
            if getattr(config, name, None):
                setattr(tiny, name, 4 if getattr(config, name) == heads else 2)
        _cut_rope_factors(tiny)
    if hasattr(config, "num_hidden_layers"):
        _drop_layers(tiny)
    for name in type(config).sub_configs:
        if getattr(config, name, None) is not None:
            setattr(tiny, name, _shrunk(getattr(config, name), small))
    return tiny


def _cut_rope_factors(config: PreTrainedConfig) -> None:
    """Longrope names a factor per pair of rotated channels: as many as the smaller heads have."""
    rope = getattr(config, "rope_parameters", None) or {}
    pairs = int(_WIDTHS["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if rope.get(name):
            rope[name] = rope[name][:pairs]


def _drop_layers(config: PreTrainedConfig) -> None:
    """Keep two layers, or as many as it takes to have one of every kind that the configuration lists."""
    many = config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == many}
    layers = min(many, 2)
    for kinds in lists.values():
        layers = max(layers, *(kinds.index(kind) + 1 for kind in kinds))
    for name, value in lists.items():
        setattr(config, name, value[:layers])
    config.num_hidden_layers = layers


def _build(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    if (count := parameter_count(config, trust_remote_code)) > _MOST_PARAMETERS:
        raise ValueError(f"a small one still has {count / 1e6:.0f}M parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clone: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        with torch.no_grad():
            for parameter in clone.parameters():
                # Large enough that a wrong mask shows, and biases that are not 0.
                noise = torch.randn_like(parameter)
                parameter.copy_(0.15 * noise) if parameter.ndim > 1 else parameter.add_(0.05 * noise)
    return clone


def _is_computed(config: PreTrainedConfig, name: str) -> bool:
    attribute = getattr(type(config), name, None)
    return isinstance(attribute, property) and attribute.fset is None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
