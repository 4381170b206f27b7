"""The built-in reward and the check of single lines."""

import pytest

from groupwise.demo.reward import check_steps, score, score_steps
from groupwise.demo.task import questions, solution

PROMPT = "47+38+95=\n"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("47+38=85\n85+95=180\n180", 1.0),
        ("47+38=84\n84+95=180\n180", 1.0),
        ("180", 1.0),
        ("47+38=85\n85+95=180\n181", 0.0),
        ("47+38=85\n85+95=180", 0.0),
        ("47+38=85\n85+95=180\n180\n", 0.0),
        ("47+38=85\n85+95=180\n0180", 0.0),
        ("47+38=85\n85+95=180\n180 ", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_last_line_counts_and_it_must_be_the_answer(completion: str, expected: float) -> None:
    assert score(completions=[completion], answer=["180"], prompts=[PROMPT]) == [expected]


def test_every_solution_earns_one_and_another_questions_answer_nothing() -> None:
    rows = questions("train", 0, 50)
    texts = [solution(row) for row in rows]
    assert score(completions=texts, answer=[row["answer"] for row in rows]) == [1.0] * 50
    assert score(completions=texts, answer=["0"] * 50) == [0.0] * 50


def test_as_many_answers_as_completions() -> None:
    with pytest.raises(ValueError, match="zip"):
        score(completions=["1", "2"], answer=["1"])


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("47+38=85\n85+95=180\n180", [True, True, True]),
        ("47+38=75\n75+95=170\n170", [False, True, True]),
        ("47+38=75\n85+95=180\n180", [False, False, True]),
        ("47+38=85\n85+95=180\n181", [True, True, False]),
        ("38+47=85\n85+95=180\n180", [False, True, True]),
        ("47+38=085\n85+95=180\n180", [False, False, True]),
        ("47+38=85\n85+95=180\n180\n180", [True, True, True, False]),
        ("180", [False]),
        ("nonsense\n85+95=180\n180", [False, False, True]),
        ("", [False]),
    ],
)
def test_a_line_is_judged_by_what_stands_before_it(completion: str, expected: list[bool]) -> None:
    checked = check_steps(PROMPT, completion)
    assert [right for _, right in checked] == expected
    assert "\n".join(line for line, _ in checked) == completion


def test_every_line_of_a_solution_is_right() -> None:
    for row in questions("train", 1, 50):
        assert all(right for _, right in check_steps(row["prompt"], solution(row)))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["47+38=85\n", "85+95=180\n", "180"], [1, 1, 1]),
        (["47+38=75\n", "75+95=170\n", "170"], [0, 1, 1]),
        (["47+38=85\n", "85+95=180\n", "180\n"], [1, 1, 0]),
        (["47+38=85\n", "85+95=180\n"], [1, 0]),
        (["47+38=85\n", "\n85+95=180\n", "180"], [1, 0, 1]),
        (["180"], [0]),
        (["\n"], [0]),
    ],
)
def test_steps_are_scored_as_lines_and_a_last_break_is_one_too_many(steps: list[str], expected: list[float]) -> None:
    assert score_steps(prompts=[PROMPT, PROMPT], steps=[steps, ["47+38=85"]]) == [expected, [1.0]]


def test_the_steps_of_a_solution_are_right_wherever_they_are_cut_at_line_breaks() -> None:
    for row in questions("train", 2, 50):
        steps = solution(row).splitlines(keepends=True)
        assert score_steps(prompts=[row["prompt"]], steps=[steps]) == [[1.0, 1.0, 1.0]]
