"""Forests against the definition of their parents, streams against the shift by one, levels against a dense mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupwise.models.attention import LAYOUT_KEYWORD, ForestAttention
from groupwise.models.layout import Forest, Stream, build_forest, plain_stream, shared_stream
from tests.tiny_models import GROUPS, KEYS, Groups, exact_model, gradients, largest_difference, policy_of

# A prompt with two outputs; the first has two continuations, one of them continued again; another root with an output.
LENGTHS = [5, 3, 4, 2, 6, 1, 3, 2]
PARENTS = [-1, 0, 0, 1, 1, 4, -1, 6]


@st.composite
def forests(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    count = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    return lengths, [draw(st.integers(-1, i - 1)) for i in range(count)]


@st.composite
def grouped(draw: st.DrawFn) -> Groups:
    tokens = st.lists(st.integers(1, 31), min_size=1, max_size=5)
    return draw(st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=3)), min_size=1, max_size=3))


def by_definition(lengths: list[int], parents: list[int]) -> tuple[Tensor, Tensor]:
    """Positions `[N]`, and which token sees which `[N, N]`: ancestors, its own segment's past, and itself."""
    segment = [i for i, length in enumerate(lengths) for _ in range(length)]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    before = [0] * len(lengths)
    ancestors: list[set[int]] = [set() for _ in lengths]
    for i, parent in enumerate(parents):
        if parent >= 0:
            ancestors[i] = ancestors[parent] | {parent}
            before[i] = before[parent] + lengths[parent]
    total = sum(lengths)
    visible = torch.zeros(total, total, dtype=torch.bool)
    for q in range(total):
        for k in range(total):
            visible[q, k] = segment[k] in ancestors[segment[q]] or (segment[k] == segment[q] and k <= q)
    return torch.tensor([before[s] + n - starts[s] for n, s in enumerate(segment)]), visible


def by_levels(forest: Forest, window: int | None = None) -> Tensor:
    """Which token sees which `[N, N]`, read out of the rows that attention works on; no token may be seen twice."""
    total = len(forest.position_N)
    row_of = torch.full((total,), -1)
    seen: list[Tensor] = []
    for level in forest.levels:
        rows, length = level.query_RL.shape
        mask = level.mask(window)
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, length, length)
        for row in range(rows):
            seen += [level.key_RK[row][mask[row, 0, column]] for column in range(length)]
    found = torch.zeros(total, total, dtype=torch.bool)
    for n, place in enumerate(forest.gather_N.tolist()):
        assert len(set(seen[place].tolist())) == len(seen[place])
        found[n, seen[place]] = True
        row_of[n] = place
    assert len(set(row_of.tolist())) == total
    return found


@given(forests())
@settings(max_examples=60, deadline=None)
def test_a_token_sees_its_ancestors_and_its_own_past(forest: tuple[list[int], list[int]]) -> None:
    lengths, parents = forest
    built = build_forest(lengths, parents)
    position_N, visible = by_definition(lengths, parents)
    assert built.position_N.tolist() == position_N.tolist()
    assert torch.equal(by_levels(built), visible)


