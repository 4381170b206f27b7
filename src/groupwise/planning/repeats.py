"""What a pass without data need not run again: rounds of a loop that are alike, and attention that was run before.

Nothing is known here of what a round takes. The code that runs all of them runs those that are handed out, and the
meter multiplies; attention over the same tiles is run once, by itself, and in every layer counted."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from groupwise.models.layout import Forest
from groupwise.models.tiles import Options, Tile, TiledAttention
from groupwise.planning.meter import LARGE, Meter, Span

Item = TypeVar("Item")


class Rounds(tuple[Item, ...]):
    """Items that are gone through kind by kind, while a meter counts what is done as often as a kind is there."""

    kinds: Sequence[tuple[Item, int]]
    meter: Meter

    @classmethod
    def of(cls, items: Sequence[Item], kind: Callable[[Item], Hashable], meter: Meter) -> Rounds[Item]:
        """The items, of which those of one `kind` allocate and compute alike."""
        counts = collections.Counter(map(kind, items))
        first = {kind(item): item for item in reversed(items)}
        rounds = cls(items)
        rounds.kinds, rounds.meter = [(first[key], count) for key, count in counts.items()], meter
        return rounds

    def __iter__(self) -> Iterator[Item]:
        """One of each kind, and a second one, beside which the first one's tensors still are, for all others."""
        try:
            for item, count in self.kinds:
                yield item
                if count > 1:
                    self.meter.times = count - 1
                    yield item
                self.meter.times = 1
        finally:
            self.meter.times = 1


@dataclass(frozen=True)
class _Attention:
    """What attention over some tiles takes; which of its inputs and its result it keeps for the backward pass, what
    the result is like, and how many bytes it keeps beside these, in small and in large blocks."""

    forward: Span
    backward: Span | None
    kept: tuple[bool, ...]
    out: tuple[torch.Size, torch.dtype]
    others: tuple[int, ...]


class Counting:
    """The `Counter` of the passes that one meter counts; what it learns is in `known`, for passes to come."""

    def __init__(self, meter: Meter, known: dict[Hashable, Any]) -> None:
        self.meter, self.known = meter, known
        self._masked: set[Hashable] = set()

    def rounds(self, items: Sequence[Item], kind: Callable[[Item], Hashable]) -> Sequence[Item]:
        """See `Counter`."""
        return Rounds.of(items, kind, self.meter)

    def attention(
        self, forest: Forest, kind: tuple[int, int, bool], inputs: Sequence[Tensor | None], options: Options
    ) -> Tensor:
        """See `Counter`. Where each tile makes the mask of a window, which it keeps, all of them are run first."""
        with unset_fake_temporarily():  # with data: they are small, and thousands of operations would take seconds
            tiles = forest.tiles(*kind)
        for tile in tiles:
            for tensor in _tensors(tile).values():
                self.meter.hold(tensor)
        window = options.window
        if window is None or all(tile.reach < window for tile in tiles):
            window = None
        elif (id(tiles), window) not in self._masked:
            self._masked.add((id(tiles), window))  # a forest holds its tiles for as long as the pass lasts
            with torch.no_grad(), self.meter.uncounted():
                TiledAttention.apply(*inputs, (tiles, options))  # type: ignore[no-untyped-call]
        needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        key = (
            forest.lengths, forest.parents, forest.asked if kind[2] else None, kind,
            window, options.softcap is None, needed,
            tuple(None if x is None else (x.shape, x.dtype, x.requires_grad) for x in inputs),
        )  # fmt: skip
        if key not in self.known:
            with self.meter.paused():
                self.known[key] = _run_alone(tiles, inputs, options, needed)
        return _Replayed.apply(self.meter, self.known[key], *inputs)  # type: ignore[no-untyped-call, no-any-return]


def _run_alone(tiles: Sequence[Tile], inputs: Sequence[Tensor | None], options: Options, needed: bool) -> _Attention:
    """Attention forward and, where it is `needed`, backward, on tensors of its own, by one tile of each kind."""
    own = [None if x is None else torch.empty_like(x).detach().requires_grad_(x.requires_grad) for x in inputs]
    meter = Meter()
    rounds = Rounds.of(tiles, _kind_of_tile, meter)
    rounds.kinds = [(_hollow(tile), count) for tile, count in rounds.kinds]
    # Gradient checkpointing, which may be at work outside, must not see what is saved here.
    with torch.set_grad_enabled(needed), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        with meter:
            out: Tensor = TiledAttention.apply(*own, (rounds, options))  # type: ignore[no-untyped-call]
        forward, backward = meter.span(), None
        saved = {x.untyped_storage()._cdata for x in getattr(out.grad_fn, "saved_tensors", ()) if x is not None}
        if needed:
            wanted, grad = [x for x in own if x is not None and x.requires_grad], torch.empty_like(out)
            with meter:
                given = torch.autograd.grad(out, wanted, grad)
            backward = meter.span()
            del given
    kept = tuple(x is not None and x.untyped_storage()._cdata in saved for x in (*own, out))
    own_bytes = out.untyped_storage().nbytes()
    others = [stays - own_bytes * (i == (own_bytes >= LARGE)) for i, stays in enumerate(forward.stays)]
    return _Attention(forward, backward, kept, (out.shape, out.dtype), tuple(others))


class _Replayed(torch.autograd.Function):
    """Allocates, keeps and counts what attention does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, known: _Attention, *inputs: Tensor | None) -> Tensor:
        query = inputs[0]
        assert query is not None
        ctx.meter, ctx.known = meter, known
        ctx.inputs = [None if x is None else (x.shape, x.dtype) for x in inputs]
        meter.replay(known.forward)
        with meter.uncounted():
            out = query.new_empty(known.out[0], dtype=known.out[1])
            others = [query.new_empty(size, dtype=torch.uint8) for size in known.others if size]
        kept = [x for x, is_kept in zip((*inputs, out), known.kept, strict=True) if is_kept]
        ctx.save_for_backward(*kept, *others)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # where layers are computed again, it is done now
        ctx.meter.replay(ctx.known.backward)
        with ctx.meter.uncounted():
            given = [
                None if kind is None or not needed else grad.new_empty(kind[0], dtype=kind[1])
                for kind, needed in zip(ctx.inputs, ctx.needs_input_grad[2:], strict=True)
            ]
        del saved
        return None, None, *given


def _hollow(tile: Tile) -> Tile:
    """The tile without data too: an operation on both sorts of tensors takes several times as long."""
    mode = detect_fake_mode()
    assert mode is not None
    traced: dict[str, Any] = {name: mode.from_tensor(tensor) for name, tensor in _tensors(tile).items()}
    return replace(tile, **traced)


def _tensors(tile: Tile) -> dict[str, Any]:
    return {name: value for name, value in vars(tile).items() if isinstance(value, Tensor)}


def _kind_of_tile(tile: Tile) -> Hashable:
    """What decides on the operations of a tile, and on the shapes of their results."""
    bias = None if tile.bias is None else tile.bias.shape
    return tile.shape, tile.own, tile.reach, len(tile.target), tile.place is None, bias
