"""What operations allocate, compute and move: counted below autograd, one operation after the other."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")

LARGE = 32 << 20
"""Bytes from which glibc, left to itself, always takes a block from the system and gives it back."""


@dataclass(frozen=True)
class Cost:
    """What some operations take.

    `kept` are the bytes that lie between forward and backward, `peak` the most at any time, both beside what was there
    before; `top` is the most until the first of what was kept is given back. Blocks below `LARGE` are not given back to
    the system, so that their peak and that of large ones add up even where they come one after the other. `flops` are
    those of matmuls, `attention_flops` those of fused attention. `moved` are the bytes that all other
    operations read and write, `operations` how many there are of all kinds.
    """

    kept: float = 0
    peak: float = 0
    flops: float = 0
    attention_flops: float = 0
    moved: float = 0
    operations: float = 0
    top: float = 0

    def plus(self, other: Cost, times: float = 1) -> Cost:
        """This and `times` the other, field by field; memory too, which is right for layers and wrong for calls."""
        names = [field.name for field in fields(self)]
        return Cost(**{name: getattr(self, name) + times * getattr(other, name) for name in names})


@dataclass(frozen=True)
class Span:
    """What operations take that can be counted again: bytes of small and of large blocks, beside what was before."""

    stays: tuple[int, int]
    peaks: tuple[int, int]
    flops: float
    attention_flops: float
    moved: int
    operations: int


class Meter(TorchDispatchMode):
    """Counts the operations under it, each `times` times; what they allocate is there once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.kept = self.moved = self.operations = 0
        self.flops = self.attention_flops = 0.0
        self.times = 1
        self._seeing = False
        self._start = Span((0, 0), (0, 0), 0, 0, 0, 0)
        self.top: int | None = None
        self._live, self._peaks = [0, 0], [0, 0]
        self._alive: dict[int, Any] = {}

    def mark(self) -> None:
        """What lives now is what is kept for the backward pass."""
        self.kept = self.live
        self.top = None

    def span(self) -> Span:
        """What was done since the last span, or since the start."""
        old = self._start
        now = Span(
            (self._live[0], self._live[1]), (self._peaks[0], self._peaks[1]), self.flops, self.attention_flops,
            self.moved, self.operations,
        )  # fmt: skip
        self._start, self._peaks = now, [*self._live]
        return Span(
            (now.stays[0] - old.stays[0], now.stays[1] - old.stays[1]),
            (now.peaks[0] - old.stays[0], now.peaks[1] - old.stays[1]), now.flops - old.flops,
            now.attention_flops - old.attention_flops, now.moved - old.moved, now.operations - old.operations,
        )  # fmt: skip

    def replay(self, span: Span) -> None:
        """Count a span, whose tensors are gone, once more; what stays of it is to be allocated by the caller."""
        if not self._seeing:
            return
        for large, more in enumerate(span.peaks):
            self._peaks[large] = max(self._peaks[large], self._live[large] + more)
        self.flops += span.flops
        self.attention_flops += span.attention_flops
        self.moved += span.moved
        self.operations += span.operations

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, operations allocate and are not counted."""
        self.times, before = 0, self.times
        try:
            yield
        finally:
            self.times = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is seen."""
        self._seeing, before = False, self._seeing
        try:
            yield
        finally:
            self._seeing = before

    def __enter__(self) -> Self:
        self._seeing = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._seeing = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor that was made where operations are not seen, such as one of an array."""
        if self._seeing:
            self._allocated(tensor, set())

    @property
    def peak(self) -> int:
        """The most so far, of small blocks and of large ones."""
        return sum(self._peaks)

    @property
    def cost(self) -> Cost:
        """The counts so far."""
        return Cost(self.kept, self.peak, self.flops, self.attention_flops, self.moved, self.operations, self.top or 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._seeing:
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        old = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            self._allocated(tensor, old)
        self._computed(func, inputs, outputs)
        return out

    def _allocated(self, tensor: Tensor, old: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in old or key in self._alive:
            return

        large = size >= LARGE

        def freed(_: Any) -> None:
            del self._alive[key]
            if self.kept and self.top is None and self.live - size < self.kept:
                self.top = self.peak
            self.live -= size
            self._live[large] -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.live += size
        self._live[large] += size
        self._peaks[large] = max(self._peaks[large], self._live[large])

    def _computed(self, func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if not outputs:  # a question, such as what device a tensor is on
            return
        self.operations += self.times
        name = func.overloadpacket.__name__
        if name == "_grouped_mm":  # tokens by expert, `[M, K]`, and `[experts, K, N]`
            self.flops += self.times * 2.0 * inputs[0].numel() * outputs[0].shape[-1]
        elif name in _PRODUCTS:  # the last two inputs are the factors, `[.., M, K]` and `[.., K, N]`
            self.flops += self.times * 2.0 * outputs[0].numel() * inputs[-2].shape[-1]
        elif "scaled_dot_product" in name:
            backward = "backward" in name
            query, key = inputs[1 if backward else 0], inputs[2 if backward else 1]
            self.attention_flops += self.times * (10.0 if backward else 4.0) * query.numel() * key.shape[-2]
        elif not func.is_view:
            self.moved += self.times * sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
