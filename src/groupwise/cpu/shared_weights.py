"""A model's weights in memory that copies of this process share: what one writes, the others compute with."""

from __future__ import annotations

import mmap
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_ALIGNED = 64
"""Bytes: a line of the cache, and what kernels like best."""


def share(module: nn.Module) -> SharedWeights:
    """The shared memory of a module's weights: that which they lie in, else a new one that they are moved into."""
    found = _SHARED.get(module)
    if found is None or not found.hold(module):
        found = _SHARED[module] = SharedWeights(module)
    return found


class SharedWeights:
    """Moves the parameters and buffers of a module on the CPU into one piece of shared memory, where processes that are
    forked afterwards find them. Nobody else need know: they stay the same objects."""

    def __init__(self, module: nn.Module) -> None:
        tensors = _tensors(module)
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        memory = mmap.mmap(-1, max(size, 1))
        self._places = []
        for tensor, start in zip(tensors, starts, strict=True):
            if tensor.nbytes:
                flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
                tensor.data = flat.view(tensor.shape).copy_(tensor.data)
            self._places.append(tensor.data_ptr())

    def hold(self, module: nn.Module) -> bool:
        """Whether all of them still lie there: somebody may have moved one since, to another type for instance."""
        return [tensor.data_ptr() for tensor in _tensors(module)] == self._places


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(chain(module.parameters(), module.buffers()))


_SHARED: WeakKeyDictionary[nn.Module, SharedWeights] = WeakKeyDictionary()
