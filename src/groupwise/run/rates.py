"""How fast this machine is at what a step consists of, measured for about half a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from groupwise.learn.meter import Cost, Meter
from groupwise.models.clone import tiny_clone
from groupwise.models.head import HeadShape
from groupwise.models.policy import Policy

_PATIENCE = 0.1
"""Seconds for each thing that is measured."""
_MOST_ROWS = 1024
_COPIED = 1 << 24
"""Elements of a copy that no cache holds."""


@dataclass(frozen=True)
class Rates:
    """FLOPs per second of products with many and with few rows, bytes per second, and seconds per operation.

    `bytes_moved` counts what is read and what is written: of an activation, and of weights that lie in main memory.
    """

    flops_many: float
    flops_few: float
    bytes_activation: float
    bytes_memory: float
    operation_forward: float
    operation_training: float

    def seconds(self, cost: Cost, *, few: bool = False, training: bool = False, weights: int = 0) -> float:
        """How long a pass takes; `weights` are the bytes that it reads of them, which bound it where rows are few."""
        rate = self.flops_few if few else self.flops_many
        products = max(cost.flops / rate, weights / self.bytes_memory)
        overhead = self.operation_training if training else self.operation_forward
        moved = cost.moved / self.bytes_activation
        return products + cost.attention_flops / self.flops_many + moved + cost.operations * overhead


def measure(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, few: int, many: int) -> Rates:
    """Rates at the widths of a model: products of `few` rows (decoding) and of `many` (training)."""
    text = config.get_text_config()
    width = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * width)
    weight = torch.randn(inner, width, device=device).to(dtype)
    many = min(many, _MOST_ROWS)

    def product(rows: int) -> float:
        x = torch.randn(rows, width, device=device).to(dtype)
        return 2.0 * rows * width * inner / _seconds(lambda: torch.nn.functional.linear(x, weight), device)

    x = torch.randn(many, inner, device=device).to(dtype)
    activation = 5 * x.nbytes / _seconds(lambda: x * x.sigmoid(), device)
    long = torch.zeros(_COPIED, device=device)
    target = torch.empty_like(long)
    memory = 2 * long.nbytes / _seconds(lambda: target.copy_(long), device)
    forward, training = _overheads(config, device)
    return Rates(product(many), product(few), activation, memory, forward, training)


def _overheads(config: PreTrainedConfig, device: torch.device) -> tuple[float, float]:
    """Seconds per operation where there is next to nothing to compute: forward alone, and with backward."""
    policy = Policy(tiny_clone(config), "plain", HeadShape()).to(device)
    stream = policy.stream([((1, 2), [(3, 4)])])

    def forward() -> None:
        with torch.no_grad():
            policy.model.base_model(input_ids=stream.input_ids, use_cache=False)

    def training() -> Tensor:
        return policy.model.base_model(input_ids=stream.input_ids, use_cache=False)[0].sum().backward()  # type: ignore[no-any-return]

    found = []
    for run in (forward, training):
        with Meter() as meter:
            run()
        found.append(_seconds(run, device) / meter.operations)
    return found[0], found[1]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The least of several times: what the machine can do where nothing else is in the way."""
    run()
    best, until = float("inf"), time.perf_counter() + _PATIENCE
    while time.perf_counter() < until:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
