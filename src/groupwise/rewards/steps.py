"""Where the steps of an output end: boundaries in its text or among its tokens, as exclusive indices of tokens.

Blank text is never a step of its own: before a step it belongs to that one, at the end to the last."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from groupwise.config import ProcessSection
from groupwise.errors import ConfigError, RewardError
from groupwise.rewards.base import RewardContext
from groupwise.rewards.checks import show_output
from groupwise.rewards.functions.calling import Number
from groupwise.rewards.functions.calls import FunctionCalls
from groupwise.tokenizer.codec import Codec
from groupwise.types import Completion, Group
from groupwise.wording import shown

PATTERNS = {"newline": r"\n", "blank_line": r"\n[ \t\r]*\n"}
"""Segmenters that are regular expressions with a name."""


class Boundary(NamedTuple):
    """A step ends before token `end` (exclusive), and before the character `position` of the text."""

    end: int
    position: int


class Cut(NamedTuple):
    """The steps of an output: where each ends, its text (laid end to end they are the output's), and whether any
    boundary was found in it. `failed`: a function that was to say where steps end did not."""

    ends: tuple[int, ...]
    texts: tuple[str, ...]
    found: bool
    failed: bool = False


Cuts = list[list[Cut]]
"""Per group, per output."""


class Segmenter(Protocol):
    """Says where the steps of all outputs end."""

    name: str

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Cuts:
        """One cut per output of each group."""

    def close(self) -> None:
        """Give back what the segmenter holds (a worker process)."""


def cut(text: str, length: int, boundaries: Iterable[Boundary], *, failed: bool = False) -> Cut:
    """Cut an output of `length` tokens at rising boundaries.

    Boundaries that the same token completes are one. What follows the last boundary is a step too; blank text and the
    end token there belong to the last step. An output without tokens has no steps.
    """
    kept: list[Boundary] = []
    start = 0
    for boundary in boundaries:
        if kept and boundary.end == kept[-1].end:
            kept[-1] = boundary
        elif text[start : boundary.position].strip():
            kept.append(boundary)
        else:
            continue
        start = boundary.position
    found, whole = bool(kept), Boundary(length, len(text))
    if kept and (kept[-1].end == length or not text[start:].strip()):
        kept[-1] = whole
    elif length:
        kept.append(whole)
    places = [0, *(boundary.position for boundary in kept)]
    texts = tuple(text[a:b] for a, b in pairwise(places))
    return Cut(tuple(boundary.end for boundary in kept), texts, found, failed)


def at_characters(positions: Iterable[int], characters: Sequence[int]) -> list[Boundary]:
    """Boundaries in the text, each at the token that completes it.

    `characters` has, per token, how many leading characters of the text are complete once it is there.
    """
    return [Boundary(bisect_left(characters, position) + 1, position) for position in positions]


class OwnSegmenter:
    """Finds boundaries from an output's own text and tokens, in this process."""

    name = "boundaries"

    def __init__(self, codec: Codec, boundaries: Callable[[str, Completion, Sequence[int]], list[Boundary]]) -> None:
        self._codec, self._boundaries = codec, boundaries

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Cuts:
        """See `Segmenter`."""
        return [[self._cut(output) for output in group.completions] for group in groups]

    def _cut(self, output: Completion) -> Cut:
        text, characters = self._codec.offsets(output.token_ids)
        return cut(text, len(output.token_ids), self._boundaries(text, output, characters))

    def close(self) -> None:
        """Nothing is held."""


def by_pattern(codec: Codec, pattern: str) -> OwnSegmenter:
    """A step ends where a match of the regular expression ends."""
    found = re.compile(pattern)

    def boundaries(text: str, output: Completion, characters: Sequence[int]) -> list[Boundary]:
        return at_characters([match.end() for match in found.finditer(text) if match.end()], characters)

    return OwnSegmenter(codec, boundaries)


def by_token_ids(codec: Codec, token_ids: Collection[int]) -> OwnSegmenter:
    """A step ends with any of these tokens, whether or not they stand for text."""
    marks = frozenset(token_ids)

    def boundaries(text: str, output: Completion, characters: Sequence[int]) -> list[Boundary]:
        return [Boundary(t + 1, characters[t]) for t, token in enumerate(output.token_ids) if token in marks]

    return OwnSegmenter(codec, boundaries)


def segmenter_of(section: ProcessSection, codec: Codec, function: FunctionCalls | None) -> Segmenter:
    """The job's segmenter; `function` is the loaded one that it names. Raises ConfigError for token ids that the
    tokenizer does not have."""
    if function is not None:
        return FunctionSegmenter(codec, function)
    if section.token_ids is None:
        return by_pattern(codec, section.pattern or PATTERNS[section.segmenter])
    unknown = [token for token in section.token_ids if not 0 <= token < codec.vocab_size]
    if unknown:
        raise ConfigError(
            f"`process.token_ids` has {unknown[0]}, and the tokenizer has the tokens 0 to {codec.vocab_size - 1}."
        )
    return by_token_ids(codec, section.token_ids)


class FunctionSegmenter:
    """Asks a user's function, which is called as a reward function is and returns, per output, where in its text the
    steps end: rising numbers of characters. An output for which it fails is not scored."""

    def __init__(self, codec: Codec, calls: FunctionCalls) -> None:
        self._codec, self._calls = codec, calls
        self.name = calls.name

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Cuts:
        """See `Segmenter`. Raises RewardError for positions that do not rise within the text."""
        answers = iter(self._calls.values(groups, context))
        return [[self._cut(group, i, next(answers)) for i in range(len(group.completions))] for group in groups]

    def _cut(self, group: Group, index: int, answer: object) -> Cut:
        output = group.completions[index]
        text, characters = self._codec.offsets(output.token_ids)
        if answer is None:
            return cut(text, len(output.token_ids), (), failed=True)
        positions = list(_positions(answer, len(text)))
        if len(positions) != len(_as_list(answer)) or positions != sorted(set(positions)):
            raise RewardError(
                f"segmenter `{self._calls.name}` returned {shown(answer)} for a text of {len(text)} characters; it "
                "must return a list of rising whole numbers between 1 and that: after how many characters each step "
                "ends\n"
                f"{show_output(group, index)}"
            )
        return cut(text, len(output.token_ids), at_characters(positions, characters))

    def close(self) -> None:
        """End the worker process."""
        self._calls.close()


def _positions(answer: object, length: int) -> Iterable[int]:
    """Those entries that can be positions."""
    numbers: Iterable[Number] = _as_list(answer)
    return (int(n) for n in numbers if isinstance(n, float) and n.is_integer() and 1 <= n <= length)


def _as_list(answer: object) -> list[Number]:
    return answer if isinstance(answer, list) else [None]
