"""A tiny policy, groups made by hand, and the same numbers by another way: the stock model, one output at a time."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Starcoder2Config, Starcoder2ForCausalLM

from groupwise.demo.model import small_model
from groupwise.learn.learner import LearnerSettings, PolicyLearner
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.learn.pack import Batch
from groupwise.models.attention import ATTENTION_NAME
from groupwise.models.head import HeadShape
from groupwise.models.policy import LayoutName, Policy
from groupwise.objective import Objective, objective_named, policy_loss
from groupwise.types import Completion, Finish, Group, GroupKey, Prompt, Score, ScoredGroup

VOCABULARY = 13
LENGTH = 9
EVERYTHING = 10**6
"""A budget that holds any batch in one forward pass."""
Gradient = dict[str, Tensor]


def tiny_policy(
    kind: str = "exact", layout: LayoutName = "shared", *, tied: bool = True, direct: bool = False
) -> Policy:
    """A model of two layers with weights large enough to matter.

    `exact` is in float64 and has no RMS norm, which transformers computes in float32 whatever the model's type.
    """
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "tie_word_embeddings": tied}
    make: dict[str, Callable[[], PreTrainedModel]] = {
        "exact": lambda: Starcoder2ForCausalLM(Starcoder2Config(**sizes, **ids, sliding_window=None)).double(),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, **ids)),
        "qwen3": lambda: small_model(VOCABULARY, hidden=32, layers=2, max_length=64),
    }
    model = make[kind]()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.3 * noise) if parameter.ndim > 1 else parameter.add_(0.1 * noise)
    if layout == "shared":
        model.set_attn_implementation(ATTENTION_NAME)
    return Policy(model, layout, HeadShape(), direct=direct)


def completion(tokens: Sequence[int], sampled: Sequence[float] | None = None, finish: Finish = "stop") -> Completion:
    """An output; its sampled log-probs are -1 unless given."""
    return Completion(tuple(tokens), "", tuple([-1.0] * len(tokens) if sampled is None else sampled), finish)


def scored_group(
    prompt: Sequence[int], completions: Sequence[Completion], rewards: Sequence[float | None], slot: int = 0
) -> ScoredGroup:
    """A group and its rewards."""
    group = Group(GroupKey(0, slot, "same"), Prompt("same", "", tuple(prompt)), tuple(completions))
    return ScoredGroup(group, tuple(Score(reward) for reward in rewards))


def some_groups(policy: Policy, temperature: float, seed: int = 0) -> list[ScoredGroup]:
    """Five groups of 1 to 4 outputs of 1 to 9 tokens, two of the same prompt, some outputs cut by the length limit.

    Sampled log-probs are those of the policy, give or take 0.3: something to take for old log-probs.
    """
    draw = random.Random(seed)
    prompts = [[draw.randrange(2, VOCABULARY) for _ in range(length)] for length in (4, 1, 6, 4)]
    groups = []
    for slot, prompt in enumerate([*prompts, prompts[0]]):
        outputs = []
        for _ in range((3, 4, 1, 2, 3)[slot]):
            tokens = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, LENGTH))]
            logprobs = stock_output(policy.model, prompt, tokens, temperature).tolist()
            sampled = [value + draw.gauss(0, 0.3) for value in logprobs]
            outputs.append(completion(tokens, sampled, draw.choice(["stop", "stop", "length"])))
        groups.append(scored_group(prompt, outputs, [draw.random() for _ in outputs], slot))
    return groups


def some_credit(groups: Sequence[ScoredGroup], seed: int = 1) -> list[list[float | list[float]]]:
    """Advantages of all kinds: per output and per token; some 0; all 0 in one group."""
    draw = random.Random(seed)
    credit: list[list[float | list[float]]] = []
    for group in groups:
        row: list[float | list[float]] = []
        for number, output in enumerate(group.group.completions):
            per_token = [draw.gauss(0, 1) for _ in output.token_ids]
            row.append((draw.gauss(0, 1), per_token, 0.0)[number % 3])
        credit.append([0.0] * len(row) if group.group.key.slot == 3 else row)
    return credit


def make_learner(
    policy: Policy, preset: str | Objective = "grpo", rate: float = 1e-3, **settings: Any
) -> PolicyLearner:
    """A learner with the settings that matter to a test."""
    objective = objective_named(preset, max_completion_length=LENGTH)
    optimizer = OptimizerSettings(rate, total_updates=10)
    return PolicyLearner(policy, objective, LearnerSettings(**{"optimizer": optimizer, **settings}))


def with_past(batch: Batch, objective: Objective) -> Batch:
    """The batch with old log-probs off the policy's, and a reference where the loss wants one; both by the token."""
    old = batch.sampled_logprobs_T
    return batch.with_logprobs(old=old, ref=old + 0.2 * torch.sin(100 * old) if objective.kl_in_loss else None)


def gathered(learner: PolicyLearner) -> Gradient:
    """A copy of the gradient as it is now."""
    return {
        name: master.grad.clone()
        for name, master in learner.optimizer.master_weights.items()
        if master.grad is not None
    }


def gradients(learner: PolicyLearner, batch: Batch, passes_done: int = 1) -> list[Gradient]:
    """The gradient of each update of a pass, taken before the optimizer; the weights stay as they are."""
    found = []

    def keep() -> tuple[float, float]:
        found.append(gathered(learner))
        learner.optimizer.zero_grad()
        return 1.0, 0.0

    learner.optimizer.step = keep  # type: ignore[method-assign]
    learner.update(batch, passes_done)
    return found


def stock_model(policy: Policy) -> PreTrainedModel:
    """The same weights under attention that knows nothing of layouts."""
    stock = copy.deepcopy(policy.model)
    stock.set_attn_implementation("sdpa")
    return stock


def stock_output(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> Tensor:
    """Log-probs of one output: a forward of its own, whole logits."""
    name = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    model.set_attn_implementation(name)
    return torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def stock_logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probs of a whole batch's outputs, one after the other."""
    outputs = [stock_output(model, o.prompt, o.token_ids, batch.temperature) for o in batch.outputs]
    return torch.cat(outputs)


def stock_gradient(
    policy: Policy, objective: Objective, batch: Batch, groups: Collection[int] | None = None, corrected: bool = False
) -> tuple[Gradient, float]:
    """Gradient and loss of an update over some groups (all by default), by `policy_loss` and the stock model."""
    stock = stock_model(policy)
    logprobs_T = stock_logprobs(stock, batch)
    group_T = batch.group_S[batch.completion_T].tolist()
    keep_T = torch.tensor([groups is None or group in groups for group in group_T])
    old_T, ref_T = batch.old_logprobs_T, batch.ref_logprobs_T
    loss = policy_loss(
        objective, logprobs_T=logprobs_T[keep_T], group_S=batch.group_S, completion_T=batch.completion_T[keep_T],
        old_logprobs_T=(logprobs_T.detach() if old_T is None else old_T)[keep_T], trained_T=batch.trained_T[keep_T],
        advantages_T=batch.advantages_T[keep_T], ref_logprobs_T=None if ref_T is None else ref_T[keep_T],
        sampled_logprobs_T=batch.sampled_logprobs_T[keep_T] if corrected else None,
    )  # fmt: skip
    loss.backward()
    return {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}, loss.item()


def distance(left: Gradient, right: Gradient) -> float:
    """The largest difference of two gradients; infinite where they are not of the same parameters."""
    if left.keys() != right.keys():
        return float("inf")
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def size(gradient: Gradient) -> float:
    """The largest entry."""
    return max(value.abs().max().item() for value in gradient.values())
