"""Scores of many outputs: each different row once, rows of like length together, in the order they were asked for."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice

import torch

from groupwise.errors import DataError
from groupwise.reward_models.model import RewardModel
from groupwise.reward_models.text import Judged, Output, Row

BUDGET = 16384
"""Tokens of a pass, padding included."""


def scores_of(
    model: RewardModel, judged: Sequence[Judged], budget: int = BUDGET
) -> tuple[list[list[float] | None], dict[int, str]]:
    """What each output or its steps earn, and by index why some cannot be read, which have None.

    An output has one number, its raw logit; steps have one each, the probability of being right. Equal rows have
    equal numbers, to the bit.
    """
    rows: dict[int, Row] = {}
    unread: dict[int, str] = {}
    # A tokenizer may take longer than a small model's pass: what a group has several times is encoded once.
    encoded: dict[Hashable, Row | str] = {}
    for index, one in enumerate(judged):
        name = _name(one)
        if name not in encoded:
            encoded[name] = _encoded(model, one)
        row = encoded[name]
        if isinstance(row, str):
            unread[index] = row
        else:
            rows[index] = row
    flat = iter(logits_of(model, list(rows.values()), budget))
    found: list[list[float] | None] = [None] * len(judged)
    for index, row in rows.items():
        if model.kind == "outcome":
            found[index] = [next(flat)]
        else:
            found[index] = [sigmoid(x) for x in islice(flat, len(row.places))]
    return found, unread


def _name(one: Judged) -> Hashable:
    """The same for equal texts to one prompt object; a prompt of messages has no hash of its own."""
    return (id(one.prompt), one.text, one.finished) if isinstance(one, Output) else (id(one.prompt), one.texts)


def _encoded(model: RewardModel, one: Judged) -> Row | str:
    """The row, or why there is none: what a policy writes may be anything, and the reason is the caller's to show."""
    try:
        return model.encode(one)
    except DataError as error:
        return str(error)


@torch.no_grad()
def logits_of(model: RewardModel, rows: Sequence[Row], budget: int = BUDGET) -> list[float]:
    """What `RewardModel.logits` gives for all rows, in passes of at most `budget` tokens, each different row once."""
    different = sorted(set(rows), key=lambda row: (len(row.token_ids), row), reverse=True)
    found: dict[Row, list[float]] = {}
    for part in _passes(different, budget):
        flat = iter(model.logits(part).tolist())
        found |= {row: list(islice(flat, count_of(model, row))) for row in part}
    return [x for row in rows for x in found[row]]


def count_of(model: RewardModel, row: Row) -> int:
    """How many numbers a row gets."""
    return 1 if model.kind == "outcome" else len(row.places)


def sigmoid(x: float) -> float:
    """The probability behind log-odds; NaN stays NaN."""
    return 1 / (1 + math.exp(-x)) if x >= 0 or math.isnan(x) else math.exp(x) / (1 + math.exp(x))


def _passes(rows: Sequence[Row], budget: int) -> Iterator[Sequence[Row]]:
    """Rows, the longest first, in runs that fit into the budget."""
    start = 0
    while start < len(rows):
        size = max(1, budget // len(rows[start].token_ids))
        yield rows[start : start + size]
        start += size
