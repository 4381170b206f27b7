"""CUDA graphs of decoding steps, captured once and replayed: launch overhead is longer than a small step.

A captured step has fixed shapes and reads fixed places. So live rows, what they share and lengths are rounded up to a
bucket; what is added attends to nothing and its results are dropped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from groupwise.engines.native.stores import Outputs, PromptFold, SharedLevel, Step, Store
from groupwise.models.policy import Policy
from groupwise.wording import one_line

Run = Callable[[], Tensor]
Capture = Callable[[Run], tuple[Callable[[], object], Tensor]]
"""Takes a step, returns what replays it and where its result then lies."""
_SHORTEST = 64
"""Tokens of an output that a captured step looks back on at least."""


@dataclass(frozen=True)
class Bucket:
    """The shapes of a captured step: live rows, tokens of an output, and of each level its entries and rows of one."""

    rows: int
    reach: int
    folds: tuple[tuple[int, int], ...]


class Live(NamedTuple):
    """What a step reads beside its levels: each row's last token, its length and its position."""

    token_R: Tensor
    length_R: Tensor
    position_R: Tensor


class _Captured(NamedTuple):
    """A captured step, and the places that it reads and writes."""

    replay: Callable[[], object]
    logits_RV: Tensor
    levels: Sequence[SharedLevel]
    places: Live


class Graphs:
    """Captured steps by bucket. They end with the stores that they were captured on.

    A class that cannot be captured (it looks at values on the way) is decoded step by step; `refused` says why.
    """

    def __init__(self, policy: Policy, capture: Capture | None = None) -> None:
        self.policy = policy
        self.capture = capture or _on_cuda
        self.refused = ""
        self._steps: dict[Bucket, _Captured] = {}
        self._made_on: tuple[int, ...] | None = None

    @staticmethod
    def bucket(levels: Sequence[SharedLevel], reach: int, longest: int) -> Bucket:
        """The smallest one that holds a step whose longest output has `reach` tokens, and none more than `longest`."""
        folds = tuple((rounded(entries), rounded(width)) for entries, width in (lv.fold.row_QM.shape for lv in levels))
        back = min(longest, max(_SHORTEST, 1 << (reach - 1).bit_length()))
        return Bucket(rounded(len(levels[0].seen_R)), back, folds)

    def step(self, levels: Sequence[SharedLevel], outputs: Store, bucket: Bucket, live: Live) -> Tensor | None:
        """Logits of the live rows `[R, V]`, overwritten by the next step; None where nothing can be captured."""
        made_on = (outputs.version, *(level.store.version for level in levels))
        if made_on != self._made_on:
            self._steps, self._made_on = {}, made_on
        if bucket not in self._steps:
            captured = self._capture(levels, outputs, bucket, live)
            if captured is None:
                return None
            self._steps[bucket] = captured
        replay, logits_RV, fixed, places = self._steps[bucket]
        _place(fixed, levels, places, live)
        replay()
        return logits_RV[: len(live.token_R)]

    def _capture(self, levels: Sequence[SharedLevel], outputs: Store, bucket: Bucket, live: Live) -> _Captured | None:
        def places(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=self.policy.device)

        fixed = [
            SharedLevel(
                one.store, PromptFold(places(*fold), places(bucket.rows)), places(bucket.rows), one.store.length, True
            )
            for one, fold in zip(levels, bucket.folds, strict=True)
        ]
        token_R, length_R, position_R = own = Live(*(places(bucket.rows) for _ in range(3)))
        # Capturing runs the step: on what is live, or it would write over it.
        _place(fixed, levels, own, live)

        def run() -> Tensor:
            layout = Step(fixed, Outputs(outputs, length_R, bucket.reach, ragged=True))
            return self.policy.step(token_R, position_R, layout)

        try:
            replay, logits_RV = self.capture(run)
        except RuntimeError as error:
            # Named boundary: whatever a model does that a graph cannot hold; it is decoded step by step instead.
            self.refused = one_line(error, 200)
            warnings.warn(
                "This model's decoding steps cannot be captured; each is handed out by itself, which takes several"
                f" times as long: {self.refused}", RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            return None
        return _Captured(replay, logits_RV, fixed, own)


def rounded(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16 and so on: at most a third is added."""
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if count <= 3 * power // 4 and power >= 4 else power


def _place(fixed: Sequence[SharedLevel], levels: Sequence[SharedLevel], places: Live, live: Live) -> None:
    """Put what is live where a captured step reads it."""
    for target, source in zip(fixed, levels, strict=True):
        _fill(target.fold.row_QM, source.fold.row_QM)
        _fill(target.fold.place_R, source.fold.place_of(target.fold.row_QM.shape[1]))
        _fill(target.seen_R, source.seen_R)
    for place, value in zip(places, live, strict=True):
        _fill(place, value)


def _fill(target: Tensor, source: Tensor) -> None:
    """Copy into the corner of a place, and zero the rest."""
    target.zero_()
    target[tuple(slice(n) for n in source.shape)].copy_(source)


def _on_cuda(run: Run) -> tuple[Callable[[], object], Tensor]:
    # Kernels are chosen and libraries woken before, on another stream, as capturing asks for.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_RV = run()
    return graph.replay, logits_RV
