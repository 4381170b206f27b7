"""The replay store: a share of each round's mixture, drawn anew, from a bounded and seeded choice of what there was."""

from __future__ import annotations

from collections import Counter

import pytest

from groupwise.reward_models.replay import ReplayStore


def rows(round_number: int, n: int) -> list[dict[str, str]]:
    return [{"text": f"{round_number}/{i}\u2028\ud800"} for i in range(n)]


def store(*counts: int, capacity: int = 1000, seed: int = 0) -> ReplayStore:
    """With so many examples of round 0, 1, .."""
    made = ReplayStore(capacity, seed)
    for number, n in enumerate(counts):
        made.add(rows(number, n), number)
    return made


@pytest.mark.parametrize(
    "new, fraction, held, expected",
    [
        (90, 0.1, 1000, 10),  # 10 of 100 are a tenth
        (50, 0.5, 1000, 50),
        (30, 0.75, 1000, 90),
        (90, 0.1, 4, 4),  # all there are
        (90, 0.0, 1000, 0),
        (4, 0.1, 1000, 0),  # 0.44 of an example
        (5, 0.1, 1000, 1),  # 0.56
        (0, 0.1, 1000, 0),
    ],
)
def test_old_examples_are_a_share_of_the_mixture(new: int, fraction: float, held: int, expected: int) -> None:
    assert len(store(held).draw(new, fraction, 1)) == expected


def test_a_round_draws_without_repetition_in_order_and_the_same_again() -> None:
    found = store(40, 40).draw(90, 0.1, 2)
    assert found == store(40, 40).draw(90, 0.1, 2)
    texts = [row["text"] for row in found]
    assert len(set(texts)) == 10
    everything = [row["text"] for number in (0, 1) for row in rows(number, 40)]
    assert texts == [text for text in everything if text in texts]
    assert found != store(40, 40).draw(90, 0.1, 3), "the next round draws anew"
    assert found != store(40, 40, seed=1).draw(90, 0.1, 2)


def test_it_is_bounded_and_every_example_is_kept_with_the_same_chance() -> None:
    """Also the early ones: what was dropped and what was kept does not depend on when it came."""
    kept: Counter[str] = Counter()
    for seed in range(200):
        small = store(20, 20, 20, capacity=15, seed=seed)
        assert len(small) == 15
        kept.update(row["text"].split("/")[0] for row in small.draw(10**6, 0.5, 9))
    # A hypergeometric draw: 5 of each round on average, variance 15 / 60 * 20 * (40 / 60) * (45 / 59) = 2.54.
    assert all(abs(n - 1000) < 4 * (200 * 2.54) ** 0.5 for n in kept.values()), kept


def test_what_is_kept_does_not_depend_on_how_rounds_are_cut_up_in_time() -> None:
    """A bound that is met late leaves the same choice as one that is met in every round."""
    late = store(20, 20, 20, capacity=60)
    late.capacity = 15
    late.add([], 3)
    assert late.lines() == store(20, 20, 20, capacity=15).lines()


def test_lines_bring_it_back() -> None:
    before, after = store(5, 7), ReplayStore(1000, 0)
    text = "".join(f"{line}\n" for line in before.lines())
    after.load(text.splitlines())  # a separator that is part of a text does not end its line
    assert after.lines() == before.lines()
    assert after.draw(50, 0.1, 2) == before.draw(50, 0.1, 2)
