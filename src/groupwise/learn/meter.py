"""What operations allocate, compute and move: counted below autograd, one operation after the other."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")

LARGE = 32 << 20
"""Bytes from which glibc always takes a block from the system and gives it back."""


@dataclass(frozen=True)
class Cost:
    """What some operations take.

    `kept` are the bytes that lie between forward and backward, `peak` the most at any time, both beside what was there
    before; `top` is the most until the first of what was kept is given back. Blocks below `LARGE` are not given back to
    the system, so that their peak and that of large ones add up even where they come one after the other. `flops` are
    those of matrix products, `attention_flops` those of fused attention. `moved` are the bytes that all other
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


class Meter(TorchDispatchMode):
    """Counts the operations under it, each `times` times; what they allocate is there once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.kept = self.moved = self.operations = 0
        self.flops = self.attention_flops = 0.0
        self.times = 1
        self.top: int | None = None
        self._live, self._peaks = [0, 0], [0, 0]
        self._alive: dict[int, Any] = {}

    def mark(self) -> None:
        """What lives now is what is kept for the backward pass."""
        self.kept = self.live
        self.top = None

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
