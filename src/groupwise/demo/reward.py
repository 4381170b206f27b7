"""Scores for the built-in questions: the final answer, and each line by itself."""

from __future__ import annotations

from typing import Any


def score(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1.0 where the last line is the answer and nothing else, otherwise 0.0. The lines before it do not count."""
    return [float(text.rpartition("\n")[2] == right) for text, right in zip(completions, answer, strict=True)]


def score_steps(prompts: list[str], steps: list[list[str]], **columns: Any) -> list[list[float]]:
    """1.0 for each step that is a right line, otherwise 0.0: the steps are lines, each with the break that ends it.

    A break at the end of the last line is one too many, as in `score`.
    """
    return [_step_rewards(prompt, of_output) for prompt, of_output in zip(prompts, steps, strict=True)]


def check_steps(prompt: str, completion: str) -> list[tuple[str, bool]]:
    """Each line of a completion, and whether it is right.

    The first line must add the question's first two numbers, the second the first line's result and the third
    number, the last repeat the second line's result. A line is judged by what stands before it: a mistake is
    counted where it is made, not again where it is carried on.
    """
    return _judged(prompt, completion.split("\n"))


def _step_rewards(prompt: str, steps: list[str]) -> list[float]:
    lines = [step.removesuffix("\n") for step in steps[:-1]] + steps[-1:]
    return [float(right) for _, right in _judged(prompt, lines)]


def _judged(prompt: str, lines: list[str]) -> list[tuple[str, bool]]:
    before, *addends = prompt.removesuffix("=\n").split("+")
    checked = []
    for index, line in enumerate(lines):
        if index < len(addends):
            right = before.isdecimal() and line == _sum_line(before, addends[index])
            before = line.rpartition("=")[2]
        else:
            right = index == len(addends) and line == before
        checked.append((line, right))
    return checked


def _sum_line(a: str, b: str) -> str:
    return f"{a}+{b}={int(a) + int(b)}"
