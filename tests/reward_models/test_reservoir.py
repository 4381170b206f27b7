"""Which of an iteration's groups its reward-model round gets to see."""

from __future__ import annotations

import pytest

from groupwise.errors import DataError
from groupwise.reward_models.reservoir import RoundSamples, distinct
from groupwise.types import Completion, Group, GroupKey, Prompt, Score, ScoredGroup

PROMPTS = {str(i): Prompt(str(i), f"question {i}", (2, 3), {"answer": object()}) for i in range(3)}


def groups(step: int, n: int = 4) -> list[ScoredGroup]:
    """Groups of two outputs; the second was cut and is not scored."""
    found = []
    for slot in range(n):
        key = GroupKey(step, slot, str(slot % 3))
        outputs = (
            Completion((5, 6), f"a{step}", (-0.5, -0.25), "stop", ((step, 2),)),
            Completion((7,), "b", (-1.0,), "length"),
        )
        found.append(ScoredGroup(Group(key, PROMPTS[key.prompt_id], outputs), (Score(1.0), Score(None))))
    return found


def keys(collected: RoundSamples) -> list[tuple[int, int]]:
    return [(one.group.key.step, one.group.key.slot) for one in collected.scored]


def filled(capacity: int, *steps: int, seed: int = 0) -> RoundSamples:
    made = RoundSamples(capacity, seed, PROMPTS)
    for step in steps:
        made.add(groups(step))
    return made


def test_all_are_kept_while_there_is_room() -> None:
    assert keys(filled(100, 1, 2)) == [(step, slot) for step in (1, 2) for slot in range(4)]


def test_of_equal_outputs_the_first_that_was_scored_is_kept() -> None:
    texts = ["ab", "b", "ab", "b", "a"]
    outputs = tuple(Completion(tuple(map(ord, text)), text, (-0.5,) * len(text), "stop") for text in texts)
    group = Group(GroupKey(1, 0, "0"), PROMPTS["0"], outputs)
    found = distinct(ScoredGroup(group, tuple(Score(float(i)) for i in range(5))))
    assert [c.text for c in found.group.completions] == ["ab", "b", "a"]
    assert found.rewards == [0.0, 1.0, 4.0]
    assert distinct(found) == found
    unscored = distinct(ScoredGroup(group, tuple(map(Score, (None, 1.0, 0.5, 0.0, None)))))
    assert [c.text for c in unscored.group.completions] == ["b", "ab", "a"], (
        "a copy that was scored stands for the other"
    )
    assert unscored.rewards == [1.0, 0.5, None]


def test_a_choice_is_bounded_seeded_and_the_same_in_any_order() -> None:
    chosen = keys(filled(5, 1, 2, 3))
    assert len(chosen) == 5
    assert chosen == sorted(chosen)
    assert chosen == keys(filled(5, 3, 1, 2)), "nothing is preferred for having come first"
    assert chosen != keys(filled(5, 1, 2, 3, seed=1))


def test_lines_bring_back_what_labels_are_made_from() -> None:
    before, after = filled(5, 1, 2, 3), RoundSamples(5, 0, PROMPTS)
    after.load(before.lines())
    assert after.scored == before.scored
    assert [one.rewards for one in after.scored] == [[1.0, None]] * 5
    assert all(one.group.prompt.row for one in after.scored), "the verifier finds its columns"
    before.add(groups(4))
    after.add(groups(4))
    assert after.scored == before.scored
    after.clear()
    assert not after.scored


def test_a_prompt_that_is_not_there_any_more_is_named() -> None:
    with pytest.raises(DataError, match="prompt 2, which the data set lacks"):
        RoundSamples(5, 0, {"0": PROMPTS["0"], "1": PROMPTS["1"]}).load(filled(100, 1).lines())
