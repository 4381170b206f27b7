"""The decoder of the Llama family without its modules: the same numbers, with far less around the matmuls.

One token per row is so little work that dispatching it, through some forty modules a layer and their arguments,
takes longer than computing it; and of a stream the last layer is needed only where something is predicted. So the
forward of this family is written out here once more, over the modules' own weights. It is used where the probe has
found it equal to the modules, in values and in gradients, on a tiny clone.

Index arrays: `N` tokens, `K` of them that predict something, `D` numbers of a hidden state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from groupwise.cpu.kernels import LANES, Kernels, kernels_for
from groupwise.cpu.packed import Part, plain_linear
from groupwise.models.attention import AttentionLayout
from groupwise.models.tiles import Options
from groupwise.precision import wide

FAMILY = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose decoder is this one: RMS norms before attention and MLP, rotated keys, a gated MLP."""
_PRODUCTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip

_SILU = (nn.SiLU, type(ACT2FN["silu"]))

Product = Callable[..., Tensor]
"""See `plain_linear`."""


class _Pass(NamedTuple):
    """What all layers of a forward pass share: how keys are turned, `[N, 1, d]`, who answers attention, who
    multiplies, and who does the rest where torch does not."""

    cos: Tensor
    signed_sin: Tensor
    layout: AttentionLayout
    product: Product
    kernels: Kernels | None


