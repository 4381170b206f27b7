"""Products of few rows with large matrices on a CPU, over copies that are laid out as the kernel reads them.

A decoding step multiplies every matrix by a handful of rows. A general product then spends as long on laying out the
matrix as on the product, at each step anew; a copy that is laid out once takes a third to a half off."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groupwise.models.hollow import counter

_SMALLEST = 1 << 18
"""Elements of a matrix from which on the kernel's longer call is worth it."""
_ROWS = 64
"""What copies are laid out for; other numbers of rows may use them."""


class _Copy(NamedTuple):
    """A laid-out copy, of which matrix it is, and of which of its versions."""

    weight: Tensor
    version: int
    laid_out: Tensor


class PackedProducts:
    """Linear layers' products without gradient. It makes copies of large matrices, each when it is first used and
    again where the matrix has changed in place, and keeps them until `release`."""

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias` for `[R, K]` rows."""
        if torch.is_grad_enabled() or counter.get() is not None or not packs(weight) or not _right(weight.dtype):
            return nn.functional.linear(x, weight, bias)
        return _product(x, self._laid_out(weight), bias)

    def _laid_out(self, weight: Tensor) -> Tensor:
        found = self._copies.get(id(weight))
        if found is None or found.version != weight._version:
            found = self._copies[id(weight)] = _Copy(weight, weight._version, _lay_out(weight))
        return found.laid_out

    def release(self) -> None:
        """Give the copies' memory back."""
        self._copies.clear()

    def __len__(self) -> int:
        return len(self._copies)

    def __deepcopy__(self, memo: object) -> PackedProducts:
        """Without copies: those are of other matrices than a copied model's."""
        return PackedProducts()


def packs(weight: Tensor) -> bool:
    """Whether a matrix is one of those that are copied."""
    return weight.device.type == "cpu" and weight.numel() >= _SMALLEST and not weight.is_inference()


def bytes_of_copies(weights: Iterable[Tensor], dtype: torch.dtype) -> int:
    """What the copies of these matrices take, computed in `dtype`."""
    each = {id(weight): weight.numel() for weight in weights if packs(weight)}
    return sum(each.values()) * dtype.itemsize if _right(dtype) else 0


@cache
def _right(dtype: torch.dtype) -> bool:
    """Whether this build has the kernel for `dtype`, and it says what a plain product says."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 80, generator=generator), torch.randn(48, generator=generator)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        laid_out = _lay_out(weight.to(dtype))
        for rows in (1, 7):
            x = torch.randn(rows, 80, generator=generator)
            found = _product(x.to(dtype), laid_out, bias.to(dtype)).float()
            if not torch.allclose(found, nn.functional.linear(x, weight, bias), atol=40 * torch.finfo(dtype).eps):
                return False
    except (AttributeError, RuntimeError, NotImplementedError):
        # A boundary: the kernel is torch's own, and not all of its builds have it.
        return False
    return True


def _lay_out(weight: Tensor) -> Tensor:
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    return laid_out


def _product(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")
    return out
