"""The order of prompts is a function of seed, epoch and position."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.data.stream import PromptStream
from groupwise.errors import DataError
from groupwise.types import Prompt


def prompts(n: int) -> list[Prompt]:
    return [Prompt(str(i), f"{i}+1=", (i, 10)) for i in range(n)]


def ids(stream: PromptStream, n: int) -> list[int]:
    return [int(prompt.prompt_id) for prompt in stream.take(n)]


def test_the_order_is_pinned() -> None:
    assert ids(PromptStream(prompts(6), seed=0, shuffle=True), 12) == [4, 5, 1, 0, 3, 2, 5, 4, 0, 3, 2, 1]


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    assert ids(PromptStream(prompts(3), seed=0, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_every_epoch_holds_each_prompt_once_in_an_order_of_its_own() -> None:
    stream = PromptStream(prompts(20), seed=3, shuffle=True)
    epochs = [ids(stream, 20) for _ in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert ids(PromptStream(prompts(20), seed=4, shuffle=True), 20) not in epochs


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), max_size=8), st.booleans())
def test_the_sizes_of_batches_change_nothing(sizes: list[int], shuffle: bool) -> None:
    stream = PromptStream(prompts(5), seed=1, shuffle=shuffle)
    taken = [i for size in sizes for i in ids(stream, size)]
    assert taken == ids(PromptStream(prompts(5), seed=1, shuffle=shuffle), sum(sizes))
    assert stream.position == sum(sizes)


@settings(deadline=None)
@given(st.integers(0, 17), st.integers(0, 17))
def test_a_resumed_stream_goes_on_as_if_it_had_never_stopped(before: int, after: int) -> None:
    stream = PromptStream(prompts(7), seed=2, shuffle=True)
    stream.take(before)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(prompts(7), seed=2, shuffle=True)
    resumed.take(3)  # whatever it did before
    resumed.load_state_dict(state)
    assert ids(resumed, after) == ids(stream, after)


def test_the_epoch_counts_fractions() -> None:
    stream = PromptStream(prompts(4), seed=0, shuffle=True)
    stream.take(6)
    assert stream.epoch == 1.5


def test_a_batch_longer_than_the_data_repeats_prompts() -> None:
    taken = ids(PromptStream(prompts(2), seed=0, shuffle=True), 5)
    assert sorted(taken[:4]) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "other",
    [
        prompts(4),
        prompts(3)[::-1],
        [*prompts(2), replace(prompts(3)[2], token_ids=(2, 11))],
        [*prompts(2), replace(prompts(3)[2], prompt_id="9")],
    ],
    ids=["more", "another order", "other tokens", "another row"],
)
def test_resuming_on_other_prompts_is_refused(other: list[Prompt]) -> None:
    state = PromptStream(prompts(3), seed=0, shuffle=True).state_dict()
    stream = PromptStream(other, seed=0, shuffle=True)
    with pytest.raises(DataError, match=rf"made on other prompts than these: 3 of them .* here are {len(other)} "):
        stream.load_state_dict(state)
    assert stream.position == 0


def test_no_prompts_are_an_error() -> None:
    with pytest.raises(DataError, match="no prompts"):
        PromptStream([], seed=0, shuffle=True)
