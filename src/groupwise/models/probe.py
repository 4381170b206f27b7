"""Which layout and head a model's class can take, found by trying: a tiny clone of it, random weights, on the CPU.

The shared layout is taken only where attention reaches our function once per layer, the layers are full or sliding
attention, and the log-probs equal those of the stock model. Several architectures fail silently; none is trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from groupwise.models.attention import KEYWORD, NAME, ForestAttention
from groupwise.models.clone import WINDOW, tiny_clone
from groupwise.models.head import HeadShape, chunked_logprobs, dense_logprobs
from groupwise.models.layout import Stream, plain_stream, shared_stream
from groupwise.models.policy import silence_dropout

_TOLERANCE = 2e-4
# Two groups of unlike lengths, longer than a clone's windows, so that windows matter.
_GROUPS = [((3, 9, 4, 7, 11, 2, 5, 8), ((5, 8, 2, 6, 1, 12), (6, 3))), ((10, 2, 6), ((7,), (4, 9, 9, 3)))]
assert len(_GROUPS[0][0]) > WINDOW


@dataclass(frozen=True)
class Findings:
    """What the probe found: whether the shared layout is right, why not, and the head's shape (None: not a matrix).

    `unfit` says why no policy can be made of the class at all; empty where one can.
    """

    shared: bool
    reason: str
    head: HeadShape | None
    error: float = float("nan")
    unfit: str = ""


def probe(config: PreTrainedConfig, trust_remote_code: bool = False) -> Findings:
    """Try the shared layout and the chunked head on a tiny clone of `config`'s class, in a policy's train mode."""
    stream = plain_stream(_GROUPS)
    try:
        clone = tiny_clone(config, trust_remote_code)
        with torch.no_grad():
            logits = _stock_logits(clone.eval(), stream)
    except Exception as error:  # noqa: BLE001 - a boundary: what cannot even be shrunk is served by its own forward
        return Findings(False, f"no tiny clone of {config.model_type} could be made ({_first_line(error)})", None)
    silence_dropout(clone)
    clone.train()
    with torch.no_grad():
        unfit = _unfit(clone, stream, logits)
        expected, _ = dense_logprobs(logits.flatten(0, 1)[stream.predictor_T], stream.target_T, 1.0)
        head = _find_head(clone, stream, expected)
        shared, reason, difference = _try_shared(clone, expected)
    if shared and head is None:
        shared, reason = False, "its head is more than a matrix"
    return Findings(shared, reason, head, difference, unfit)


def _stock_logits(clone: PreTrainedModel, stream: Stream) -> Tensor:
    return clone(input_ids=stream.input_ids, attention_mask=stream.attention_mask, use_cache=False).logits  # type: ignore[no-any-return]


def _unfit(clone: PreTrainedModel, stream: Stream, logits: Tensor) -> str:
    """Why a token's logits are not a function of it and its past alone; empty where they are."""
    if not torch.allclose(_stock_logits(clone, stream), logits, atol=_TOLERANCE):
        return "in train mode it computes something else than in eval mode, with every dropout off"
    changed = stream.input_ids.clone()
    changed[0, -1] += 1
    assert stream.attention_mask is None or stream.attention_mask[0, -1] == 1
    other = clone(input_ids=changed, attention_mask=stream.attention_mask, use_cache=False).logits
    if not torch.allclose(other[0, :-1], logits[0, :-1], atol=_TOLERANCE):
        return "a token changes what comes before it, so this is no causal language model"
    return ""


def _try_shared(clone: PreTrainedModel, expected: Tensor) -> tuple[bool, str, float]:
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
    except Exception as error:  # noqa: BLE001 - a boundary: models refuse a foreign attention in as many ways as they are
        return False, f"it does not take another attention function ({_first_line(error)})", float("nan")
    layers = clone.config.num_hidden_layers
    if sorted(attention.calls) != list(range(layers)):
        return False, f"{len(attention.calls)} of {layers} layers call the attention function", float("nan")
    found, _ = dense_logprobs(out.logits[0][stream.predictor_T], stream.target_T, 1.0)
    difference = (found - expected).abs().max().item()
    if not difference <= _TOLERANCE:
        return False, f"shared and plain log-probs differ by {difference:.2g}", difference
    return True, f"shared equals plain within {difference:.0e}", difference


def _find_head(clone: PreTrainedModel, stream: Stream, expected: Tensor) -> HeadShape | None:
    head = clone.get_output_embeddings()
    if head is None or clone.base_model is clone or not hasattr(head, "weight"):
        return None
    hidden = clone.base_model(input_ids=stream.input_ids, attention_mask=stream.attention_mask, use_cache=False)[0]
    hidden = hidden.flatten(0, 1)[stream.predictor_T]
    if hidden.shape[-1] != head.weight.shape[-1]:
        return None
    scale = getattr(clone.config, "logit_scale", None) or 1.0
    scale /= getattr(clone.config, "logits_scaling", None) or 1.0
    shape = HeadShape(scale, getattr(clone.config, "final_logit_softcapping", None))
    found, _ = chunked_logprobs(hidden, head.weight, getattr(head, "bias", None), stream.target_T, shape=shape)
    return shape if bool((found - expected).abs().max() <= _TOLERANCE) else None


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"
