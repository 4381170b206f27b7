"""A decoding step of the Llama family without its modules: the same numbers, with far less between the products.

One token per row is so little work that handing it out, through some forty modules a layer and their arguments, takes
longer than computing it. So the forward of this family is written out here once more, for decoding only, over the
modules' own weights. It is used where the probe has found it equal to the modules on a tiny clone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from groupwise.models.attention import AttentionLayout
from groupwise.models.packed import PackedProducts
from groupwise.models.precision import wide
from groupwise.models.tiles import Options

FAMILY = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose decoder is this one: RMS norms before attention and MLP, rotated keys, a gated MLP."""
_PRODUCTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


class DirectStep:
    """The decoder of `model` as a function of one token per row."""

    def __init__(self, model: PreTrainedModel, products: PackedProducts) -> None:
        body: Any = model.base_model
        self.body, self.products = body, products
        self.windows = _windows(model.config, len(body.layers))

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether `model` is of the family and made of plain linear layers: an adapter around one would be left out."""
        if model.config.model_type not in FAMILY:
            return False
        body: Any = model.base_model
        return all(type(layer.get_submodule(name)) is nn.Linear for layer in body.layers for name in _PRODUCTS)

    def __call__(self, token_R: Tensor, position_R: Tensor, layout: AttentionLayout) -> Tensor:
        """Last hidden states `[R, D]` of tokens at positions `[R]`. `layout` is asked once per layer, with queries
        `[R, H, 1, d]` and keys and values `[R, H_kv, 1, d]`, and answers `[R, 1, H, d]`."""
        x = self.body.embed_tokens(token_R)
        cos, sin = self.body.rotary_emb(x, position_R[:, None])
        half = cos.shape[-1] // 2
        # (a, b) turns into (a cos - b sin, b cos + a sin): with this sign, halves need only change places.
        signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for index, layer in enumerate(self.body.layers):
            found = self._attend(index, _norm(x, layer.input_layernorm), (cos, signed), layout)
            x = found.add_(x)
            h, mlp = _norm(x, layer.post_attention_layernorm), layer.mlp
            gated = mlp.act_fn(self._linear(h, mlp.gate_proj)).mul_(self._linear(h, mlp.up_proj))
            x = self._linear(gated, mlp.down_proj).add_(x)
        return _norm(x, self.body.norm)

    def _attend(self, index: int, h: Tensor, rotation: tuple[Tensor, Tensor], layout: AttentionLayout) -> Tensor:
        own = self.body.layers[index].self_attn
        rows, width = len(h), own.head_dim
        query, key, value = (
            self._linear(h, part).view(rows, -1, width) for part in (own.q_proj, own.k_proj, own.v_proj)
        )  # fmt: skip
        if hasattr(own, "q_norm"):
            query, key = _norm(query, own.q_norm), _norm(key, own.k_norm)
        heads = query.shape[1]
        both = torch.cat([query, key], 1)
        cos, signed = rotation
        both = torch.addcmul(both * cos, both.roll(width // 2, -1), signed)
        options = Options(own.scaling, self.windows[index])
        found = layout.attend(index, both[:, :heads, None], both[:, heads:, None], value[:, :, None], options)
        return self._linear(found.reshape(rows, -1), own.o_proj)

    def _linear(self, x: Tensor, module: nn.Linear) -> Tensor:
        return self.products(x, module.weight, module.bias)

    def weights(self) -> Iterator[Tensor]:
        """The matrices of its products."""
        for layer in self.body.layers:
            yield from (layer.get_submodule(name).weight for name in _PRODUCTS)


def _norm(x: Tensor, module: Any) -> Tensor:
    """`x` over the root of its mean square, in float32 or wider, then rounded and times the module's weight."""
    broad = wide(x)
    square = torch.linalg.vecdot(broad, broad)[..., None].div_(x.shape[-1])
    normed: Tensor = (broad * square.add_(module.variance_epsilon).rsqrt_()).to(x.dtype)
    return normed.mul_(module.weight)


def _windows(config: Any, layers: int) -> list[int | None]:
    """How far each layer looks back; None where it looks at everything."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
