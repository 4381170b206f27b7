"""A decoding step's attention, against the formula written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from groupwise.engines.native.stores import Outputs, PromptFold, Shared, Step, Store
from groupwise.models.tiles import Options

HEADS, KV_HEADS, WIDTH = 4, 2, 16
CASES = {
    "nothing is ragged": ([0, 0, 0, 1, 1, 1], [5, 5], [3] * 6),
    "outputs differ": ([0, 0, 0, 1, 1, 1], [5, 5], [3, 0, 2, 1, 3, 3]),
    "prompts differ": ([0, 0, 0, 1, 1, 1], [5, 2], [3] * 6),
    "groups differ": ([1, 0, 1, 1, 2], [4, 5, 1], [2, 2, 2, 2, 2]),
    "as many, in another order": ([1, 0, 1, 0], [5, 5], [1, 1, 1, 1]),
    "all differ": ([2, 0, 2, 1, 2], [3, 6, 1], [4, 0, 1, 2, 3]),
}


def by_hand(query: Tensor, keys: Tensor, values: Tensor, options: Options) -> Tensor:
    """One row: `[H, d]` queries of its last token, `[L, H_kv, d]` keys and values of all that it may be able to see."""
    out = []
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        scores = keys[:, shared] @ query[head] * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if options.window is not None:
            scores[: max(0, len(scores) - options.window)] = -math.inf
        weights = scores.exp()
        total = weights.sum() + (0 if options.sinks is None else options.sinks[head].exp())
        out.append((weights / total) @ values[:, shared])
    return torch.stack(out)


ASKED = pytest.mark.parametrize(
    "softcap, window, sinks", [(None, None, False), (2.0, None, False), (None, 4, False), (None, 2, True)]
)
TYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["by torch", "by kernels if any"])


@pytest.mark.parametrize("case", CASES)
@ASKED
@TYPES
def test_each_row_attends_to_its_prompt_and_to_itself(
    case: str, softcap: float | None, window: int | None, sinks: bool, dtype: torch.dtype
) -> None:
    slots, prompt_lengths, lengths = CASES[case]
    check(slots, prompt_lengths, [None] * len(slots), lengths, (softcap, window, sinks, dtype))


# Per row: its output among two of 5 and 3 tokens, and how many of its tokens come before the row's own; or neither.
CUTS = {
    "all of both": [(0, 5), (0, 5), (0, 5), (1, 3), (1, 3), (1, 3)],
    "nested": [(0, 1), (0, 2), (0, 5), (1, 3), (1, 1), (1, 2)],
    "one output only": [(1, 3)] * 6,
    "some rows without": [(0, 2), None, (0, 5), (1, 1), None, None],
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("case", ["nothing is ragged", "outputs differ", "prompts differ"])
@ASKED
@TYPES
def test_and_to_an_output_between_the_two_as_far_as_it_goes_on_from_it(
    case: str, cuts: list[tuple[int, int] | None], softcap: float | None, window: int | None, sinks: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    slots, prompt_lengths, lengths = CASES[case]
    check(slots, prompt_lengths, cuts, lengths, (softcap, window, sinks, dtype))


def check(
    slots: list[int], prompt_lengths: list[int], cuts: list[tuple[int, int] | None], lengths: list[int],
    asked: tuple[float | None, int | None, bool, torch.dtype],
) -> None:  # fmt: skip
    """A step over stores of noise is what is written out by hand."""
    torch.manual_seed(0)
    dtype, cpu = asked[3], torch.device("cpu")
    options = Options(0.3, asked[1], asked[0], torch.randn(HEADS, dtype=dtype) if asked[2] else None)
    rows, reach = len(slots), max(lengths) + 1
    prompts, trunks, own = Shared(), Shared(), Store()
    prompts.add(range(len(prompt_lengths)), prompt_lengths)
    trunks.add(range(2), [5, 3])
    own.reserve(rows + 2, reach + 3)
    for store in (prompts.store, trunks.store):
        store.reserve(store.rows + 1, store.length + 2)
    like = torch.zeros(1, KV_HEADS, 1, WIDTH, dtype=dtype)
    for store in (prompts.store, trunks.store, own):
        for tensor in store.at(0, like, like):
            tensor.normal_()
    query = torch.randn(rows, HEADS, WIDTH, dtype=dtype)
    key, value = (torch.randn(rows, KV_HEADS, WIDTH, dtype=dtype) for _ in range(2))
    levels = [prompts.level(slots, [prompt_lengths[slot] for slot in slots], cpu)]
    if any(cuts):
        levels.append(trunks.level([cut and cut[0] for cut in cuts], [cut[1] if cut else 0 for cut in cuts], cpu))
    outputs = Outputs(own, torch.tensor(lengths), reach, len(set(lengths)) > 1)

    with torch.no_grad():
        found = Step(levels, outputs).attend(0, query, key, value, options)

    for row, (slot, cut, length) in enumerate(zip(slots, cuts, lengths, strict=True)):
        assert torch.equal(own.layers[0][0][row, :, length], key[row])
        trunk, seen = (trunks.names.index(cut[0]), cut[1]) if cut else (0, 0)
        keys, values = (
            torch.cat([a[slot, :, : prompt_lengths[slot]], b[trunk, :, :seen], c[row, :, : length + 1]], 1).transpose(
                0, 1
            )
            for a, b, c in zip(prompts.store.layers[0], trunks.store.layers[0], own.layers[0], strict=True)
        )
        torch.testing.assert_close(found[row], by_hand(query[row], keys, values, options))


@pytest.mark.parametrize("case", CASES)
def test_folding_rows_and_spreading_them_gives_them_back(case: str) -> None:
    slots, prompt_lengths, _ = CASES[case]
    fold = PromptFold.of(slots, len(prompt_lengths), torch.device("cpu"))
    rows = torch.randn(len(slots), KV_HEADS, 2, 3)
    assert torch.equal(fold.spread(fold.gather(rows)), rows)
    assert fold.even == (slots == [0, 0, 0, 1, 1, 1])
