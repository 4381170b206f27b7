"""Which layout and head a model's class can take, found by trying: a tiny clone of the class, random weights, on the CPU.

The shared layout is taken only where attention reaches our function once per layer, the layers are full or sliding
attention, and the log-probs equal those of the stock model. Several architectures fail silently; none is trusted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from groupwise.models.attention import KEYWORD, NAME, ForestAttention
from groupwise.models.head import HeadShape, chunked_logprobs, dense_logprobs
from groupwise.models.layout import plain_stream, shared_stream
from groupwise.models.policy import silence_dropout

_TOLERANCE = 2e-4
# Two groups of unlike lengths; longer than the shrunk window, so that windows matter.
_WINDOW = 5
_GROUPS = [((3, 9, 4, 7, 11, 2, 5, 8), ((5, 8, 2, 6, 1, 12), (6, 3))), ((10, 2, 6), ((7,), (4, 9, 9, 3)))]


@dataclass(frozen=True)
class Findings:
    """What the probe found: whether the shared layout is right, why not, and the head's shape (None: not a matrix)."""

    shared: bool
    reason: str
    head: HeadShape | None
    error: float = float("nan")


def probe(config: PreTrainedConfig, trust_remote_code: bool = False) -> Findings:
    """Try the shared layout and the chunked head on a tiny clone of `config`'s class."""
    try:
        clone = _tiny_clone(config, trust_remote_code)
    except Exception as error:
        # Named boundary: an architecture we cannot even shrink is served by its own forward.
        return Findings(False, f"no tiny clone of {config.model_type} could be made ({_first_line(error)})", None)
    with torch.no_grad():
        plain = plain_stream(_GROUPS)
        stock = clone(input_ids=plain.input_ids, attention_mask=plain.attention_mask, use_cache=False).logits
        expected, _ = dense_logprobs(stock.flatten(0, 1)[plain.predictor_T], plain.target_T, 1.0)
        head = _find_head(clone, expected)
        shared, reason, error_ = _try_shared(clone, expected)
    return Findings(shared, reason, head, error_)


def _try_shared(clone: PreTrainedModel, expected: torch.Tensor) -> tuple[bool, str, float]:
    kinds = set(getattr(clone.config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return False, f"it has layers of type {', '.join(sorted(kinds))}", float("nan")
    stream = shared_stream(_GROUPS)
    assert stream.forest is not None
    attention = ForestAttention(stream.forest)
    try:
        clone.set_attn_implementation(NAME)
        out = clone(
            input_ids=stream.input_ids, position_ids=stream.position_ids, attention_mask=None, use_cache=False,
            **{KEYWORD: attention},
        )  # fmt: skip
    except Exception as error:
        # Named boundary: models refuse a foreign attention in as many ways as there are models.
        return False, f"it does not take another attention function ({_first_line(error)})", float("nan")
    layers = clone.config.num_hidden_layers
    if sorted(attention.calls) != list(range(layers)):
        return False, f"{len(attention.calls)} of {layers} layers call the attention function", float("nan")
    found, _ = dense_logprobs(out.logits[0][stream.predictor_T], stream.target_T, 1.0)
    error = (found - expected).abs().max().item()
    if not error <= _TOLERANCE:
        return False, f"shared and plain log-probs differ by {error:.2g}", error
    return True, f"shared equals plain within {error:.0e}", error


def _find_head(clone: PreTrainedModel, expected: torch.Tensor) -> HeadShape | None:
    head = clone.get_output_embeddings()
    if head is None or clone.base_model is clone or not hasattr(head, "weight"):
        return None
    stream = plain_stream(_GROUPS)
    hidden = clone.base_model(input_ids=stream.input_ids, attention_mask=stream.attention_mask, use_cache=False)[0]
    hidden = hidden.flatten(0, 1)[stream.predictor_T]
    if hidden.shape[-1] != head.weight.shape[-1]:
        return None
    scale = getattr(clone.config, "logit_scale", None) or 1.0
    scale /= getattr(clone.config, "logits_scaling", None) or 1.0
    shape = HeadShape(scale, getattr(clone.config, "final_logit_softcapping", None))
    found, _ = chunked_logprobs(hidden, head.weight, getattr(head, "bias", None), stream.target_T, shape=shape)
    return shape if bool((found - expected).abs().max() <= _TOLERANCE) else None


_SMALL: dict[str, Callable[[Any], Any]] = {
    "hidden_size": lambda v: 64,
    "intermediate_size": lambda v: 96,
    "num_attention_heads": lambda v: 4,
    "num_key_value_heads": lambda v: v,
    "head_dim": lambda v: 16,
    "vocab_size": lambda v: 32,
    "max_position_embeddings": lambda v: 128,
    "sliding_window": lambda v: _WINDOW,
}


def _tiny_clone(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    text = config.get_text_config()
    if text is not config:
        raise ValueError("its configuration nests a text model")
    try:
        return _build(_shrink(config, _SMALL), trust_remote_code)
    except Exception:
        # Some classes tie their widths to each other in ways of their own: keep the widths, drop layers.
        narrow = {k: v for k, v in _SMALL.items() if k in ("vocab_size", "sliding_window")}
        return _build(_shrink(config, narrow), trust_remote_code)


def _shrink(config: PreTrainedConfig, small: dict[str, Callable[[Any], Any]]) -> PreTrainedConfig:
    tiny = copy.deepcopy(config)
    heads, kv_heads = getattr(config, "num_attention_heads", 1), getattr(config, "num_key_value_heads", None)
    for name, new in small.items():
        if getattr(tiny, name, None) is not None:
            setattr(tiny, name, new(getattr(tiny, name)))
    if kv_heads and "num_attention_heads" in small:
        tiny.num_key_value_heads = 4 if kv_heads == heads else 2
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(tiny, name, None) is not None:
            setattr(tiny, name, 0)
    types = getattr(config, "layer_types", None)
    layers = 2
    if types:
        layers = max(2, 1 + max(types.index(kind) for kind in set(types)))
        tiny.layer_types = list(types[:layers])
    tiny.num_hidden_layers = layers
    return tiny


def _build(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clone = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        with torch.no_grad():
            for parameter in clone.parameters():
                # Large enough that a wrong mask shows, and biases that are not 0.
                noise = torch.randn_like(parameter)
                parameter.copy_(0.15 * noise) if parameter.ndim > 1 else parameter.add_(0.05 * noise)
    silence_dropout(clone)
    clone.eval()
    plain = plain_stream(_GROUPS)
    with torch.no_grad():
        clone(input_ids=plain.input_ids, attention_mask=plain.attention_mask, use_cache=False)
    return clone  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"