class DirectBody:
    """The decoder of `model` as a function of tokens and their positions; only attention knows more of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        body: Any = model.base_model
        self.body = body
        self.windows = _windows(model.config, len(body.layers))
        # What kernels ask for besides what `kernels_for` sees.
        widths = [
            width for layer in body.layers for width in (layer.self_attn.head_dim, layer.mlp.up_proj.out_features)
        ]
        self.even = all(width % LANES == 0 for width in widths)

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether `model` is of the family and made of plain linear layers: an adapter around one would be left out."""
        if model.config.model_type not in FAMILY:
            return False
        body: Any = model.base_model
        return all(type(layer.get_submodule(name)) is nn.Linear for layer in body.layers for name in _PRODUCTS)

    def __call__(
        self, token_N: Tensor, position_N: Tensor, layout: AttentionLayout, asked_K: Tensor | None = None,
        product: Product = plain_linear,
    ) -> Tensor:  # fmt: skip
        """Last hidden states `[N, D]`, or `[K, D]` of the tokens `asked_K` alone. `layout` is asked once per layer."""
        x = self.body.embed_tokens(token_N)
        cos, sin = (part[0][:, None] for part in self.body.rotary_emb(x[None], position_N[None]))
        half = cos.shape[-1] // 2
        # (a, b) turns into (a cos - b sin, b cos + a sin): with this sign, halves need only change places.
        signed_sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        kernels = kernels_for(4 * x.numel(), x, cos, self.body.norm.weight) if self.even else None
        shared = _Pass(cos, signed_sin, layout, product, kernels)
        last = len(self.body.layers) - 1
        for index, layer in enumerate(self.body.layers):
            run = partial(self._layer, index, shared, asked_K if index == last else None)
            if torch.is_grad_enabled() and layer.training and layer.gradient_checkpointing:
                x = layer._gradient_checkpointing_func(run, x)
            else:
                x = run(x)
        return _norm(x, self.body.norm, kernels)

    def _layer(self, index: int, shared: _Pass, asked_K: Tensor | None, x: Tensor) -> Tensor:
        layer = self.body.layers[index]
        own, mlp = layer.self_attn, layer.mlp
        query, key, value = self._turned(index, shared, asked_K, _norm(x, layer.input_layernorm, shared.kernels))
        found = shared.layout.attend(index, query, key, value, Options(own.scaling, self.windows[index]))
        # Other tokens have given their keys and values, and nobody will ask what becomes of them.
        x = x if asked_K is None else x.index_select(0, asked_K)
        x = _plus(shared.product(found.flatten(1), _part(own.o_proj)), x)
        h = _norm(x, layer.post_attention_layernorm, shared.kernels)
        parts = [_part(mlp.gate_proj), _part(mlp.up_proj)]
        if shared.product is plain_linear or h.device.type != "cpu":
            gate, up = (shared.product(h, part) for part in parts)
        else:  # of few rows, where one call more is felt
            gate, up = shared.product(h, *parts).chunk(2, -1)
        gated = _gated(mlp.act_fn, gate, up, shared.kernels)
        return _plus(shared.product(gated, _part(mlp.down_proj)), x)

    def _turned(self, index: int, shared: _Pass, asked_K: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[N, H, d]`, of the wanted tokens if only some are, keys and values `[N, H_kv, d]`."""
        own = self.body.layers[index].self_attn
        cos, sin = shared.cos, shared.signed_sin
        parts = [_part(part) for part in (own.q_proj, own.k_proj, own.v_proj)]
        asking, cos_of, sin_of = (x if asked_K is None else x.index_select(0, asked_K) for x in (h, cos, sin))
        if asked_K is None and not torch.is_grad_enabled():
            whole = shared.product(h, *parts).view(len(h), -1, own.head_dim)
            query, key, value = whole.split([len(weight) // own.head_dim for weight, _ in parts], 1)
            if not hasattr(own, "q_norm"):
                both = _turn(whole[:, : -value.shape[1]], cos, sin, shared.kernels)
                return both[:, : query.shape[1]], both[:, query.shape[1] :], value
        else:
            query, key, value = (
                shared.product(x, part).view(len(x), -1, own.head_dim)
                for x, part in zip((asking, h, h), parts, strict=True)
            )
        if hasattr(own, "q_norm"):
            query, key = _norm(query, own.q_norm, shared.kernels), _norm(key, own.k_norm, shared.kernels)
        return _turn(query, cos_of, sin_of, shared.kernels), _turn(key, cos, sin, shared.kernels), value

    def products(self) -> Iterator[Sequence[Part]]:
        """What a decoding step multiplies by."""
        for layer in self.body.layers:
            parts = [_part(layer.get_submodule(name)) for name in _PRODUCTS]
            yield from (parts[:3], parts[3:4], parts[4:6], parts[6:])


def _turn(x: Tensor, cos: Tensor, signed_sin: Tensor, kernels: Kernels | None) -> Tensor:
    """`x` `[N, H, d]` may be overwritten where no gradient is asked for."""
    if kernels is None:
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)
    if torch.is_grad_enabled():
        turned: Tensor = _Turned.apply(x, cos, signed_sin, kernels)  # type: ignore[no-untyped-call]
        return turned
    return kernels.rotary(x, cos, signed_sin, out=x)


class _Turned(torch.autograd.Function):
    """What a pair gives to its other half in turning comes back from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor, kernels: Kernels) -> Tensor:
        ctx.rotary = cos, signed_sin, kernels
        return kernels.rotary(x, cos, signed_sin, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, signed_sin, kernels = ctx.rotary
        grad = grad.contiguous()
        back = signed_sin.roll(signed_sin.shape[-1] // 2, -1)
        return kernels.rotary(grad, cos, back, out=torch.empty_like(grad)), None, None, None


def _part(module: nn.Linear) -> Part:
    return module.weight, module.bias


def _plus(new: Tensor, x: Tensor) -> Tensor:
    return new + x if torch.is_grad_enabled() else new.add_(x)


def _gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, kernels: Kernels | None) -> Tensor:
    if not isinstance(activation, _SILU):
        return activation(gate) * up
    if torch.is_grad_enabled():
        gated: Tensor = _Gated.apply(gate, up, kernels)  # type: ignore[no-untyped-call]
        return gated
    return nn.functional.silu(gate).mul_(up) if kernels is None else kernels.swiglu(gate, up)


class _Gated(torch.autograd.Function):
    """`silu(gate) * up`. Keeps its inputs only: the activation is computed again, which is less than to store it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: Kernels | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return nn.functional.silu(gate).mul_(up) if kernels is None else kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if ctx.kernels is not None:
            return *ctx.kernels.swiglu_back(gate, up, grad.contiguous()), None
        return torch.ops.aten.silu_backward(grad * up, gate), nn.functional.silu(gate).mul_(grad), None


def _norm(x: Tensor, module: Any, kernels: Kernels | None) -> Tensor:
    """`x` over the root of its mean square, in float32 or wider, then rounded and times the module's weight."""
    if torch.is_grad_enabled():
        found: Tensor = _RMSNorm.apply(x, module.weight, module.variance_epsilon, kernels)  # type: ignore[no-untyped-call]
        return found
    if kernels is not None:
        return kernels.norm(x, module.weight, module.variance_epsilon)
    return _normed(x, module.variance_epsilon)[0].mul_(module.weight)


def _normed(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The quotient in the type of `x`, and one over the root, `[.., 1]`."""
    broad = wide(x)
    norm = torch.linalg.vector_norm(broad, dim=-1, keepdim=True)
    factor = torch.addcmul(norm.new_full((), epsilon), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (broad * factor).to(x.dtype), factor


class _RMSNorm(torch.autograd.Function):
    """`[.., D]` in and out, with weights `[D]`. Keeps its input and a number per token; each pass over them counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, kernels: Kernels | None) -> Tensor:
        ctx.kernels = kernels
        if kernels is not None:
            factor = x.new_empty(*x.shape[:-1], 1)
            ctx.save_for_backward(x, weight, factor)
            return kernels.norm(x, weight, epsilon, factor)
        normed, factor = _normed(x, epsilon)
        ctx.save_for_backward(x, weight, factor)
        return normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        if ctx.kernels is not None:
            of_x, of_weight = ctx.kernels.norm_back(x.contiguous(), weight, factor, grad.contiguous())
            return of_x, of_weight if ctx.needs_input_grad[1] else None, None, None
        broad, grad = wide(x), wide(grad)
        of_weight = None
        if ctx.needs_input_grad[1]:
            rows = (grad * broad).flatten(0, -2)
            of_weight = torch.mv(rows.T, factor.flatten()).to(weight.dtype)
        # y = w x f, f = (mean x^2 + eps)^-1/2: dx = f (w g) - x f^3 mean(x w g)
        scaled = grad * weight
        mean = torch.linalg.vecdot(scaled, broad)[..., None].div_(x.shape[-1])
        of_x = scaled.mul_(factor).addcmul_(broad, mean.mul_(factor**3), value=-1)
        return of_x.to(x.dtype), of_weight, None, None


def _windows(config: Any, layers: int) -> list[int | None]:
    """How far each layer looks back; None where it looks at everything."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
