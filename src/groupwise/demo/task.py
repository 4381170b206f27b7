"""The built-in questions: sums of three two-digit numbers, answered line by line.

    prompt    "47+38+95=\\n"
    solution  "47+38=85\\n85+95=180\\n180"      (the end token follows)

Every line can be checked by itself, so that steps as well as answers can be scored."""

from __future__ import annotations

import operator
import random
import zlib
from collections.abc import Callable
from typing import Literal, TypedDict

Split = Literal["train", "heldout"]

ALPHABET = "0123456789+=\n"
"""Every character of prompts and solutions."""
LONGEST_SOLUTION = len("99+99=198\n198+99=297\n297") + 1
"""Tokens of the longest right solution under a character tokenizer, the end token included."""
HELD_OUT_SHARE = 16
"""One of so many unordered triples is held out."""


class Row(TypedDict):
    """A question and its final answer, as the columns of a data set."""

    prompt: str
    answer: str


def split_of(numbers: tuple[int, int, int]) -> Split:
    """Which split a question belongs to: decided by its numbers alone, whatever their order."""
    name = ",".join(str(number) for number in sorted(numbers))
    return "heldout" if zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0 else "train"


def questions(split: Split, seed: int, n: int) -> list[Row]:
    """Draw `n` different questions of a split; the same seed draws the same ones, and fewer are a prefix of more."""
    draw = random.Random(seed)
    found: dict[tuple[int, int, int], Row] = {}
    while len(found) < n:
        numbers = (draw.randint(10, 99), draw.randint(10, 99), draw.randint(10, 99))
        if split_of(numbers) == split:
            found[numbers] = row(numbers)
    return list(found.values())


def held_out(n: int = 512) -> list[Row]:
    """The questions that the built-in job is evaluated on: the same for every seed."""
    return questions("heldout", seed=0, n=n)


def row(numbers: tuple[int, int, int]) -> Row:
    """The question that adds these numbers."""
    a, b, c = numbers
    return {"prompt": f"{a}+{b}+{c}=\n", "answer": str(a + b + c)}


def numbers_of(prompt: str) -> tuple[int, int, int]:
    """The three numbers of a prompt that `row` wrote."""
    a, b, c = (int(number) for number in prompt.removesuffix("=\n").split("+"))
    return a, b, c


def solution(question: Row) -> str:
    """The right answer with its steps, without the end token."""
    return _lines(question, operator.add)


def careless_solution(question: Row) -> str:
    """An answer by someone who never carries from the ones to the tens: right only where no line needs it."""
    return _lines(question, _add_without_carry)


def lucky_solution(question: Row) -> str:
    """The right answer by two mistakes that cancel: a carry forgotten in the first line is added in the second.

    Where the first line needs no carry this is the right solution.
    """
    a, b, c = numbers_of(question["prompt"])
    return _written(question, _add_without_carry(a, b), a + b + c)


def demonstrations(seed: int, n: int, careless: float, lucky: float = 0.0) -> list[tuple[Row, str]]:
    """`n` training questions with an answer each: the share `careless` is answered carelessly throughout, the share
    `lucky` by mistakes that cancel, the others rightly."""
    draw = random.Random(f"demonstrations {seed}")
    shown = []
    for question in questions("train", seed, n):
        chance = draw.random()
        answer = careless_solution if chance < careless else lucky_solution if chance < careless + lucky else solution
        shown.append((question, answer(question)))
    return shown


def _lines(question: Row, add: Callable[[int, int], int]) -> str:
    a, b, c = numbers_of(question["prompt"])
    first = add(a, b)
    return _written(question, first, add(first, c))


def _written(question: Row, first: int, second: int) -> str:
    """The two sums as somebody got them, and the answer."""
    a, b, c = numbers_of(question["prompt"])
    return f"{a}+{b}={first}\n{first}+{c}={second}\n{second}"


def _add_without_carry(a: int, b: int) -> int:
    return a + b - (10 if a % 10 + b % 10 >= 10 else 0)
