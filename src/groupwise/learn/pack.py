"""From scored groups to tensors: one flat array per quantity over all output tokens of a step, and the plan that says
which outputs share an optimizer update and which a forward pass. Tensors begin here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groupwise.types import Scored

Advantage = float | Sequence[float]
"""An output's advantage: one number for all its tokens, or one per token."""
Credit = Sequence[Sequence[Advantage]]
"""Per group, per output."""


@dataclass(frozen=True)
class Output:
    """One output as the learner sees it. `start` is the place of its first token in the batch's flat arrays."""

    group: int
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Batch:
    """A step's outputs (`S`) and everything that is known of their tokens (`T`), in group order, on the device.

    `completion_T` is each token's output, `group_S` each output's group. `trained_T` is False on tokens that stay out
    of the loss. `old_logprobs_T` is None when the only update starts from the policy that sampled; `ref_logprobs_T` is
    None exactly when the loss has no KL term. `silent_S` marks outputs whose every advantage is 0.
    """

    outputs: tuple[Output, ...]
    temperature: float
    completion_T: Tensor
    group_S: Tensor
    trained_T: Tensor
    advantages_T: Tensor
    sampled_logprobs_T: Tensor
    silent_S: tuple[bool, ...]
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None

    def with_logprobs(self, *, old: Tensor | None = None, ref: Tensor | None = None) -> Batch:
        """The batch with old and reference log-probs `[T]` filled in where they are given."""
        return replace(self, old_logprobs_T=old, ref_logprobs_T=ref)


def pack(
    scored: Scored, credit: Credit, *, temperature: float, mask_truncated: bool, device: torch.device
) -> Batch:
    """Lay all outputs of a step end to end. `mask_truncated` leaves outputs that met the length limit untrained."""
    outputs: list[Output] = []
    trained: list[bool] = []
    advantages: list[float] = []
    sampled: list[float] = []
    silent: list[bool] = []
    start = 0
    for g, (group, group_credit) in enumerate(zip(scored, credit, strict=True)):
        for completion, advantage in zip(group.group.completions, group_credit, strict=True):
            count = len(completion.token_ids)
            per_token = [advantage] * count if isinstance(advantage, float) else list(advantage)
            assert len(per_token) == count == len(completion.sampled_logprobs)
            outputs.append(Output(g, group.group.prompt.token_ids, completion.token_ids, start))
            trained += [not (mask_truncated and completion.finish == "length")] * count
            advantages += per_token
            sampled += completion.sampled_logprobs
            silent.append(not any(per_token))
            start += count
    lengths = torch.tensor([len(output.token_ids) for output in outputs])
    return Batch(
        outputs=tuple(outputs),
        temperature=temperature,
        completion_T=torch.repeat_interleave(torch.arange(len(outputs)), lengths).to(device),
        group_S=torch.tensor([output.group for output in outputs], device=device),
        trained_T=torch.tensor(trained, device=device),
        advantages_T=torch.tensor(advantages, device=device),
        sampled_logprobs_T=torch.tensor(sampled, device=device),
        silent_S=tuple(silent),
    )


def split_updates(groups: Sequence[int], updates: int, seed: int) -> list[list[int]]:
    """Deal whole groups into `updates` optimizer updates of nearly equal size, in a seeded order."""
    if updates == 1:
        return [list(groups)]
    order = list(groups)
    random.Random(seed).shuffle(order)
    return [order[i::updates] for i in range(updates)]


def micro_batches(outputs: Sequence[Output], members: Sequence[int], budget: int, shared: bool) -> list[list[int]]:
    """Cut outputs (`members` indexes them) into forward passes of at most `budget` tokens, a longer one alone.

    A group stays together where it fits and is split where it does not; its prompt is then computed once per part.
    The longest groups come first, so that a lack of memory shows in the first pass.
    """
    by_group: dict[int, list[int]] = {}
    for member in members:
        by_group.setdefault(outputs[member].group, []).append(member)
    for group in by_group.values():
        group.sort(key=lambda m: -len(outputs[m].token_ids))
    ordered = sorted(by_group.values(), key=lambda group: -_cost(outputs, group, shared))
    parts: list[list[int]] = []
    current: list[int] = []
    for group in ordered:
        if current and _cost(outputs, [*current, *group], shared) > budget:
            parts.append(current)
            current = []
        for member in group:
            if current and _cost(outputs, [*current, member], shared) > budget:
                parts.append(current)
                current = []
            current.append(member)
    return [*parts, current] if current else parts


def _cost(outputs: Sequence[Output], members: Sequence[int], shared: bool) -> int:
    """Tokens of a forward pass, padding included."""
    if not shared:
        return len(members) * max(len(outputs[m].prompt) + len(outputs[m].token_ids) for m in members)
    prompts = {outputs[m].group: len(outputs[m].prompt) for m in members}
    return sum(prompts.values()) + sum(len(outputs[m].token_ids) for m in members)
