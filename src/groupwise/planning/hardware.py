"""How fast this machine is at what a step consists of, measured for about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from groupwise.cpu.malloc import keep_freed_memory
from groupwise.cpu.packed import PackedLinear, plain_linear
from groupwise.models.attention import ATTENTION_NAME
from groupwise.models.clone import tiny_clone
from groupwise.models.direct import Product
from groupwise.models.policy import Policy
from groupwise.planning.meter import Cost, Meter
from groupwise.planning.sampling import decoding
from groupwise.planning.trace import Shape, TracedModel

_PATIENCE = 0.1
"""Seconds for each thing that is measured."""
_MOST_ROWS = 1024
_COPIED = 1 << 24
"""Elements of a copy that no cache holds."""
_TINY = Shape(groups=1, outputs=2, prompt=4, length=4)
"""A step in which there is next to nothing to compute."""


@dataclass(frozen=True)
class Rates:
    """FLOPs per second of matmuls with many and with few rows, bytes per second, and seconds per operation.

    Bytes count what is read and what is written: of activations of many and of few rows, and of weights that lie in
    main memory. An operation has its own price in a decoding step, in a forward pass, and in training.
    """

    flops_many: float
    flops_few: float
    bytes_many: float
    bytes_few: float
    bytes_memory: float
    operation_decoding: float
    operation_forward: float
    operation_training: float

    def decoding(self, cost: Cost, weights: int) -> float:
        """Seconds of a decoding step that reads `weights` bytes of them, which bound it where rows are few."""
        products = max(cost.flops / self.flops_few, weights / self.bytes_memory)
        rest = cost.attention_flops / self.flops_many + cost.moved / self.bytes_few
        return products + rest + cost.operations * self.operation_decoding

    def seconds(self, cost: Cost, *, training: bool = False) -> float:
        """Seconds of a pass over many tokens."""
        computed = (cost.flops + cost.attention_flops) / self.flops_many + cost.moved / self.bytes_many
        return computed + cost.operations * (self.operation_training if training else self.operation_forward)


def measure(traced: TracedModel, few: int, many: int, cached: bool) -> Rates:
    """Rates at the widths of a model: with `few` rows (decoding) and with `many` (training).

    On a CPU a process of our own keeps what it frees from then on, as that of a run does: else the pages of each result
    would be new, or not, as it happens.
    """
    text, device = traced.config.get_text_config(), torch.device(traced.device)
    keep_freed_memory(device)
    generator = torch.Generator(device).manual_seed(0)  # the global one may be somebody else's
    width = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * width)
    weight = torch.randn(inner, width, generator=generator, device=device).to(traced.dtype)
    many = min(many, _MOST_ROWS)

    def product(rows: int, multiply: Product) -> float:
        x = torch.randn(rows, width, generator=generator, device=device).to(traced.dtype)
        with torch.no_grad():
            return 2.0 * rows * width * inner / _seconds(lambda: multiply(x, (weight, None)), device)

    def activation(rows: int) -> float:
        x = torch.randn(rows, inner, generator=generator, device=device).to(traced.dtype)
        return 5 * x.nbytes / _seconds(lambda: x * x.sigmoid(), device)

    long = torch.zeros(_COPIED, device=device)
    target = torch.empty_like(long)
    memory = 2 * long.nbytes / _seconds(lambda: target.copy_(long), device)
    products = product(many, plain_linear), product(few, PackedLinear() if traced.past_modules else plain_linear)
    return Rates(*products, activation(many), activation(few), memory, *_overheads(traced, device, cached))


def _overheads(traced: TracedModel, device: torch.device, cached: bool) -> tuple[float, float, float]:
    """Seconds per operation of a tiny clone, by the code that a run uses: decoding, forward, forward and backward."""
    clone = tiny_clone(traced.config, traced.trust_remote_code)
    if traced.layout == "shared":
        clone.set_attn_implementation(ATTENTION_NAME)
    policy = Policy(clone, traced.layout, traced.head, direct=traced.direct).to(device)
    stream = policy.stream([((0,) * _TINY.prompt, [(0,) * _TINY.length] * _TINY.outputs)])
    with torch.no_grad():
        decode = decoding(policy, _TINY, _TINY.outputs, _TINY.length, cached)
        found = [_per_operation(run, device) for run in (decode, lambda: policy(stream))]

    def training() -> object:
        return policy(stream, 1.0, True).logprobs_T.sum().backward()

    return found[0], found[1], _per_operation(training, device)


def _per_operation(run: Callable[[], object], device: torch.device) -> float:
    run()  # what is made once, such as tiles and stores
    with Meter() as meter:
        run()
    return _seconds(run, device) / meter.operations


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
