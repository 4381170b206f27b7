"""Compiled kernels for a CPU: RMSNorm, RoPE and SwiGLU with gradients, a tile's softmax, a decoding step's attention.

A decoding step has some sixty small operations a layer besides its matmuls, and dispatching each of them takes longer
than it does: at hidden sizes of some hundred numbers, two thirds of a step. Written out in C (`kernels.c`) they are
four, and in training a few passes over memory take the place of many. The
C is compiled once per machine, by the compiler that `CC` names or the first of cc, gcc and clang, and kept in the cache
folder. Where there is no compiler, torch's operations do the same."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groupwise.cpu import kernels_torch as plain
from groupwise.disk import cache_folder

_SOURCE = Path(__file__).with_name("kernels.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
_TUNINGS = ("-march=native", "-mcpu=native", "-O3")
"""How a compiler is told to use all that this processor has: the first that it takes."""
_ALONE = 1 << 22
"""Multiplications up to which one thread is as quick as several. What is here has one."""
LANES = 16
"""Widths have to be multiples of this: eight numbers are computed together, of heads those of either half."""
_PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors whose numbers lie where their pointer says; subclasses may have them elsewhere, or none."""
_wrapped_by_functorch: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda x: False
)


class KeyRange(NamedTuple):
    """Which tokens of a store rows see: row `r` those from `first_R[r]` to `end_R[r]` of its entry `slot_R[r]`, all
    int64. Without `slot_R` that is entry `r`, without `first_R` it begins at 0."""

    slot_R: Tensor | None
    first_R: Tensor | None
    end_R: Tensor


class _Part(Structure):
    _fields_ = (
        ("key", c_void_p), ("value", c_void_p), ("slot", c_void_p), ("first", c_void_p), ("end", c_void_p),
        ("length", c_int64),
    )  # fmt: skip


class _Tile(Structure):
    _fields_ = (
        ("bias", c_void_p), ("bias_row", c_int64), ("bias_query", c_int64), ("rows", c_int64), ("heads", c_int64),
        ("queries", c_int64), ("keys", c_int64),
    )  # fmt: skip


