"""The stores that decoding reads from: they grow without forgetting, and rows move without being overwritten."""

from __future__ import annotations

import weakref

import pytest
import torch

from groupwise.engines.native import shared_decoder
from groupwise.engines.native.shared_decoder import SharedDecoder
from groupwise.engines.native.stores import Shared, Store
from tests.engines.policies import make_policy, requests, sample


def filled(rows: int, length: int) -> Store:
    store = Store()
    store.reserve(rows, length)
    key, value = store.at(0, torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 5))
    key.copy_(torch.arange(key.numel()).view_as(key))
    value.fill_(7.0)
    return store


def test_a_store_is_made_in_the_shape_that_the_model_shows() -> None:
    key, value = filled(4, 6).layers[0]
    assert (key.shape, value.shape) == ((4, 2, 6, 3), (4, 2, 6, 5))


@pytest.mark.parametrize("rows, length", [(4, 9), (7, 6), (7, 9)])
def test_a_store_grows_and_keeps_what_it_holds(rows: int, length: int) -> None:
    store = filled(4, 6)
    before = store.layers[0][0].clone()
    store.reserve(rows, length)
    key, value = store.layers[0]
    assert key.shape == (rows, 2, length, 3)
    assert torch.equal(key[:4, :, :6], before)
    assert key.sum() == before.sum(), "what is new is 0: a masked entry is multiplied by 0, and 0 * nan is nan"
    assert value.sum() == 7 * 4 * 2 * 6 * 5


def test_growing_holds_the_old_and_the_new_of_one_layer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.reserve(2, 4)
    for layer in range(3):
        store.at(layer, torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3))
    old = [weakref.ref(tensor) for layer in range(3) for tensor in store.layers[layer]]
    held: list[int] = []
    grown = store._grown
    monkeypatch.setattr(store, "_grown", lambda one: held.append(sum(ref() is not None for ref in old)) or grown(one))
    store.reserve(2, 8)
    assert held == [6, 6, 4, 4, 2, 2]


def test_a_store_that_is_large_enough_stays_where_it_is() -> None:
    store = filled(4, 6)
    key = store.layers[0][0]
    store.reserve(3, 2)
    assert store.layers[0][0] is key
    assert (store.rows, store.length) == (4, 6)


def test_an_entry_moves_in_keys_and_values() -> None:
    store = filled(4, 6)
    key, value = store.layers[0]
    value[3] = 9.0
    store.move([1], [3])
    assert torch.equal(key[1], key[3])
    assert (value[1] == 9.0).all()
    assert (value[0] == 7.0).all()


def test_entries_that_no_row_uses_stand_behind_those_that_are_used() -> None:
    shared = Shared()
    shared.add("abcde", [1, 2, 3, 4, 5])
    like = torch.zeros(1, 2, 1, 3)
    for tensor in shared.store.at(0, like, like):
        tensor.copy_(torch.arange(5.0)[:, None, None, None].expand_as(tensor))
    level = shared.level(["d", "b", None, "d"], [4, 1, 0, 2], torch.device("cpu"))
    assert set(shared.names[:2]) == {"b", "d"}
    assert [shared.lengths[shared.names.index(name)] for name in "abcde"] == [1, 2, 3, 4, 5]
    for tensor in shared.store.layers[0]:
        assert [tensor[shared.names.index(name), 0, 0, 0].item() for name in "abcde"] == [0, 1, 2, 3, 4]
    assert len(level.fold.row_QM) == 2
    assert [tensor.shape[0] for tensor in level.stored(0)] == [2, 2]
    slots = (level.fold.place_R // level.fold.row_QM.shape[1]).tolist()
    assert [shared.names[slots[row]] for row in (0, 1, 3)] == ["d", "b", "d"]
    assert (level.reach, level.ragged, level.seen_R.tolist()) == (4, True, [4, 1, 0, 2])


def rooms(decoder: SharedDecoder, steps: int) -> list[int]:
    """How many tokens of an output have room, after each of so many steps of two rows."""
    found = []
    for _ in range(steps):
        decoder.step(torch.tensor([3, 4]))
        found.append(decoder.outputs.layers[0][0].shape[2])
    return found


def test_room_for_outputs_doubles_as_they_grow_up_to_the_longest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = SharedDecoder(make_policy())
    with torch.inference_mode():
        decoder.begin([("a", (3, 4)), ("b", (5,))])
        decoder.attach(["a", "b"], 4096)
        assert rooms(decoder, 2) == [64, 64]
        monkeypatch.setattr(shared_decoder, "_FIRST_LENGTH", 4)
        decoder = SharedDecoder(decoder.policy)
        decoder.begin([("a", (3, 4)), ("b", (5,))])
        decoder.attach(["a"], 3)
        assert decoder.outputs.length == 3
        decoder.attach(["b"], 13)
        assert rooms(decoder, 13) == [4] * 4 + [8] * 4 + [13] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_live", [5, 64])
def test_not_a_bit_depends_on_how_much_room_there_is(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, max_live: int
) -> None:
    policy, asked = make_policy(dtype=dtype), requests(n=4, max_tokens=23)
    expected = sample(policy, asked, max_live=max_live)
    assert max(len(completion.token_ids) for group in expected for completion in group) == 23
    for first in (1, 3):
        monkeypatch.setattr(shared_decoder, "_FIRST_LENGTH", first)
        assert sample(policy, asked, max_live=max_live) == expected


def test_rows_that_would_overwrite_each_other_are_refused() -> None:
    decoder = SharedDecoder(make_policy())
    with torch.inference_mode():
        decoder.begin([("a", (3, 4))])
        decoder.attach(["a"] * 4, 5)
        decoder.keep([0, 3, 2])
        assert decoder.row_uid == ["a"] * 3
        with pytest.raises(AssertionError, match="overwritten"):
            decoder.keep([1, 0])


def test_a_forgotten_prompt_leaves_its_place_to_the_last() -> None:
    decoder = SharedDecoder(make_policy())
    with torch.inference_mode():
        decoder.begin([("a", (3, 4)), ("b", (5, 6, 7)), ("c", (8,))])
        expected = decoder.attach(["c"], 5)
        decoder.end("a")
        assert (decoder.prompts.names, decoder.prompts.lengths) == (["c", "b"], [1, 3])
        assert torch.equal(decoder.attach(["c"], 5)[0], expected[0])
        decoder.end("b")
        (prompts,) = decoder._looked_at(torch.device("cpu"))
        assert (prompts.reach, prompts.ragged) == (1, False)
