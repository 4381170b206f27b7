"""The policy: any Hugging Face causal model, as one module from tokens to log-probs of the output tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from groupwise.cpu.packed import PackedLinear, bytes_of_copies
from groupwise.models.attention import LAYOUT_KEYWORD, AttentionLayout, ForestAttention
from groupwise.models.direct import DirectBody
from groupwise.models.head import HeadShape, chunked_logprobs, dense_logprobs
from groupwise.models.layout import Stream, Tokens, plain_stream, shared_stream
from groupwise.precision import wide

LayoutName = Literal["shared", "plain"]


class LogProbs(NamedTuple):
    """Log-probs of the output tokens `[T]`, and the entropy of their distributions `[T]` where it was asked for."""

    logprobs_T: Tensor
    entropy_T: Tensor | None


class Policy(nn.Module):
    """Body and head of a causal language model behind one forward: `stream -> logprobs_T`.

    `layout` says how prompts and outputs are laid out, `head` what lies between the head's matrix and the logits; None
    means that the head is more than a matrix and the model's own forward is used (whole logits are held then). `cached`
    says that the model's own cache may be used for decoding in the plain layout, `aligned` that prompts must not be
    padded there, `direct` that the shared layout may go past the model's modules. Every dropout is off, and the module
    stays in train mode: in eval mode gradient checkpointing would do nothing. For a model that changes its weights in
    eval mode (`stays_training`) there is no other mode: who samples, saves or copies them would have others.
    """

    def __init__(
        self, model: PreTrainedModel, layout: LayoutName, head: HeadShape | None, cached: bool = False,
        direct: bool = False, aligned: bool = False, *, stays_training: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.layout: LayoutName = layout
        self.head = head
        self.cached, self.aligned = cached, aligned
        self.stays_training = stays_training
        self.packed = PackedLinear()
        self.direct = DirectBody(model) if direct and layout == "shared" and DirectBody.fits(model) else None
        silence_dropout(self.model)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As for any module, but that a model which changes its weights in eval mode is never in it."""
        return super().train(mode or self.stays_training)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def size(self) -> int:
        """How many parameters there are, each tied one once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are computed in."""
        return next(self.model.parameters()).dtype

    def stream(self, groups: Sequence[tuple[Tokens, Sequence[Tokens]]]) -> Stream:
        """Lay out `(prompt, outputs)` pairs for a forward pass; output tokens keep the order of the pairs."""
        lay_out = shared_stream if self.layout == "shared" else plain_stream
        return lay_out(groups, self.device)

    def forward(
        self, stream: Stream, temperature: float = 1.0, entropy: bool = False, grad_logprobs_T: Tensor | None = None
    ) -> LogProbs:
        """Log-probs of `stream.target_T` under `softmax(logits / temperature)`, `[T]` in float32 or wider.

        `grad_logprobs_T`, where given, promises the gradient that will arrive at them: see `chunked_logprobs`.
        """
        if self.head is None:
            logprobs_T, entropy_T = dense_logprobs(self.token_logits(stream), stream.target_T, temperature)
            return LogProbs(logprobs_T, entropy_T if entropy else None)
        weight, bias = self.head_parameters()
        return LogProbs(
            *chunked_logprobs(
                self._predicting(stream).to(weight.dtype), weight, bias, stream.target_T,
                shape=self.head, temperature=temperature, entropy=entropy, grad_logprobs_T=grad_logprobs_T,
            )
        )  # fmt: skip

    def token_logits(self, stream: Stream) -> Tensor:
        """Logits `[T, V]` that predict each output token, in float32 or wider where the head is a matrix: large."""
        if self.head is None:
            return self._body_call(self.model, stream).logits.flatten(0, 1)[stream.predictor_T]  # type: ignore[no-any-return]
        return self.head.apply(wide(nn.functional.linear(self._predicting(stream), *self.head_parameters())))

    def _predicting(self, stream: Stream) -> Tensor:
        """The hidden state that predicts each output token, `[T, D]`."""
        forest = stream.forest
        if forest is None or self.direct is None:
            hidden: Tensor = self._body_call(self.model.base_model, stream)[0]
            return hidden.flatten(0, 1).index_select(0, stream.predictor_T)
        assert stream.place_T is not None
        ids, attention = stream.input_ids[0], ForestAttention(forest)
        return self.hidden(ids, forest.position_N, attention, forest.asked_K).index_select(0, stream.place_T)

    def hidden(
        self, token_N: Tensor, position_N: Tensor, layout: AttentionLayout, asked_K: Tensor | None = None
    ) -> Tensor:
        """Last hidden states `[N, D]` of the shared layout, or `[K, D]` of the tokens `asked_K`, `layout` answering
        every attention call."""
        if self.direct is not None:
            return self.direct(token_N, position_N, layout, asked_K)
        hidden = self._through_modules(token_N[None], position_N[None], layout)[0]
        return hidden if asked_K is None else hidden.index_select(0, asked_K)

    def step(self, token_R: Tensor, position_R: Tensor, layout: AttentionLayout) -> Tensor:
        """Logits `[R, V]` after one token per row, at positions `[R]`, `layout` answering every attention call."""
        if self.direct is not None:
            return self.logits(self.direct(token_R, position_R, layout, product=self.packed))
        return self.logits(self._through_modules(token_R[:, None], position_R[:, None], layout)[:, 0])

    def _through_modules(self, input_ids: Tensor, position_ids: Tensor, layout: AttentionLayout) -> Tensor:
        return self.model.base_model(  # type: ignore[no-any-return]
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None,
            use_cache=False,
            **{LAYOUT_KEYWORD: layout},
        )[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[.., V]` in float32 or wider from hidden states `[.., D]`; needs a head that is a matrix."""
        assert self.head is not None
        weight, bias = self.head_parameters()
        # Some bodies add up in float32 whatever their weights are.
        return self.head.apply(wide(self.packed(hidden.to(weight.dtype), (weight, bias))))

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The head's matrix `[V, D]` and its bias `[V]`, if it has one."""
        head = self.model.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def bytes_of_copies(self, dtype: torch.dtype) -> int:
        """What sampling lays out anew, and gives back at its end; weights computed in `dtype`."""
        if self.layout == "plain":
            return 0
        of_head = [] if self.head is None else [[self.head_parameters()]]
        return bytes_of_copies([*of_head, *(self.direct.products() if self.direct else ())], dtype)

    @staticmethod
    def _body_call(module: nn.Module, stream: Stream) -> Any:
        if stream.forest is None:
            return module(input_ids=stream.input_ids, attention_mask=stream.attention_mask, use_cache=False)
        return module(
            input_ids=stream.input_ids, position_ids=stream.position_ids, attention_mask=None, use_cache=False,
            **{LAYOUT_KEYWORD: ForestAttention(stream.forest)},
        )  # fmt: skip


# Not every jitter: PhiMoE's router computes with it in eval mode too.
_CHANCE = re.compile(r"dropout|layerdrop|pdrop|attn_drop|^jitter_noise$|^moe_jitter_eps$")


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: the modules, and the attributes that functional dropout and routers read.

    Its configuration, which is exported, stays as it was.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _CHANCE.search(name) and isinstance(value, float):
                setattr(module, name, 0.0)
