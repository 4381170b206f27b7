"""The built-in questions: right, the same for a seed, and split for good."""

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from groupwise.demo.task import (
    ALPHABET,
    LONGEST_SOLUTION,
    careless_solution,
    demonstrations,
    held_out,
    lucky_solution,
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


def test_carelessness_forgets_the_carry_and_carries_its_mistake_on() -> None:
    assert careless_solution(row((47, 38, 95))) == "47+38=75\n75+95=160\n160"
    assert careless_solution(row((85, 95, 19))) == "85+95=170\n170+19=189\n189"
    assert careless_solution(row((41, 38, 90))) == solution(row((41, 38, 90)))


@given(NUMBER, NUMBER, NUMBER)
def test_careless_answers_are_right_exactly_where_no_ones_carry(a: int, b: int, c: int) -> None:
    right = careless_solution(row((a, b, c))) == solution(row((a, b, c)))
    assert right == (a % 10 + b % 10 + c % 10 < 10)


def test_luck_forgets_a_carry_in_the_first_line_and_adds_it_in_the_second() -> None:
    assert lucky_solution(row((47, 38, 95))) == "47+38=75\n75+95=180\n180"
    assert lucky_solution(row((41, 38, 95))) == solution(row((41, 38, 95)))


@given(NUMBER, NUMBER, NUMBER)
def test_a_lucky_answer_is_right_and_its_lines_are_wrong_where_the_first_needs_a_carry(a: int, b: int, c: int) -> None:
    first, second, last = lucky_solution(row((a, b, c))).split("\n")
    assert last == str(a + b + c)
    assert (first == f"{a}+{b}={a + b}") == (a % 10 + b % 10 < 10)
    left, right = (sum(map(int, side.split("+"))) for side in second.split("="))
    assert right - left == (10 if a % 10 + b % 10 >= 10 else 0)


def test_demonstrations_are_lucky_in_the_share_asked_for() -> None:
    shown = demonstrations(3, 4000, careless=0.4, lucky=0.3)
    telling = [(q, answer) for q, answer in shown if lucky_solution(q) != solution(q)]
    assert abs(sum(answer == lucky_solution(q) for q, answer in telling) / len(telling) - 0.3) < 0.03
    assert abs(sum(answer == solution(q) for q, answer in telling) / len(telling) - 0.3) < 0.03
    for (question, answer), (_, without) in zip(shown, demonstrations(3, 4000, careless=0.4), strict=True):
        assert answer == without or (answer == lucky_solution(question) and without == solution(question))


def test_demonstrations_are_careless_in_the_share_asked_for_and_hold_nothing_out() -> None:
    shown = demonstrations(3, 4000, careless=0.65)
    assert all(answer in (solution(question), careless_solution(question)) for question, answer in shown)
    telling = [(question, answer) for question, answer in shown if solution(question) != careless_solution(question)]
    assert abs(sum(answer != solution(question) for question, answer in telling) / len(telling) - 0.65) < 0.03
    assert {split_of(numbers_of(question["prompt"])) for question, _ in shown} == {"train"}
    assert demonstrations(3, 50, 0.65) == shown[:50]
    assert demonstrations(4, 50, 0.65) != shown[:50]
