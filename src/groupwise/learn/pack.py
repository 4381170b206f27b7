"""From scored groups to tensors: one flat array per quantity over all output tokens of a step, and the plan that says
which outputs share an optimizer update and which a forward pass. Tensors begin here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

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
    of the loss, `trained_S` on outputs without any token in it; `zero_advantage_S` marks outputs whose every
    advantage is 0.
    `old_logprobs_T` is None when the only update starts from the policy that sampled; `ref_logprobs_T` is None exactly
    when the loss has no KL term.
    """

    outputs: tuple[Output, ...]
    temperature: float
    completion_T: Tensor
    group_S: Tensor
    trained_T: Tensor
    advantages_T: Tensor
    sampled_logprobs_T: Tensor
    trained_S: tuple[bool, ...]
    zero_advantage_S: tuple[bool, ...]
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None

    def with_logprobs(self, *, old: Tensor | None = None, ref: Tensor | None = None) -> Batch:
        """The batch with old and reference log-probs `[T]` filled in where they are given."""
        return replace(self, old_logprobs_T=old, ref_logprobs_T=ref)


def pack(
    scored: Scored, credit: Credit, *, temperature: float, mask_truncated: bool,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> Batch:  # fmt: skip
    """Lay all outputs of a step end to end. `mask_truncated` leaves outputs that met the length limit untrained.

    Advantages and log-probs are held in `dtype`: that of the policy's log-probs.
    """
    outputs: list[Output] = []
    trained: list[bool] = []
    advantages: list[float] = []
    sampled: list[float] = []
    silent: list[bool] = []
    start = 0
    for g, (group, group_credit) in enumerate(zip(scored, credit, strict=True)):
        for completion, advantage in zip(group.group.completions, group_credit, strict=True):
            count = len(completion.token_ids)
            per_token = list(advantage) if isinstance(advantage, Sequence) else [advantage] * count
            assert len(per_token) == count == len(completion.sampled_logprobs)
            outputs.append(Output(g, group.group.prompt.token_ids, completion.token_ids, start))
            trained.append(count > 0 and not (mask_truncated and completion.finish == "length"))
            advantages += per_token
            sampled += completion.sampled_logprobs
            silent.append(not any(per_token))
            start += count
    lengths = torch.tensor([len(output.token_ids) for output in outputs], dtype=torch.long)
    completion_T = torch.repeat_interleave(torch.arange(len(outputs)), lengths)
    return Batch(
        outputs=tuple(outputs),
        temperature=temperature,
        completion_T=completion_T.to(device),
        group_S=torch.tensor([output.group for output in outputs], dtype=torch.long, device=device),
        trained_T=torch.tensor(trained, dtype=torch.bool)[completion_T].to(device),
        advantages_T=torch.tensor(advantages, dtype=dtype, device=device),
        sampled_logprobs_T=torch.tensor(sampled, dtype=dtype, device=device),
        trained_S=tuple(trained),
        zero_advantage_S=tuple(silent),
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
    The longest groups come first, so that a lack of memory shows in the first pass. Outputs without tokens need none.
    """
    by_group: dict[int, list[int]] = {}
    for member in members:
        if outputs[member].token_ids:
            by_group.setdefault(outputs[member].group, []).append(member)
    for group in by_group.values():
        group.sort(key=lambda m: -len(outputs[m].token_ids))

    def grown(size: _Size, added: Sequence[int]) -> _Size:
        return reduce(lambda total, m: total.plus(outputs[m]), added, size)

    parts: list[list[int]] = [[]]
    size = _Size()
    for group in sorted(by_group.values(), key=lambda group: -grown(_Size(), group).tokens(shared)):
        for i, member in enumerate(group):
            wanted = group if i == 0 else [member]
            if parts[-1] and grown(size, wanted).tokens(shared) > budget:
                parts.append([])
                size = _Size()
            parts[-1].append(member)
            size = size.plus(outputs[member])
    return [part for part in parts if part]


class _Size(NamedTuple):
    """How large a forward pass is, as outputs are added to it, one group after the other."""

    rows: int = 0
    longest: int = 0
    stream: int = 0
    group: int = -1

    def plus(self, output: Output) -> _Size:
        """With one more output."""
        prompt, length = len(output.prompt), len(output.token_ids)
        stream = self.stream + length + (0 if output.group == self.group else prompt)
        return _Size(self.rows + 1, max(self.longest, prompt + length), stream, output.group)

    def tokens(self, shared: bool) -> int:
        """What the linear layers see: each prompt once, or a padded row per output."""
        return self.stream if shared else self.rows * self.longest