_SIGNATURES = {
    "norm": (c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_float, c_void_p, c_void_p),
    "norm_back": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
    "swiglu": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "swiglu_back": (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    "rotary": (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64),
    "softmax_numerator": (c_void_p, POINTER(_Tile), c_void_p, c_void_p),
    "softmax_numerator_back": (c_void_p, c_void_p, POINTER(_Tile), c_void_p, c_void_p),
    "attend": (
        c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_float,
        POINTER(_Part), c_int64, c_void_p, c_void_p,
    ),
}  # fmt: skip


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether code outside of torch can read and write all of these on the CPU: no subclasses, such as sharded tensors
    and those without data, nothing that a transform wraps, and no gradient that would be lost."""
    recording = torch.is_grad_enabled()
    return all(
        x is None
        or (
            type(x) in _PLAIN and x.is_cpu and x.layout is torch.strided and not (recording and x.requires_grad)
            and not (x.is_neg() or x._is_zerotensor() or _wrapped_by_functorch(x))
        )
        for x in tensors
    )  # fmt: skip


def _readable(*tensors: Tensor | None) -> bool:
    """Whether the kernels' pointers can be trusted: plain tensors in float32."""
    return is_plain(*tensors) and all(x is None or x.dtype == torch.float32 for x in tensors)


def _has_rows(x: Tensor) -> bool:
    """Whether `[R, D]` or `[R, H, D]` has rows without gaps, of widths that the kernels take."""
    *_, width = x.shape
    whole = x.stride(-1) == 1 and width % LANES == 0 and width > 0
    return whole and (x.dim() == 2 or (x.dim() == 3 and (x.stride(1) == width or x.shape[1] == 1)))


def _is_whole(x: Tensor | None, count: int) -> bool:
    """Whether a tensor has so many numbers, without gaps."""
    return x is None or (x.numel() == count and x.is_contiguous())


class Kernels:
    """The compiled functions, over tensors in float32 on a CPU.

    What C cannot read is computed by torch: a subclass of tensors, another type, gaps where none may be. So no call can
    read or write memory that is not the tensors' own; only what `KeyRanges` say is taken as it is.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = {name: getattr(library, f"groupwise_{name}") for name in _SIGNATURES}
        for name, arguments in _SIGNATURES.items():
            self._run[name].argtypes, self._run[name].restype = arguments, None

    def norm(self, x: Tensor, weight: Tensor, epsilon: float, factor: Tensor | None = None) -> Tensor:
        """`x` `[R, D]` or `[R, H, D]` over the root of its last dimension's mean square, times `weight` `[D]`. One over
        the root is put into `factor` where that is given, `[R, 1]` or `[R, H, 1]`."""
        if not (
            _readable(x, weight, factor) and _has_rows(x) and _is_whole(weight, x.shape[-1])
            and _is_whole(factor, x.numel() // x.shape[-1])
        ):  # fmt: skip
            return plain.norm(x, weight, epsilon, factor)
        rows, *several, width = x.shape
        heads, out = several[0] if several else 1, x.new_empty(rows, *several, width)
        self._run["norm"](
            x.data_ptr(), x.stride(0), rows, heads, width, weight.data_ptr(), epsilon, out.data_ptr(),
            None if factor is None else factor.data_ptr(),
        )  # fmt: skip
        return out

    def norm_back(self, x: Tensor, weight: Tensor, factor: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `x` and of `weight`."""
        width = x.shape[-1]
        if not (
            _readable(x, weight, factor, grad) and _is_whole(weight, width) and width % LANES == 0
            and _is_whole(x, x.numel()) and _is_whole(grad, x.numel()) and _is_whole(factor, x.numel() // width)
        ):  # fmt: skip
            return plain.norm_back(x, weight, factor, grad)
        of_x, of_weight, room = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        self._run["norm_back"](
            x.data_ptr(), weight.data_ptr(), factor.data_ptr(), grad.data_ptr(), x.numel() // width, width,
            of_x.data_ptr(), of_weight.data_ptr(), room.data_ptr(),
        )  # fmt: skip
        return of_x, of_weight

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """`silu(gate) * up`, of one shape `[R, I]`."""
        if not (
            _readable(gate, up) and gate.dim() == 2 and gate.shape == up.shape and _has_rows(gate) and _has_rows(up)
            and gate.stride(0) == up.stride(0)
        ):  # fmt: skip
            return plain.swiglu(gate, up)
        rows, width = gate.shape
        out = gate.new_empty(rows, width)
        self._run["swiglu"](gate.data_ptr(), up.data_ptr(), gate.stride(0), rows, width, out.data_ptr())
        return out

    def swiglu_back(self, gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `swiglu` and `up`."""
        count = gate.numel()
        if not (
            _readable(gate, up, grad) and gate.shape == up.shape == grad.shape and count % LANES == 0
            and all(_is_whole(x, count) for x in (gate, up, grad))
        ):  # fmt: skip
            return plain.swiglu_back(gate, up, grad)
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        self._run["swiglu_back"](
            gate.data_ptr(), up.data_ptr(), grad.data_ptr(), gate.numel(), of_gate.data_ptr(), of_up.data_ptr()
        )  # fmt: skip
        return of_gate, of_up

    def rotary(self, x: Tensor, cos: Tensor, signed_sin: Tensor, out: Tensor) -> Tensor:
        """`[R, H, d]`, every head rotated: see `DirectBody`. cos and signed sin: `[R, 1, d]`; `out` may be `x`."""
        rows, heads, width = x.shape
        if not (
            _readable(x, cos, signed_sin, out) and _has_rows(x) and _has_rows(out) and out.shape == x.shape
            and _is_whole(cos, rows * width) and _is_whole(signed_sin, rows * width)
            and (rows == 1 or out.stride(0) >= heads * width)
        ):  # fmt: skip
            return plain.rotary(x, cos, signed_sin, out)
        self._run["rotary"](
            x.data_ptr(), x.stride(0), cos.data_ptr(), signed_sin.data_ptr(), rows, heads, width, out.data_ptr(),
            out.stride(0),
        )  # fmt: skip
        return out

    def softmax_numerator_(self, scores: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """`exp(scores + bias - top)` in place of `[R, H, M, K]` scores; returns `top`, the largest of a query's, and
        the sum of its weights, `[R, H, M]`. `bias` has 1 in place of H, and may have in place of R and M."""
        if not (_readable(scores) and _is_whole(scores, scores.numel()) and _fits_scores(scores, bias)):
            return plain.softmax_numerator_(scores, bias)
        top, total = (scores.new_empty(scores.shape[:3]) for _ in range(2))
        self._run["softmax_numerator"](scores.data_ptr(), _tile_of(scores, bias), top.data_ptr(), total.data_ptr())
        return top, total

    def softmax_numerator_back_(
        self, scores: Tensor, bias: Tensor | None, change: Tensor, lse: Tensor, delta: Tensor
    ) -> None:
        """`exp(scores + bias - lse)` in place of the scores, and `(change - delta)` times that in place of `change`, of
        the same shape; `lse` and `delta` have a number per query."""
        count = scores.numel() // max(1, scores.shape[-1])
        if not (
            _readable(scores, change, lse, delta) and _is_whole(scores, scores.numel())
            and _is_whole(change, scores.numel()) and _is_whole(lse, count) and _is_whole(delta, count)
            and _fits_scores(scores, bias)
        ):  # fmt: skip
            return plain.softmax_numerator_back_(scores, bias, change, lse, delta)
        tile = _tile_of(scores, bias)
        self._run["softmax_numerator_back"](
            scores.data_ptr(), change.data_ptr(), tile, lse.data_ptr(), delta.data_ptr()
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, parts: KeyRanges, stores: Sequence[Pair]
    ) -> Tensor:  # fmt: skip
        """A token per row, `[R, H, d]` queries and `[R, H_kv, d]` keys and values: these are put at the end of the last
        part, then the queries meet all parts under one softmax. `stores` are the keys and values of each part,
        `[entries, H_kv, length, d]`. Returns `[R, H, d]`."""
        (rows, heads, width), kv_heads = query.shape, key.shape[1]
        tensors = [x for pair in stores for x in pair]
        if not (
            _readable(query, key, value, *tensors) and parts.rows == rows and key.shape == (rows, kv_heads, width)
            and key.shape == value.shape and heads % kv_heads == 0 and all(map(_has_rows, (query, key, value)))
            and all(x.dim() == 4 and x.shape[1::2] == (kv_heads, width) and x.is_contiguous() for x in tensors)
            and all(keys.shape == values.shape for keys, values in stores)
        ):  # fmt: skip
            return plain.attend(query, key, value, scale, parts.looks, stores)
        out, room = query.new_empty(rows, heads, width), query.new_empty(rows * heads * (width + 2))
        for part, (keys, values) in zip(parts.laid, stores, strict=True):
            part.key, part.value, part.length = keys.data_ptr(), values.data_ptr(), keys.shape[2]
        self._run["attend"](
            query.data_ptr(), query.stride(0), key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0), rows,
            kv_heads, heads // kv_heads, width, scale, parts.laid, len(parts.laid), out.data_ptr(), room.data_ptr(),
        )  # fmt: skip
        return out


Pair = tuple[Tensor, Tensor]


class KeyRanges:
    """What the rows of a step see of each store, in every layer; `rows` of them, or -1 where C cannot read that."""

    def __init__(self, looks: Sequence[KeyRange]) -> None:
        self.looks = looks  # whose memory is pointed into
        self.rows = len(looks[-1].end_R)
        told = [x for look in looks for x in look if x is not None]
        if not is_plain(*told) or any(x.dtype != torch.int64 or not _is_whole(x, self.rows) for x in told):
            self.rows = -1
            return
        self.laid = (_Part * len(looks))()
        for part, look in zip(self.laid, looks, strict=True):
            part.slot, part.first, part.end = (None if x is None else x.data_ptr() for x in look)


def _tile_of(scores: Tensor, bias: Tensor | None) -> _Tile:
    if bias is None:
        return _Tile(None, 0, 0, *scores.shape)
    rows, _, queries, _ = (stride if size > 1 else 0 for size, stride in zip(bias.shape, bias.stride(), strict=True))
    return _Tile(bias.data_ptr(), rows, queries, *scores.shape)


def _fits_scores(scores: Tensor, bias: Tensor | None) -> bool:
    """Whether scores are `[R, H, M, K]` and a bias can be added to them as it lies."""
    if scores.dim() != 4 or bias is None:
        return scores.dim() == 4
    rows, _, queries, keys = scores.shape
    return (
        _readable(bias) and bias.dim() == 4 and bias.shape[0] in (1, rows) and bias.shape[1] == 1
        and bias.shape[2] in (1, queries) and bias.shape[3] == keys and (keys == 1 or bias.stride(3) == 1)
    )  # fmt: skip


def kernels_for(work: float, *tensors: Tensor) -> Kernels | None:
    """The kernels, where they can compute with tensors like these, and `work` multiplications are not more than one
    thread should do alone; None where torch has to. They know nothing of gradients."""
    for x in tensors:
        if type(x) not in _PLAIN or x.dtype != torch.float32 or not x.is_cpu or x.shape[-1] % LANES:
            return None
    return None if work > _ALONE and torch.get_num_threads() > 1 else compiled()


@cache
def compiled() -> Kernels | None:
    """The kernels, compiled if need be; None where there is no compiler, with a warning where it does not make them."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        return None
    complaint = ""
    for tuning in _TUNINGS:
        try:
            found = Kernels(_loaded(compiler, tuning))
            if _agree(found):
                return found
            complaint = "what it made computes something else"
        except subprocess.CalledProcessError as error:
            complaint = str(error.stderr)
        except (OSError, AttributeError) as error:  # no such compiler, no room, or what it made is no library
            complaint = str(error)
    warnings.warn(
        f"Sampling on this CPU takes longer than it could: {compiler} did not compile {_SOURCE.name} "
        f"({' '.join(complaint.split())[:200]}). Name another compiler by CC; a cache folder by GROUPWISE_CACHE.",
        RuntimeWarning, stacklevel=2,
    )  # fmt: skip
    return None


@torch.inference_mode(False)
def _agree(kernels: Kernels) -> bool:
    """Whether they say what torch says."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, weight, back, factor = noise(3, 48), noise(48), noise(3, 48), torch.empty(3, 1)
    gate, up = noise(3, 96).chunk(2, -1)
    whole = gate.contiguous(), up.contiguous(), back
    heads, cos, sin = noise(3, 2, 32), noise(3, 1, 32), noise(3, 1, 32)
    query, key, value, stores = noise(3, 4, 16), noise(3, 2, 16), noise(3, 2, 16), noise(2, 3, 2, 7, 16)
    seen = KeyRanges([KeyRange(None, None, torch.tensor([7, 2, 5]))])
    scores, change, lse, delta = noise(2, 3, 4, 11), noise(2, 3, 4, 11), noise(2, 3, 4), noise(2, 3, 4)
    weights, again, changed = scores.clone(), scores.clone(), change.clone()
    top, total = kernels.softmax_numerator_(weights, None)
    kernels.softmax_numerator_back_(again, None, changed, lse, delta)
    x_f, weight_f, gate_f, up_f = (part.clone().requires_grad_() for part in (x, weight, gate, up))
    with torch.enable_grad():
        norm, gated = nn.functional.rms_norm(x_f, (48,), weight_f, 1e-6), nn.functional.silu(gate_f) * up_f
    expected = (scores - lse[..., None]).exp()
    pairs = [
        (kernels.norm(x, weight, 1e-6, factor), norm),
        *zip(kernels.norm_back(x, weight, factor, back), torch.autograd.grad(norm, (x_f, weight_f), back), strict=True),
        (kernels.swiglu(gate, up), gated),
        *zip(kernels.swiglu_back(*whole), torch.autograd.grad(gated, (gate_f, up_f), back), strict=True),
        (kernels.rotary(heads, cos, sin, torch.empty_like(heads)), heads * cos + heads.roll(16, -1) * sin),
        (weights / total[..., None], scores.softmax(-1)), (top, scores.amax(-1)),
        (again, expected), (changed, (change - delta[..., None]) * expected),
        (kernels.attend(query, key, value, 0.3, seen, [(stores[0], stores[1])]), _attended(query, stores, 0.3)),
    ]  # fmt: skip
    return all(torch.allclose(found, right, atol=1e-5, rtol=1e-5) for found, right in pairs)


def _attended(query: Tensor, stores: Tensor, scale: float) -> Tensor:
    """What `_agree` asks for: rows that see 7, 2 and 5 tokens."""
    hidden = torch.arange(7) >= torch.tensor([7, 2, 5])[:, None]
    keys, values = (store.repeat_interleave(2, 1) for store in stores)
    scores = torch.einsum("rhd,rhkd->rhk", query, keys) * scale
    return torch.einsum("rhk,rhkd->rhd", scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1), values)


def _loaded(compiler: str, tuning: str) -> ctypes.CDLL:
    """The library; one in the cache that is damaged is made again."""
    file = _library(compiler, tuning)
    try:
        return ctypes.CDLL(str(file))
    except OSError:
        file.unlink(missing_ok=True)
        return ctypes.CDLL(str(_library(compiler, tuning)))


def _library(compiler: str, tuning: str) -> Path:
    """The shared library. Its name says source, compiler, flags and processor: who has another one makes anew."""
    command = shlex.split(compiler)
    told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    made_from = (_SOURCE.read_text(), told, *_FLAGS, tuning, platform.machine(), processor())
    name = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:24]
    file = cache_folder() / "kernels" / f"{name}.so"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / "made.so"
            command += [*_FLAGS, tuning, str(_SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, text=True, check=True)
            made.replace(file)  # whoever else compiles it meanwhile makes the same
    return file


def processor() -> str:
    """What tells processors apart that have different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
