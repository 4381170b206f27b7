"""Which layout and head a model's class can take, found by trying: a tiny clone of it, random weights, on the CPU.

The shared layout is taken only where attention reaches our function once per layer, the layers are full or sliding
attention, and the log-probs equal those of the stock model. Several architectures fail silently; none is trusted."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from groupwise.models.attention import ATTENTION_NAME, LAYOUT_KEYWORD, ForestAttention
from groupwise.models.clone import WINDOW, tiny_clone
from groupwise.models.direct import DirectBody
from groupwise.models.head import HeadShape, chunked_logprobs, dense_logprobs
from groupwise.models.layout import Stream, plain_stream, shared_stream
from groupwise.models.policy import silence_dropout
from groupwise.models.stock_decode import CachedRows, whole_rows

_TOLERANCE = 2e-4
_ROUNDING = 2e-2
"""The same for a model of real size: its logits are tens, over tens of layers, and a fault moves them by a tenth."""
_ROWS = 16
"""Random rows, over which keys of a sparse attention are ranked."""
# Two groups of unlike lengths, longer than a clone's windows, so that windows matter.
_GROUPS = [((3, 9, 4, 7, 11, 2, 5, 8), ((5, 8, 2, 6, 1, 12), (6, 3))), ((10, 2, 6), ((7,), (4, 9, 9, 3)))]
assert len(_GROUPS[0][0]) > WINDOW


@dataclass(frozen=True)
class Findings:
    """What the probe found: whether the shared layout is right, why not, and the head's shape (None: not a matrix).

    `cached` tells whether the model's own cache decodes rightly in the plain layout, and `aligned` that it does so only
    for rows that begin at position 0, unpadded; `direct` whether a forward past the model's modules computes what they
    do in the shared one; `stays_training` that the model changes its weights in eval mode. `proven` is False where no
    clone could be made, so that nothing of this is known: see `unfit_itself`. `unfit` says why no policy can be made of
    the class at all; empty where one can.
    """

    shared: bool
    reason: str
    head: HeadShape | None
    error: float = float("nan")
    cached: bool = False
    unfit: str = ""
    direct: bool = False
    aligned: bool = False
    stays_training: bool = False
    proven: bool = True


def probe(config: PreTrainedConfig, trust_remote_code: bool = False) -> Findings:
    """Try the shared layout and the chunked head on a tiny clone of `config`'s class, in a policy's train mode."""
    with torch.random.fork_rng(devices=[]):  # some classes draw while they compute
        torch.manual_seed(0)
        return _probe(config, trust_remote_code)


def _probe(config: PreTrainedConfig, trust_remote_code: bool) -> Findings:
    stream = plain_stream(_GROUPS)
    try:
        clone = tiny_clone(config, trust_remote_code)
        before, modules = copy.deepcopy(clone.state_dict()), list(clone.modules())
        with torch.no_grad():
            logits = _stock_logits(clone.eval(), stream)
    except Exception as error:  # noqa: BLE001 - a boundary: what cannot even be shrunk is served by its own forward
        return Findings(
            False, f"no tiny clone of {config.model_type} could be made ({_first_line(error)})", None, proven=False
        )
    changed = _changed(clone, before)
    silence_dropout(clone)
    clone.train()
    with torch.no_grad():
        if changed:  # it is never in eval mode then
            logits = _stock_logits(clone, stream)
        try:
            unfit = _exchanged(clone, modules) or _tied(clone) or _unfit(clone, stream, logits)
        except ValueError as error:
            # Reformer takes rows in training whose length is a multiple of its chunks.
            unfit = f"in train mode it takes no row of just any length ({_first_line(error)})"
            return Findings(False, unfit, None, unfit=unfit)
        if not unfit and _changed(clone, before):
            unfit = "it changes its weights while it computes"
        expected, _ = dense_logprobs(logits.flatten(0, 1)[stream.predictor_T], stream.target_T, 1.0)
        head = _find_head(clone, stream, expected)
        padded = not changed and _try_cache(clone, aligned=False)
        cached = padded or (not changed and _try_cache(clone, aligned=True))
        shared, reason, difference = _try_shared(clone, expected)
    if shared and head is None:
        shared, reason = False, "its head is more than a matrix"
    direct = shared and DirectBody.fits(clone) and _try_direct(clone)
    if head is not None:
        head = _head_shape(config)  # a factor may be computed of a width, and the clone's widths are its own
    aligned = cached and not padded
    return Findings(shared, reason, head, difference, cached, unfit, direct, aligned, stays_training=changed)


@torch.no_grad()
def unfit_itself(model: PreTrainedModel) -> str:
    """Why no policy can be made of a model that no clone speaks for, found on a few short rows of its own; empty where
    one can. The model has its dropout off; it is left in train mode.

    What a token predicts must depend on it and its past alone: that is all that rows of stock attention need.
    """
    stream = plain_stream(_GROUPS, model.device)
    versions = [parameter._version for parameter in model.parameters()]
    try:
        logits = _stock_logits(model.eval(), stream)
        found = "" if versions == [p._version for p in model.parameters()] else "it changes its weights in eval mode"
        model.train()
        return found or _unfit(model, stream, logits, every=4, tolerance=_ROUNDING)
    except Exception as error:  # noqa: BLE001 - a boundary: whatever it raises, these rows are what training computes
        return f"it does not compute rows of tokens ({_first_line(error)})"
    finally:
        model.train()


def _changed(clone: PreTrainedModel, before: Mapping[str, Tensor]) -> bool:
    return any(not torch.equal(tensor, before[name]) for name, tensor in clone.state_dict().items())


def _exchanged(clone: PreTrainedModel, modules: Sequence[nn.Module]) -> str:
    """Whether a forward pass put other modules in place of a model's own, as BigBird's does at its first short row: it
    computes equal rows in two ways then, and the new ones have their dropout. Empty where it did not."""
    if len(now := list(clone.modules())) == len(modules) and all(a is b for a, b in zip(now, modules, strict=True)):
        return ""
    gone = next((module for module in modules if all(module is not other for other in now)), clone)
    found = f"it exchanges its {type(gone).__name__} for another module at rows of some lengths"
    if kind := getattr(clone.config, "attention_type", None):
        found += f" (attention_type is {kind!r} in its config.json; 'original_full' has no such module)"
    return found


def _tied(clone: PreTrainedModel) -> str:
    """Whether a sparse attention often ranks keys alike, so that which of them are seen is up to the row's length;
    empty where not. Of `_ROWS` rows, rounding alone may part one."""
    config = clone.config.get_text_config()
    if not getattr(config, "index_topk", None):
        return ""
    ids = torch.randint(config.vocab_size, (_ROWS, 8 * WINDOW), device=clone.device)
    whole = clone(input_ids=ids, use_cache=False).logits[:, : 4 * WINDOW]
    half = clone(input_ids=ids[:, : 4 * WINDOW], use_cache=False).logits
    if ((whole - half).abs().amax((1, 2)) > _TOLERANCE).sum() < 2:
        return ""
    heads = getattr(config, "index_n_heads", None) or "its"
    return (
        f"its sparse attention ranks keys by the sum of {heads} index heads, which is often alike for several, and "
        "which of those a token attends to depends on tokens after it"
    )


def _stock_logits(clone: PreTrainedModel, stream: Stream) -> Tensor:
    return clone(input_ids=stream.input_ids, attention_mask=stream.attention_mask, use_cache=False).logits  # type: ignore[no-any-return]


def _unfit(
    clone: PreTrainedModel, stream: Stream, logits: Tensor, *, every: int = 1, tolerance: float = _TOLERANCE
) -> str:
    """Why a token's logits are not a function of it and its past alone; empty where they are. The first row is cut at
    every `every`-th token, from its end."""
    for module in clone.modules():
        for name, value in vars(module).items():
            if "jitter" in name and isinstance(value, float) and value:
                return f"{name} in its {type(module).__name__} is chance that cannot be turned off"
    if not torch.allclose(_stock_logits(clone, stream), logits, atol=tolerance):
        return "in train mode it computes something else than in eval mode, with every dropout off"
    assert stream.attention_mask is not None
    for row, (ids, length) in enumerate(zip(stream.input_ids, stream.attention_mask.sum(-1).tolist(), strict=True)):
        for cut in range(length, 0, -every) if row == 0 else [length]:
            alone = clone(input_ids=ids[None, :cut], use_cache=False).logits[0]
            if not torch.allclose(alone, logits[row, :cut], atol=tolerance):
                other = "tokens after it" if cut < length else "the padding beside it"
                return f"what a token predicts depends on {other}, so this is no causal language model"
    return ""


def _try_cache(clone: PreTrainedModel, *, aligned: bool) -> bool:
    """Decode some rows by the cache, as an engine does: ragged prompts, a row twice, rows dropped, beyond a window."""
    prompts = [list(prompt) for prompt, _ in _GROUPS]
    order = [0, 1, 0]
    rows = [list(prompts[i]) for i in order]
    clone.eval()
    try:
        cache = CachedRows(clone, aligned)
        found, expected = [cache.begin(prompts)], [whole_rows(clone, prompts)]
        cache.select(torch.tensor(order))
        for token in range(2, 2 + WINDOW):
            if token == 4:
                cache.select(torch.tensor([2, 1]))
                rows = [rows[2], rows[1]]
            for i, row in enumerate(rows):
                row.append(token + 7 * i)
            found.append(cache.step(torch.tensor([row[-1] for row in rows])))
            expected.append(whole_rows(clone, rows))
        return torch.allclose(torch.cat(found), torch.cat(expected), atol=_TOLERANCE)
    except Exception:  # noqa: BLE001 - a boundary: caches fail in as many ways as there are models
        return False
    finally:
        clone.train()


def _try_shared(clone: PreTrainedModel, expected: Tensor) -> tuple[bool, str, float]:
    config = clone.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return False, f"it has layers of type {', '.join(sorted(kinds))}", float("nan")
    stream = shared_stream(_GROUPS)
    assert stream.forest is not None
    attention = ForestAttention(stream.forest)
    try:
        clone.set_attn_implementation(ATTENTION_NAME)
        out = clone(
            input_ids=stream.input_ids, position_ids=stream.position_ids, attention_mask=None, use_cache=False,
            **{LAYOUT_KEYWORD: attention},
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - a boundary: models refuse a foreign attention in as many ways as they are
        return False, f"it does not take another attention function ({_first_line(error)})", float("nan")
    layers = config.num_hidden_layers
    if sorted(attention.calls) != list(range(layers)):
        return False, f"{len(attention.calls)} of {layers} layers call the attention function", float("nan")
    found, _ = dense_logprobs(out.logits[0][stream.predictor_T], stream.target_T, 1.0)
    difference = (found - expected).abs().max().item()
    if not difference <= _TOLERANCE:
        return False, f"shared and plain log-probs differ by {difference:.2g}", difference
    return True, f"shared equals plain within {difference:.0e}", difference


@torch.enable_grad()
def _try_direct(clone: PreTrainedModel) -> bool:
    """Hidden states of a forest where something is predicted, with gradient and without, and what gets a gradient."""
    stream = shared_stream(_GROUPS)
    forest = stream.forest
    assert forest is not None
    body, asked_K = DirectBody(clone), forest.asked_K

    def direct() -> Tensor:
        return body(stream.input_ids[0], forest.position_N, ForestAttention(forest), asked_K)

    expected = clone.base_model(
        input_ids=stream.input_ids, position_ids=stream.position_ids, attention_mask=None, use_cache=False,
        **{LAYOUT_KEYWORD: ForestAttention(forest)},
    )[0][0][asked_K]  # fmt: skip
    found = direct()
    with torch.no_grad():
        quick = direct()
    parameters = [p for p in clone.base_model.parameters() if p.requires_grad]
    slope = torch.linspace(-1, 1, found.numel()).view_as(found)
    ours, theirs = (
        torch.autograd.grad((hidden * slope).sum(), parameters, materialize_grads=True) for hidden in (found, expected)
    )
    pairs = [(found, expected), (quick, expected), *zip(ours, theirs, strict=True)]
    return all(torch.allclose(a, b, atol=_TOLERANCE, rtol=_TOLERANCE) for a, b in pairs)


def _find_head(clone: PreTrainedModel, stream: Stream, expected: Tensor) -> HeadShape | None:
    head = clone.get_output_embeddings()
    if head is None or clone.base_model is clone or not hasattr(head, "weight"):
        return None
    hidden = clone.base_model(input_ids=stream.input_ids, attention_mask=stream.attention_mask, use_cache=False)[0]
    hidden = hidden.flatten(0, 1)[stream.predictor_T]
    if hidden.shape[-1] != head.weight.shape[-1]:
        return None
    shape = _head_shape(clone.config)
    found, _ = chunked_logprobs(hidden, head.weight, getattr(head, "bias", None), stream.target_T, shape=shape)
    return shape if bool((found - expected).abs().max() <= _TOLERANCE) else None


def _head_shape(config: PreTrainedConfig) -> HeadShape:
    """What a configuration says that lies between the head's matrix and the logits."""
    text = config.get_text_config()
    scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
    return HeadShape(scale, getattr(text, "final_logit_softcapping", None))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"
