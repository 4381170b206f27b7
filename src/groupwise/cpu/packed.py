"""Matmuls of few rows with large matrices on a CPU, over copies that are laid out as the kernel reads them.

A decoding step multiplies every matrix by a handful of rows. A general matmul then spends as long on laying out the
matrix as on the matmul, at each step anew; a copy that is laid out once takes a third to a half off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groupwise.cpu.kernels import is_plain

_SMALLEST = 1 << 18
"""Elements of a matrix from which on the kernel's longer call is worth it."""
_ROWS = 64
"""What copies are laid out for; other numbers of rows may use them."""


Part = tuple[Tensor, Tensor | None]
"""A linear layer's matrix `[V, K]` and bias `[V]`."""
Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def plain_linear(x: Tensor, *parts: Part) -> Tensor:
    """`x @ weight.T + bias` for `[.., K]` rows, the parts' results side by side."""
    found = [nn.functional.linear(x, weight, bias) for weight, bias in parts]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


class _Copy(NamedTuple):
    """A copy of parts and their bias, side by side; which tensors it is of, of which of their versions, and who
    multiplies by it."""

    tensors: list[Tensor]
    versions: list[int]
    multiply: Multiply
    weight: Tensor
    bias: Tensor | None


class PackedLinear:
    """`plain_linear` without gradient. It makes copies of large matrices, laid out for the kernel, and of what is
    multiplied together: each when it is first used and again where a matrix has changed in place, and keeps them until
    `release`."""

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}

    def __call__(self, x: Tensor, *parts: Part) -> Tensor:
        """`x @ weight.T + bias` for `[R, K]` rows, the parts' results side by side."""
        if torch.is_grad_enabled() or not (_fits(x, parts) and _copied(x.dtype, parts)):
            return plain_linear(x, *parts)
        copy = self._copy_of(parts)
        return copy.multiply(x, copy.weight, copy.bias)

    def _copy_of(self, parts: Sequence[Part]) -> _Copy:
        tensors = [tensor for part in parts for tensor in part if tensor is not None]
        versions = [tensor._version for tensor in tensors]
        found = self._copies.get(id(tensors[0]))
        if found is None or found.versions != versions:
            found = self._copies[id(tensors[0])] = _Copy(tensors, versions, *_side_by_side(parts))
        return found

    def release(self) -> None:
        """Give the copies' memory back."""
        self._copies.clear()

    def __len__(self) -> int:
        return len(self._copies)

    def __deepcopy__(self, memo: object) -> PackedLinear:
        """Without copies: those are of other matrices than a copied model's."""
        return PackedLinear()


def bytes_of_copies(products: Iterable[Sequence[Part]], dtype: torch.dtype) -> int:
    """What the copies for these matmuls take, computed in `dtype`."""
    copied = [parts for parts in products if _copied(dtype, parts)]
    return dtype.itemsize * sum(weight.numel() for parts in copied for weight, _ in parts)


def _copied(dtype: torch.dtype, parts: Sequence[Part]) -> bool:
    """Whether a copy is made: of large matrices where it can be laid out, of small ones where they are several."""
    if any(weight.device.type != "cpu" or weight.is_inference() for weight, _ in parts):
        return False
    return _kernel_agrees(dtype) if _is_large(parts) else len(parts) > 1


def _fits(x: Tensor, parts: Sequence[Part]) -> bool:
    """Whether these are tensors that the kernel can read, all of one type, and of shapes that go together."""
    tensors = [tensor for part in parts for tensor in part if tensor is not None]
    return (
        is_plain(x, *tensors)
        and all(tensor.dtype == x.dtype and not tensor.is_inference() for tensor in tensors)
        and all(
            weight.dim() == 2 and weight.shape[1] == x.shape[-1] and (bias is None or bias.shape == weight.shape[:1])
            for weight, bias in parts
        )
    )


def _is_large(parts: Sequence[Part]) -> bool:
    return sum(weight.numel() for weight, _ in parts) >= _SMALLEST


@cache
def _kernel_agrees(dtype: torch.dtype) -> bool:
    """Whether this build has the kernel for `dtype`, and it says what a plain matmul says."""
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


def _side_by_side(parts: Sequence[Part]) -> tuple[Multiply, Tensor, Tensor | None]:
    weights = [weight.detach() for weight, _ in parts]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None
    if any(bias is not None for _, bias in parts):
        bias = torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts])
    return (_product, _lay_out(weight), bias) if _is_large(parts) else (nn.functional.linear, weight, bias)


def _lay_out(weight: Tensor) -> Tensor:
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    return laid_out


def _product(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")
    return out