@given(forests(), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_windows_count_positions_along_the_branch(forest: tuple[list[int], list[int]], window: int) -> None:
    lengths, parents = forest
    position_N, visible = by_definition(lengths, parents)
    near = position_N[:, None] - position_N[None, :] < window
    assert torch.equal(by_levels(build_forest(lengths, parents), window), visible & near)


def test_positions_go_on_from_the_parent_on_every_branch() -> None:
    positions = build_forest(LENGTHS, PARENTS).position_N.split(LENGTHS)
    assert [p.tolist() for p in positions] == [
        [0, 1, 2, 3, 4], [5, 6, 7], [5, 6, 7, 8], [8, 9], [8, 9, 10, 11, 12, 13], [14], [0, 1, 2], [3, 4],
    ]  # fmt: skip


def test_each_depth_is_one_level() -> None:
    shapes = [tuple(level.query_RL.shape) for level in build_forest(LENGTHS, PARENTS).levels]
    assert shapes == [(2, 5), (3, 4), (2, 6), (1, 1)]


def test_roots_alone_need_no_mask_unless_a_window_is_shorter() -> None:
    (level,) = build_forest([4, 3], [-1, -1]).levels
    assert level.mask(None) is None
    assert level.mask(4) is None
    assert level.mask(3) is not None
    assert level.mask(3) is level.mask(3)


@pytest.mark.parametrize("kind", KEYS)
def test_a_forest_of_several_levels_equals_a_dense_mask_on_stock_attention(kind: str) -> None:
    model = exact_model(kind)
    ids = torch.randint(0, 32, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    position_N, visible = by_definition(LENGTHS, PARENTS)
    dense = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, float("-inf"))
    common = {"input_ids": ids, "position_ids": position_N[None], "use_cache": False}
    expected = model(**common, attention_mask=dense[None, None]).logits
    shared = policy_of(model, "shared").model
    attention = ForestAttention(build_forest(LENGTHS, PARENTS))
    found = shared(**common, attention_mask=None, **{LAYOUT_KEYWORD: attention}).logits
    assert attention.calls == [0, 1]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    left, right = (gradients(m, x.flatten()) for m, x in ((shared, found), (model, expected)))
    assert largest_difference(left, right) < 1e-10


# --- streams ----------------------------------------------------------------------------------------------------------


def histories(stream: Stream) -> list[tuple[list[int], int]]:
    """Per output token: all that the hidden state which predicts it has seen, in order, and the token."""
    flat = stream.input_ids.flatten()
    if stream.forest is not None:
        sees = by_levels(stream.forest)
        order = stream.position_ids[0]
        seen = [flat[sees[p]][order[sees[p]].argsort()].tolist() for p in stream.predictor_T.tolist()]
    else:
        width = stream.input_ids.shape[1]
        seen = [flat[p - p % width : p + 1].tolist() for p in stream.predictor_T.tolist()]
    return list(zip(seen, stream.target_T.tolist(), strict=True))


@given(grouped())
@settings(max_examples=40, deadline=None)
def test_each_output_token_is_predicted_from_its_prompt_and_what_came_before_it(groups: Groups) -> None:
    expected = [
        ([*prompt, *output[:t]], token)
        for prompt, outputs in groups
        for output in outputs
        for t, token in enumerate(output)
    ]
    assert histories(shared_stream(groups)) == expected
    assert histories(plain_stream(groups)) == expected


def test_a_shared_stream_holds_each_prompt_once_and_no_last_token() -> None:
    stream = shared_stream([((1, 2, 3), [(4, 5, 6), (7,)]), ((8,), [(9, 10)])])
    assert stream.input_ids.tolist() == [[1, 2, 3, 4, 5, 8, 9]]
    assert stream.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert stream.attention_mask is None
    assert (stream.predictor_T.tolist(), stream.target_T.tolist()) == ([2, 3, 4, 2, 5, 6], [4, 5, 6, 7, 9, 10])
    assert stream.tokens == 7


def test_a_plain_stream_pads_on_the_right_and_says_so() -> None:
    stream = plain_stream([((1, 2, 3), [(4, 5, 6), (7,)]), ((8,), [(9, 10)])])
    assert stream.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0], [8, 9, 0, 0, 0]]
    assert stream.attention_mask is not None
    assert stream.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert stream.predictor_T.tolist() == [2, 3, 4, 7, 10, 11]
    assert stream.tokens == 15


def test_rows_of_one_length_need_no_padding_mask() -> None:
    assert plain_stream([((1, 2), [(3, 4), (5, 6)])]).attention_mask is None


def test_outputs_of_one_token_need_nothing_but_their_prompt() -> None:
    stream = shared_stream([((1, 2), [(3,), (4,)])])
    assert stream.input_ids.tolist() == [[1, 2]]
    assert stream.predictor_T.tolist() == [1, 1]


def test_both_streams_of_the_same_groups_have_the_same_targets() -> None:
    assert shared_stream(GROUPS).target_T.tolist() == plain_stream(GROUPS).target_T.tolist()
