"""From scored groups to flat tensors, and the plan of updates and forward passes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.learn import pack as pack_module
from groupwise.learn.pack import Batch, Credit, Output, micro_batches, pack, split_updates
from groupwise.types import ScoredGroup
from tests.learn.tiny import completion, scored_group

LONG, CUT = completion([2, 3, 1], [-1.0, -2.0, -3.0]), completion([4, 4], [-0.5, -0.25], "length")
TWO_GROUPS = [
    scored_group([5, 6], [LONG, CUT], [1, 0]),
    scored_group([7], [completion([1], [-4.0])], [None], slot=1),
]


def packed(
    groups: Sequence[ScoredGroup] = TWO_GROUPS, credit: Credit = ((0.5, (0.0, -1.0)), (0.0,)), mask: bool = False
) -> Batch:
    return pack(groups, credit, temperature=0.7, mask_truncated=mask)


def test_outputs_lie_end_to_end_in_group_order() -> None:
    batch = packed()
    assert [(o.group, o.prompt, o.token_ids, o.start) for o in batch.outputs] == [
        (0, (5, 6), (2, 3, 1), 0),
        (0, (5, 6), (4, 4), 3),
        (1, (7,), (1,), 5),
    ]
    assert batch.completion_T.tolist() == [0, 0, 0, 1, 1, 2]
    assert batch.group_S.tolist() == [0, 0, 1]
    assert batch.advantages_T.tolist() == [0.5, 0.5, 0.5, 0.0, -1.0, 0.0]
    assert batch.sampled_logprobs_T.tolist() == [-1.0, -2.0, -3.0, -0.5, -0.25, -4.0]
    assert batch.temperature == 0.7
    assert batch.old_logprobs_T is None
    assert batch.ref_logprobs_T is None


def test_an_output_is_silent_when_all_of_its_advantages_are_0() -> None:
    assert packed().zero_advantage_S == (False, False, True)
    assert packed(credit=((0.0, (0.0, 0.0)), (1e-30,))).zero_advantage_S == (True, True, False)
    assert packed(credit=((0.0, (0.0, 1e-30)), (0.0,))).zero_advantage_S == (True, False, True), "one token is enough"


def test_outputs_cut_by_the_length_limit_are_left_out_when_asked() -> None:
    assert packed().trained_T.all()
    assert packed().trained_S == (True, True, True)
    masked = packed(mask=True)
    assert masked.trained_T.tolist() == [True, True, True, False, False, True]
    assert masked.trained_S == (True, False, True)
    assert masked.advantages_T.tolist() == packed().advantages_T.tolist()


def test_whole_numbers_are_advantages_too() -> None:
    assert packed(credit=((1, (0, -1)), (0,))).advantages_T.tolist() == [1, 1, 1, 0, -1, 0]


def test_the_data_type_is_that_of_the_policys_log_probs() -> None:
    third = pack(TWO_GROUPS, ((1 / 3, 0.0), (0.0,)), temperature=1.0, mask_truncated=False, dtype=torch.float64)
    assert third.advantages_T[0].item() == 1 / 3
    assert third.sampled_logprobs_T.dtype == torch.float64
    assert packed().advantages_T.dtype == packed().sampled_logprobs_T.dtype == torch.float32


@pytest.mark.parametrize("credit", [((0.5, (0.0,)), (0.0,)), ((0.5, (0.0, 0.0, 1.0)), (0.0,))])
def test_advantages_that_are_not_one_per_token_are_refused(credit: Credit) -> None:
    with pytest.raises(AssertionError):
        packed(credit=credit)


@pytest.mark.parametrize("credit", [((0.5, 0.5),), ((0.5,), (0.5,))])
def test_advantages_of_other_outputs_are_refused(credit: Credit) -> None:
    with pytest.raises(ValueError, match="zip"):
        packed(credit=credit)


def test_an_output_without_tokens_is_not_trained_and_moves_nothing() -> None:
    groups = [scored_group([5], [completion([2, 3]), completion([], finish="aborted"), completion([1])], [1, None, 0])]
    batch = packed(groups, ((1.0, 0.0, 2.0),))
    assert batch.completion_T.tolist() == [0, 0, 2]
    assert batch.trained_S == (True, False, True)
    assert batch.advantages_T.tolist() == [1.0, 1.0, 2.0]
    assert sorted(m for part in micro_batches(batch.outputs, range(3), 1, True) for m in part) == [0, 2]


def test_a_step_without_groups_has_tensors_of_the_right_types() -> None:
    batch = packed([], ())
    assert batch.completion_T.dtype == batch.group_S.dtype == torch.long
    assert batch.trained_T.dtype == torch.bool
    assert len(batch.advantages_T) == 0


def test_updates_share_out_whole_groups_evenly() -> None:
    groups = [3, 5, 8, 13, 21, 34, 55]
    shares = split_updates(groups, 3, seed=7)
    assert sorted(map(len, shares)) == [2, 2, 3]
    assert sorted(group for share in shares for group in share) == groups


def test_the_seed_decides_who_shares_an_update() -> None:
    groups = range(12)
    assert split_updates(groups, 4, seed=7) == split_updates(groups, 4, seed=7)
    assert len({str(split_updates(groups, 4, seed=seed)) for seed in range(10)}) == 10
    assert split_updates(groups, 1, seed=7) == [list(groups)]


@st.composite
def outputs_of_groups(draw: st.DrawFn) -> list[Output]:
    outputs: list[Output] = []
    for group in range(draw(st.integers(0, 5))):
        prompt = (0,) * draw(st.integers(1, 8))
        for length in draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)):
            start = sum(len(output.token_ids) for output in outputs)
            outputs.append(Output(group, prompt, (0,) * length, start))
    return outputs


def tokens(outputs: Sequence[Output], part: Sequence[int], shared: bool) -> int:
    """What the layers see of a forward pass."""
    if not part:
        return 0
    if not shared:
        return len(part) * max(len(outputs[m].prompt) + len(outputs[m].token_ids) for m in part)
    prompts = {outputs[m].group: len(outputs[m].prompt) for m in part}
    return sum(prompts.values()) + sum(len(outputs[m].token_ids) for m in part)


@settings(deadline=None, max_examples=200)
@given(outputs=outputs_of_groups(), budget=st.integers(1, 60), shared=st.booleans(), data=st.data())
def test_micro_batches(outputs: list[Output], budget: int, shared: bool, data: st.DataObject) -> None:
    members = data.draw(st.lists(st.sampled_from(range(len(outputs))), unique=True)) if outputs else []
    parts = micro_batches(outputs, members, budget, shared)
    assert sorted(m for part in parts for m in part) == sorted(members), "nothing lost, nothing twice"
    assert all(parts), "no empty pass"
    for part in parts:
        assert tokens(outputs, part, shared) <= budget or len(part) == 1
    groups: dict[int, list[int]] = {}
    for member in members:
        groups.setdefault(outputs[member].group, []).append(member)
    for group in groups.values():
        homes = [part for part in parts if set(part) & set(group)]
        assert len(homes) == 1 or tokens(outputs, group, shared) > budget, "split though it fits"
    order = list(dict.fromkeys(outputs[m].group for part in parts for m in part))
    sizes = [tokens(outputs, groups[group], shared) for group in order]
    assert sizes == sorted(sizes, reverse=True), "the longest group first"
    assert micro_batches(outputs, members, budget, shared) == parts


def test_a_group_that_does_not_fit_leaves_room_for_the_next() -> None:
    outputs = [Output(0, (0,) * 4, (0,) * 5, 5 * i) for i in range(3)] + [Output(1, (0,), (0,), 15)]
    assert micro_batches(outputs, range(4), 14, shared=True) == [[0, 1], [2, 3]]
    assert micro_batches(outputs, range(4), 100, shared=True) == [[0, 1, 2, 3]]
    assert micro_batches(outputs, range(4), 18, shared=False) == [[0, 1], [2, 3]]
    assert micro_batches(outputs, range(4), 17, shared=False) == [[0], [1], [2], [3]], "a short row is padded"


def test_the_plan_for_many_outputs_takes_work_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    plus = pack_module._Size.plus

    def counted(size: pack_module._Size, output: Output) -> pack_module._Size:
        nonlocal calls
        calls += 1
        return plus(size, output)

    monkeypatch.setattr(pack_module._Size, "plus", counted)
    outputs = [Output(i // 8, (0,) * 4, (0,) * 4, 4 * i) for i in range(1024)]
    micro_batches(outputs, range(1024), 16384, shared=True)
    assert calls <= 4 * 1024
