"""What sampling holds and computes in a step, told from the model's configuration: stores, passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from groupwise.engines.native.draw import Filters, draw, uniforms
from groupwise.engines.native.shared_decoder import SharedDecoder
from groupwise.engines.processes import by_process
from groupwise.models.policy import Policy
from groupwise.models.stock_decode import CachedRows, whole_rows
from groupwise.planning.meter import Cost
from groupwise.planning.trace import Shape, TracedModel
from groupwise.types import Sampling

Step = Callable[[], object]


@dataclass(frozen=True)
class SamplingCosts:
    """What sampling takes: all prompts once, and one decoding step of `rows` outputs, halfway and at its longest.

    `copies` are the bytes of the matrices that decoding lays out anew, in each process that samples.
    """

    rows: int
    copies: int
    prefill: Cost
    halfway: Cost
    longest: Cost

    @property
    def stores(self) -> Mapping[str, int]:
        """Bytes of keys and values, which stay between steps."""
        return {
            "keys and values of prompts": round(self.prefill.kept),
            "keys and values of outputs": round(self.longest.kept),
        }

    @property
    def passes(self) -> Mapping[str, int]:
        """Bytes that each pass needs for a while, beside the stores."""
        return {
            "prefill": round(self.prefill.peak - self.prefill.kept),
            "a decoding step": self.copies + round(self.longest.peak - self.longest.kept),
        }


def sampling_costs(
    traced: TracedModel, shape: Shape, max_live: int, cached: bool, parameters: int, *, alone: bool = False
) -> SamplingCosts:
    """What sampling a step takes, at most `max_live` outputs together. Raises ModelError where that cannot be told."""
    rows = min(shape.groups * shape.outputs, max_live)
    prompts = -(-rows // shape.outputs)
    shared = traced.layout == "shared"

    def prefill(policy: Policy) -> Step:
        if not shared:
            return lambda: whole_rows(policy.model, [(0,) * shape.prompt] * prompts)
        decoder = SharedDecoder(policy)
        return lambda: decoder.begin(_prompts(prompts, shape.prompt))

    def decode(reach: int) -> Callable[[Policy], Step]:
        return lambda policy: decoding(policy, shape, rows, reach, cached)

    outputs = shape.groups * shape.outputs
    processes = 1 if alone else len(by_process([1.0] * shape.groups, outputs, parameters, traced.device))
    return SamplingCosts(
        rows, processes * traced.copies, traced.inference(prefill), traced.inference(decode(max(1, shape.length // 2))),
        traced.inference(decode(shape.length)),
    )  # fmt: skip


def decoding(policy: Policy, shape: Shape, rows: int, reach: int, cached: bool) -> Step:
    """A decoding step, and the draw, of the first `rows` outputs of a step, which have `reach` tokens after it.

    It can be called again: the outputs stay as long as they are.
    """
    if policy.layout == "shared":
        return _shared_step(policy, shape, rows, -(-rows // shape.outputs), reach)
    return _plain_step(policy, rows, shape.prompt + reach, cached)


def _prompts(count: int, length: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(str(slot), (0,) * length) for slot in range(count)]


def _shared_step(policy: Policy, shape: Shape, rows: int, prompts: int, reach: int) -> Step:
    """A step of rows that have `reach` tokens after it."""
    decoder = SharedDecoder(policy)
    decoder.graphs = None  # there is nothing to capture where tensors have no data
    decoder.begin(_prompts(prompts, shape.prompt))
    decoder.row_uid = [str(row // shape.outputs) for row in range(rows)]
    decoder.outputs.reserve(rows, shape.length)
    token_R = torch.zeros(rows, dtype=torch.long, device=policy.device)

    def step() -> object:
        decoder.lengths = [reach - 1] * rows
        return _drawn(decoder.step(token_R))

    return step


def _plain_step(policy: Policy, rows: int, length: int, cached: bool) -> Step:
    if not cached:
        return lambda: _drawn(whole_rows(policy.model, [(0,) * length] * rows))
    cache = CachedRows(policy.model)

    def step() -> object:
        cache.begin([(0,) * (length - 1)] * rows)
        return _drawn(cache.step(torch.zeros(rows, dtype=torch.long, device=policy.device)))

    return step


def _drawn(logits_RV: Tensor) -> Tensor:
    count, device = len(logits_RV), logits_RV.device
    index_R = torch.zeros(count, dtype=torch.long, device=device)
    filters = Filters.of([Sampling()] * count, device)
    return draw(logits_RV.float(), uniforms(index_R, index_R), filters)[0]
