"""A tiny model of the same class as a large one: every switch of its configuration, few layers, small widths."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from groupwise.models.size import parameter_count

WINDOW: Final = 5
"""What windows and other limits of attention are shrunk to, so that a few tokens are enough to feel them."""

_MOST_PARAMETERS = 20_000_000
_DEEPEST = 8
"""Layers."""
_LIMIT = re.compile(r"window(_size|_len)?$|attention_chunk_size|index_topk$|local_attention|extent$")
_LENGTHS = {"floor_scale": 3, "log_scaling_n_floor": 3, "index_block_size": 3, "index_topk_blocks": 2,
            "rescale_every": 1}  # fmt: skip
"""Positions at which something changes (a temperature's floor), blocks of keys, and layers after which weights are
divided (RWKV): a short row has several, and two layers."""
_WIDTHS = {
    "hidden_size": 64, "intermediate_size": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "word_embed_proj_dim": 64,
    "num_attention_heads": 4, "head_dim": 16, "rotary_dim": 8,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32,
    "v_head_dim": 12, "index_head_dim": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 96,
    "chunk_size": 8, "mamba_chunk_size": 8, "block_size": 8, "linear_num_heads": 4, "linear_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16, "global_head_dim": 32, "top_k_experts": 2, "dense_intermediate_size": 96,
    "shared_intermediate_size": 32, "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "time_step_rank": 8,
}  # fmt: skip
_SCANS = (
    ("mamba_n_heads", "mamba_d_head"), ("num_heads", "head_dim"), ("mamba_num_heads", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_headdim"),
)  # fmt: skip
"""Names of a state space's heads and of their width: together as wide as its inner states."""
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
    tiny, per_layer = _without_overrides(config)
    whole = copy.copy(tiny)
    for name, value in small.items():
        if getattr(whole, name, None) and not _is_computed(whole, name):
            own = getattr(whole, name)
            setattr(tiny, name, [value] * len(own) if isinstance(own, list) else value)
    for name, value in vars(whole).items():
        if (_LIMIT.search(name) or name in _LENGTHS) and _is_number(value):
            setattr(tiny, name, _LENGTHS.get(name, WINDOW))
        if name.endswith("_token_id") and _is_number(value):
            setattr(tiny, name, 0)
    _shrink_rope(tiny)
    if "num_attention_heads" in small:
        _shrink_heads(tiny, whole)
        _shrink_scans(tiny)
        _cut_rope_factors(tiny)
    if hasattr(config, "num_hidden_layers"):
        kept = _drop_layers(tiny)
        if per_layer:
            tiny.per_layer_config = _shrunk_overrides(per_layer, kept, tiny, whole)
    for name in type(config).sub_configs:
        if getattr(config, name, None) is not None:
            setattr(tiny, name, _shrunk(getattr(config, name), small))
    return tiny


def _without_overrides(config: PreTrainedConfig) -> tuple[PreTrainedConfig, dict[int, dict[str, Any]]]:
    """A copy of a configuration without what single layers have otherwise (which guards it against being read), and
    that."""
    copied = copy.deepcopy(config)
    spec = copied.__dict__.get("_heterogeneity_spec")
    if spec is None:
        return copied, {}
    copied.per_layer_config = None
    return copied, dict(spec.per_layer_overrides)


def _shrunk_overrides(
    per_layer: Mapping[int, Mapping[str, Any]], kept: Sequence[int], tiny: PreTrainedConfig, whole: PreTrainedConfig
) -> dict[int | str, dict[str, Any]]:
    """What layers that are kept have otherwise, as much larger or smaller as it was."""

    def shrunk(name: str, value: Any) -> Any:
        own, small = getattr(whole, name, None), getattr(tiny, name, None)
        if own == small or not (_is_number(value) and _is_number(own) and _is_number(small)):
            return value
        return max(1, round(small * value / own)) if own else value

    layers = enumerate([*kept, *kept][: tiny.num_hidden_layers])
    found = {new: per_layer[old] for new, old in layers if old in per_layer}
    return {layer: {name: shrunk(name, value) for name, value in own.items()} for layer, own in found.items()}


def _shrink_heads(tiny: PreTrainedConfig, whole: PreTrainedConfig) -> None:
    heads, groups = getattr(whole, "num_attention_heads", None), 4
    for name in ("num_key_value_heads", "num_kv_heads"):
        if own := getattr(whole, name, None):
            groups = 4 if own == heads else 2
            setattr(tiny, name, groups)
    if own := getattr(whole, "index_n_heads", None):
        # One per group of keys, or many whose sum ranks the keys. Of few such, all are often 0 and the rank a tie that
        # later tokens decide: a clone has as few as the model, and of many enough that it ranks as the model does.
        by_group = own == getattr(whole, "num_key_value_heads", None) and not getattr(whole, "kv_lora_rank", None)
        tiny.index_n_heads = groups if by_group else min(own, 16)
    if own := getattr(whole, "attention_hidden_size", None):
        tiny.attention_hidden_size = tiny.hidden_size * own // whole.hidden_size
        if hasattr(whole, "attention_head_dim"):
            tiny.attention_head_dim = tiny.attention_hidden_size // 4


def _shrink_scans(tiny: PreTrainedConfig) -> None:
    expand = getattr(tiny, "mamba_expand", None) or getattr(tiny, "expand", None)
    if not expand:
        return
    for heads, width in _SCANS:
        if _is_number(getattr(tiny, heads, None)) and hasattr(tiny, width):
            setattr(tiny, width, 16)
            setattr(tiny, heads, int(expand * tiny.hidden_size) // 16)
    if getattr(tiny, "mamba_d_ssm", None):
        tiny.mamba_d_ssm = int(expand * tiny.hidden_size)
    for groups in ("mamba_n_groups", "n_groups", "mamba_ngroups"):
        if (getattr(tiny, groups, None) or 1) > 1:
            setattr(tiny, groups, 2)


def _shrink_rope(tiny: PreTrainedConfig) -> None:
    """A temperature that grows with the position does so from the length that the model was first trained on."""
    rope = getattr(tiny, "rope_parameters", None) or {}
    if rope.get("llama_4_scaling_beta"):
        rope["original_max_position_embeddings"] = WINDOW


def _cut_rope_factors(config: PreTrainedConfig) -> None:
    """Longrope names a factor per pair of rotated channels: as many as the smaller heads have."""
    rope = getattr(config, "rope_parameters", None) or {}
    pairs = int(_WIDTHS["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if rope.get(name):
            rope[name] = rope[name][:pairs]


def _drop_layers(config: PreTrainedConfig) -> list[int]:
    """Keep two layers, or as many as it takes to have one of every kind that the configuration lists, and return which;
    where the last ones use keys and values of others, as many of those once more."""
    many = int(config.num_hidden_layers or 0)
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == many}
    sharing = int(getattr(config, "num_kv_shared_layers", None) or 0)
    # Where kinds are computed from a layer's number, layers must keep theirs.
    own = {name: getattr(config, name, None) for name in ("layer_types", "layers_block_type") if name not in lists}
    computed = [value for value in own.values() if isinstance(value, list) and len(value) == many]
    kept = _kept_layers([*lists.values(), *computed], many - sharing, deepest=many if computed else _DEEPEST)
    copies = 2 if sharing and 2 * len(kept) <= many else 1
    for name, value in lists.items():
        numbers = value == list(range(many))
        setattr(config, name, list(range(len(kept) * copies)) if numbers else [value[i] for i in kept] * copies)
    if sharing:
        config.num_kv_shared_layers = len(kept) * (copies - 1)
    config.num_hidden_layers = len(kept) * copies
    return kept


def _kept_layers(lists: Sequence[list[Any]], own: int, *, deepest: int) -> list[int]:
    """The first layers, up to the first of the last kind; only the first of each where those are many: rounding grows
    from layer to layer, and a clone is to be quick."""
    lists = [kinds for kinds in lists if kinds != list(range(len(kinds)))]
    count = min(own, 2)
    for kinds in lists:
        count = max(count, *(kinds.index(kind) + 1 for kind in kinds))
    if count <= deepest:
        return list(range(count))
    first: dict[str, int] = {}
    for layer in range(own):
        first.setdefault(repr([kinds[layer] for kinds in lists]), layer)
    return sorted(first.values())


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
