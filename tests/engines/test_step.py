"""A decoding step's attention, against the formula written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from groupwise.engines.stores import Fold, Outputs, Prompts, Step, Store, Stores
from groupwise.models.tiles import Options

HEADS, KV_HEADS, WIDTH = 4, 2, 6
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "softcap, window, sinks", [(None, None, False), (2.0, None, False), (None, 4, False), (None, 2, True)]
)
def test_each_row_attends_to_its_prompt_and_to_itself(
    case: str, softcap: float | None, window: int | None, sinks: bool
) -> None:
    slots, prompt_lengths, lengths = CASES[case]
    torch.manual_seed(0)
    double = torch.float64
    options = Options(0.3, window, softcap, torch.randn(HEADS, dtype=double) if sinks else None)
    rows, reach = len(slots), max(lengths) + 1
    stores = Stores(Store(), Store())
    like = torch.zeros(1, KV_HEADS, 1, WIDTH, dtype=double)
    stores.prompts.reserve(len(prompt_lengths) + 1, max(prompt_lengths) + 2)
    stores.outputs.reserve(rows + 2, reach + 3)
    for store in stores:
        for tensor in store.at(0, like, like):
            tensor.normal_()
    query = torch.randn(rows, HEADS, 1, WIDTH, dtype=double)
    key, value = (torch.randn(rows, KV_HEADS, 1, WIDTH, dtype=double) for _ in range(2))
    fold = Fold.of(slots, len(prompt_lengths), torch.device("cpu"))
    prompts = Prompts(torch.tensor(prompt_lengths), max(prompt_lengths), len(set(prompt_lengths)) > 1)
    outputs = Outputs(torch.tensor(lengths), reach, len(set(lengths)) > 1)

    found = Step(stores, fold, prompts, outputs).attend(0, query, key, value, options)

    seen = [store.layers[0] for store in stores]
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        assert torch.equal(seen[1][0][row, :, length], key[row, :, 0])
        keys, values = (
            torch.cat([prompt[slot, :, : prompt_lengths[slot]], own[row, :, : length + 1]], 1).transpose(0, 1)
            for prompt, own in zip(*seen, strict=True)
        )
        torch.testing.assert_close(found[row, 0], by_hand(query[row, :, 0], keys, values, options))


@pytest.mark.parametrize("case", CASES)
def test_folding_rows_and_spreading_them_gives_them_back(case: str) -> None:
    slots, prompt_lengths, _ = CASES[case]
    fold = Fold.of(slots, len(prompt_lengths), torch.device("cpu"))
    rows = torch.randn(len(slots), KV_HEADS, 2, 3)
    assert torch.equal(fold.spread(fold.gather(rows)), rows)
    assert fold.even == (slots == [0, 0, 0, 1, 1, 1])
    assert fold.slot_R.tolist() == slots
