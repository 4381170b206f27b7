"""The built-in questions: right, the same for a seed, and split for good."""

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from groupwise.data.arithmetic import (
    ALPHABET,
    LONGEST_SOLUTION,
    held_out,
    numbers_of,
    questions,
    row,
    solution,
    split_of,
)

NUMBER = st.integers(10, 99)


def test_a_question_and_its_solution_read_as_documented() -> None:
    question = row((47, 38, 95))
    assert question == {"prompt": "47+38+95=\n", "answer": "180"}
    assert solution(question) == "47+38=85\n85+95=180\n180"


@given(NUMBER, NUMBER, NUMBER)
def test_every_line_of_a_solution_holds(a: int, b: int, c: int) -> None:
    question = row((a, b, c))
    first, second, last = solution(question).split("\n")
    assert numbers_of(question["prompt"]) == (a, b, c)
    assert (first, second) == (f"{a}+{b}={a + b}", f"{a + b}+{c}={a + b + c}")
    assert last == question["answer"] == str(a + b + c)
    assert set(question["prompt"] + solution(question)) <= set(ALPHABET)
    assert len(solution(question)) < LONGEST_SOLUTION


@given(NUMBER, NUMBER, NUMBER)
def test_the_order_of_the_numbers_does_not_change_the_split(a: int, b: int, c: int) -> None:
    assert len({split_of((x, y, z)) for x, y, z in permutations((a, b, c))}) == 1


def test_no_held_out_question_is_trained_on_in_any_order() -> None:
    known = {tuple(sorted(numbers_of(question["prompt"]))) for question in held_out()}
    for seed in range(3):
        assert not known & {tuple(sorted(numbers_of(q["prompt"]))) for q in questions("train", seed, 5000)}


def test_a_seed_decides_the_questions() -> None:
    assert questions("train", 1, 50) == questions("train", 1, 200)[:50]
    assert questions("train", 1, 50) != questions("train", 2, 50)


def test_questions_do_not_repeat_and_use_the_whole_range() -> None:
    drawn = questions("train", 0, 3000)
    assert len({question["prompt"] for question in drawn}) == 3000
    assert {number for question in drawn for number in numbers_of(question["prompt"])} == set(range(10, 100))


def test_the_held_out_questions_are_frozen() -> None:
    assert [question["prompt"] for question in held_out(3)] == ["42+78+87=\n", "80+11+21=\n", "94+43+70=\n"]
    assert len(held_out()) == 512
