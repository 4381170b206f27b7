"""Tiny random models of many architectures, policies made of them, and what stock transformers says."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from groupwise.models.attention import ATTENTION_NAME
from groupwise.models.clone import tiny_clone
from groupwise.models.head import HeadShape
from groupwise.models.layout import Tokens
from groupwise.models.policy import LayoutName, Policy, silence_dropout

SINCE_5_23 = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="older versions of transformers lack the class, or its stock model sees padding there",
)
VOCABULARY = 32
Groups = Sequence[tuple[Tokens, Sequence[Tokens]]]
GROUPS: Groups = [
    ((3, 9, 4, 7, 11, 2, 8), [(5, 8, 2, 6, 1, 12, 30, 2, 2), (6,), (3, 3)]),
    ((10,), [(7,), (4, 9, 9, 0)]),
    ((2, 2, 31, 5), [(1, 2, 3)]),
]
"""Ragged prompts and outputs, among them a prompt and outputs of one token, and a group of one."""
KEYS = {"llama": 2, "qwen2": 2, "qwen3": 1}
"""The architectures that are tested in depth, with their number of key/value heads (of 4)."""


def exact_model(kind: str, *, tied: bool = False) -> PreTrainedModel:
    """A model in float64 throughout, so that equalities can be asked for to ten digits.

    The library's norms round to float32 whatever the model's type; here they are replaced by torch's.
    """
    config = CONFIG_MAPPING[kind](
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=KEYS[kind], head_dim=8, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    model = randomized(AutoModelForCausalLM.from_config(config).double())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "variance_epsilon"):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                norm.variance_epsilon = child.variance_epsilon
                setattr(module, name, norm)
    return model


def clone_of(kind: str, **changes: object) -> PreTrainedModel:
    """The tiny clone that a probe would make of an architecture's default configuration."""
    model = tiny_clone(CONFIG_MAPPING[kind](**changes))
    silence_dropout(model)
    return model


def randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights that are large enough for a wrong mask to show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.2 * noise) if parameter.ndim > 1 else parameter.add_(0.1 * noise)
    return model


def policy_of(
    model: PreTrainedModel,
    layout: LayoutName,
    head: HeadShape | None = HeadShape(),  # noqa: B008
    cached: bool = True,
    direct: bool = False,
    aligned: bool = False,
) -> Policy:
    """A policy with weights of its own, equal to the model's."""
    own = copy.deepcopy(model)
    if layout == "shared":
        own.set_attn_implementation(ATTENTION_NAME)
    return Policy(own, layout, head, cached, direct, aligned)


def stock_logprobs(model: PreTrainedModel, groups: Groups, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the output tokens by the stock model: one output at a time, nothing padded."""
    logprobs, entropies = [], []
    for prompt, outputs in groups:
        for output in outputs:
            logits = model(input_ids=torch.tensor([[*prompt, *output]]), use_cache=False).logits[0]
            log_softmax = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)
            logprobs.append(log_softmax.gather(-1, torch.tensor(output)[:, None])[:, 0])
            entropies.append(-(log_softmax.exp() * log_softmax).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(model: nn.Module, logprobs_T: Tensor, *, partial: bool = False) -> dict[str, Tensor]:
    """The gradient of an uneven sum of log-probs with respect to every parameter; `partial`: 0 where there is none."""
    model.zero_grad()
    (logprobs_T * torch.linspace(-1, 2, len(logprobs_T), dtype=logprobs_T.dtype)).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert partial or missing == []
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Between two sets of gradients, relative to the largest entry of each tensor."""
    assert left.keys() == right.keys()
    return max(((left[n] - right[n]).abs().max() / right[n].abs().max().clamp_min(1e-3)).item() for n in left)
