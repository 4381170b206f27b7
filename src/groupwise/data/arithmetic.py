"""The built-in questions: sums of three two-digit numbers, answered line by line.

    prompt    "47+38+95=\\n"
    solution  "47+38=85\\n85+95=180\\n180"      (the end token follows)

Every line can be checked by itself, so that steps as well as answers can be scored."""

from __future__ import annotations

import random
import zlib
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
    a, b, c = numbers_of(question["prompt"])
    return f"{a}+{b}={a + b}\n{a + b}+{c}={a + b + c}\n{a + b + c}"
