"""Labels and pairs that a verifier's scores make of groups."""

from __future__ import annotations

from groupwise.reward_models.examples import load_examples
from groupwise.reward_models.labels import VerifierLabels, VerifierPairs
from groupwise.reward_models.text import Graded, Preferred
from groupwise.types import Completion, Group, GroupKey, Prompt, Score, ScoredGroup


def verified(*rewards: float | None, cut: tuple[int, ...] = ()) -> ScoredGroup:
    """A group of outputs named by their numbers; those of `cut` met the length limit."""
    outputs = tuple(Completion((i,), str(i), (-1.0,), "length" if i in cut else "stop") for i in range(len(rewards)))
    group = Group(GroupKey(4, 2, "7"), Prompt("7", "2+2=", (2, 3)), outputs)
    return ScoredGroup(group, tuple(Score(reward) for reward in rewards))


def test_labels_are_ones_and_zeros_by_the_threshold() -> None:
    rows = VerifierLabels(0.5)([verified(0.5, None, 0.4, cut=(2,))])
    assert [(row["completion"], row["label"], row["finish"], row["outputs"]) for row in rows] == [
        ("0", 1.0, "stop", [0]),
        ("2", 0.0, "length", [2]),
    ]
    assert all(isinstance(example, Graded) for example in load_examples(rows, "outcome"))


def test_every_output_of_a_mixed_group_is_in_a_pair_of_right_and_wrong() -> None:
    [*rows] = VerifierPairs(1.0)([verified(1.0, 0.0, 0.0, None, 1.0, 0.0, 0.0)])
    pairs = [tuple(row["outputs"]) for row in rows]
    assert pairs == [(0, 1), (4, 2), (0, 5), (4, 6)]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(str(a), str(b)) for a, b in pairs]
    assert all((row["prompt"], row["prompt_id"], row["step"], row["slot"]) == ("2+2=", "7", 4, 2) for row in rows)


def test_groups_of_one_kind_make_no_pair() -> None:
    assert VerifierPairs(1.0)([verified(1.0, 1.0), verified(0.0, 0.5, None), verified(None, 1.0)]) == []


def test_pairs_are_read_as_preferences_that_know_what_was_cut() -> None:
    rows = VerifierPairs(1.0)([verified(1.0, 0.0, cut=(1,))])
    [example] = load_examples(rows, "outcome")
    assert isinstance(example, Preferred)
    assert example.chosen.finished
    assert not example.rejected.finished
