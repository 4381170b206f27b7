"""Policies and a codec to sample with: 30 letters, `<pad>` (0) and `<end>` (1), as many tokens as a clone has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from groupwise.demo.model import character_tokenizer
from groupwise.engines import mailbox
from groupwise.engines.base import Engine
from groupwise.engines.mailbox import Answers, Mailbox
from groupwise.engines.native.engine import NativeEngine
from groupwise.models.head import HeadShape
from groupwise.models.policy import LayoutName, Policy
from groupwise.tokenizer.codec import Codec
from groupwise.types import Completion, Request, Sampling
from tests.tiny_models import clone_of, policy_of

ALPHABET = "abcdefghijklmnopqrstuvwxyz .!?"
CODEC = Codec(character_tokenizer(ALPHABET))
LAYOUTS: list[LayoutName] = ["shared", "plain"]
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
PROMPTS = ((3, 9, 4, 7, 11, 2, 8), (10,), (2, 2, 31, 5), (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
UNCACHED, ALIGNED = {"minimax"}, {"llama4_text", "minimax_m3_vl_text"}
HEADS = {"gemma2": HeadShape(softcap=30.0), "cohere": HeadShape(scale=0.0625), "llama4_text": None}
CHANGES = {"minimax_m3_vl_text": {"layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 59}}


def make_policy(
    kind: str = "llama", layout: LayoutName = "shared", dtype: torch.dtype = torch.float32, *, direct: bool = True
) -> Policy:
    """A policy with random weights, the same each time. It decodes past the modules of the family that allows it."""
    head = HEADS.get(kind, HeadShape())
    model = clone_of(kind, **CHANGES.get(kind, {}))
    return policy_of(model, layout, head, kind not in UNCACHED, direct, aligned=kind in ALIGNED).to(dtype)


def requests(n: int = 3, prompts: Sequence[tuple[int, ...]] = PROMPTS, **sampling: Any) -> list[Request]:
    """One request per prompt, their seeds far apart."""
    settings = Sampling(**{"max_tokens": 12, **sampling})
    return [Request(f"r{i}", prompt, n, settings, 1000 * i) for i, prompt in enumerate(prompts)]


def sample(
    policy: Policy, asked: Sequence[Request], codec: Codec = CODEC, **options: Any
) -> list[tuple[Completion, ...]]:
    """The completions of each request, by a fresh engine."""
    return generate(NativeEngine(policy, codec, **options), asked)


def generate(engine: Engine, asked: Sequence[Request]) -> Answers:
    """The completions of each request, by an engine that nobody else asks."""
    return mailbox.generate(Mailbox(engine), asked)


def tokens(groups: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    """Only the token ids."""
    return [[completion.token_ids for completion in group] for group in groups]


def without_end() -> Codec:
    """A codec without end tokens: every output takes its full length."""
    codec = Codec(character_tokenizer(ALPHABET))
    codec.end_token_ids = frozenset()
    return codec


def difference(policy: Policy, asked: Sequence[Request], found: Sequence[Sequence[Completion]]) -> float:
    """Largest difference between the log-probs that the sampler recorded and those of the policy's forward."""
    groups = [(r.token_ids, [c.token_ids for c in group]) for r, group in zip(asked, found, strict=True)]
    recorded = torch.tensor([p for group in found for c in group for p in c.sampled_logprobs])
    temperature = asked[0].sampling.temperature
    computed = policy(policy.stream(groups), temperature or 1.0).logprobs_T
    return (computed.cpu() - recorded).abs().max().item()


def counted_tokens(policy: Policy) -> list[int]:
    """A list that grows by the number of tokens of each pass, whichever way they go through the model."""
    counted: list[int] = []
    embedding = policy.model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: counted.append(args[0].numel()))
    return counted
