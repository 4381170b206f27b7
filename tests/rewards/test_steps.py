"""Where steps end: exact when a token spans a boundary or holds part of a character."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.config import ProcessSection
from groupwise.errors import ConfigError, RewardError
from groupwise.rewards.functions.load import load_stepwise
from groupwise.rewards.steps import Boundary, Cut, Segmenter, by_pattern, by_token_ids, cut, segmenter_of
from groupwise.tokenizer.codec import Codec
from groupwise.types import Completion, Group, GroupKey, Prompt
from tests.rewards.groups import listening
from tests.tiny_tokenizers import byte_level, character_level, sentencepiece_like

BYTES = Codec(byte_level())
LETTERS = Codec(character_level("abcé \n;"))
END = 0
"""The end token of both."""


def output(codec: Codec, ids: Sequence[int]) -> Group:
    """A group of one output."""
    completion = Completion(tuple(ids), codec.decode(ids), (0.0,) * len(ids), "stop")
    return Group(GroupKey(0, 0, "17"), Prompt("17", "?", (2,)), (completion,))


def cut_by(segmenter: Segmenter, codec: Codec, ids: Sequence[int]) -> Cut:
    return segmenter([output(codec, ids)], listening()[0])[0][0]


def lines(codec: Codec, text: str, *, end: bool = True) -> Cut:
    """The steps of a text, followed by the end token unless it was cut off."""
    ids = [*codec.encode_text(text), *([END] if end else [])]
    return cut_by(segmenter_of(ProcessSection(), codec, None), codec, ids)


def test_a_step_is_a_line_and_the_end_token_belongs_to_the_last() -> None:
    found = lines(LETTERS, "ab\nc\na")
    assert found == Cut((3, 5, 7), ("ab\n", "c\n", "a"), found=True)


def test_what_was_cut_off_is_a_step_too() -> None:
    assert lines(LETTERS, "ab\nc", end=False) == Cut((3, 4), ("ab\n", "c"), found=True)
    assert lines(LETTERS, "ab\n", end=False) == Cut((3,), ("ab\n",), found=True)


def test_an_output_without_any_boundary_is_one_step() -> None:
    assert lines(LETTERS, "abc") == Cut((4,), ("abc",), found=False)
    assert lines(LETTERS, "") == Cut((1,), ("",), found=False), "the end token alone"
    assert lines(LETTERS, "\n \n") == Cut((4,), ("\n \n",), found=False), "and so is one of blanks"
    assert lines(LETTERS, "", end=False) == Cut((), (), found=False), "no token, no step"


def test_blank_text_is_no_step_of_its_own() -> None:
    """Before a step it belongs to that one, at the end to the last."""
    assert lines(LETTERS, "\na\n\n \nb\n\n") == Cut((3, 10), ("\na\n", "\n \nb\n\n"), found=True)


def test_boundaries_that_one_token_completes_are_one() -> None:
    """Token 1 spells `b;c;d`: the first step ends with it, and what it holds of the next goes along."""
    found = cut("ab;c;de", 3, [Boundary(2, 3), Boundary(2, 5)])
    assert found == Cut((2, 3), ("ab;c;", "de"), found=True)
    assert cut("ab;c", 2, [Boundary(2, 3)]) == Cut((2,), ("ab;c",), found=True), "the last token holds both"


def test_a_token_that_spans_a_boundary_is_the_last_of_its_step() -> None:
    first = BYTES.encode_text("step one: 47+38=85\n\n")
    assert BYTES.decode(first[-1:]) == "\n\n", "this tokenizer has merged the two line breaks"
    ids = [*first, *BYTES.encode_text("the answer")]
    found = cut_by(segmenter_of(ProcessSection(), BYTES, None), BYTES, ids)
    assert found.ends == (len(first), len(ids))
    assert found.texts == ("step one: 47+38=85\n\n", "the answer")
    assert BYTES.decode(ids[: found.ends[0]]) == found.texts[0]


def test_a_character_that_several_tokens_share_is_complete_after_the_last() -> None:
    ids = [token for byte in "a€b€".encode() for token in BYTES.tokenizer.convert_tokens_to_ids([_spelled(byte)])]
    found = cut_by(by_pattern(BYTES, "€"), BYTES, [*ids, END])
    assert found == Cut((4, 9), ("a€", "b€"), found=True)


def _spelled(byte: int) -> str:
    """How a byte-level vocabulary writes a byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return str(bytes_to_unicode()[byte])


def test_a_blank_line() -> None:
    segmenter = segmenter_of(ProcessSection(segmenter="blank_line"), LETTERS, None)
    ids = LETTERS.encode_text("a\nb\n \nc\n\n\na")
    assert cut_by(segmenter, LETTERS, ids).texts == ("a\nb\n \n", "c\n\n", "\na")


def test_a_pattern_ends_a_step_where_its_match_ends() -> None:
    assert cut_by(by_pattern(LETTERS, ";+ ?"), LETTERS, LETTERS.encode_text("a;; b;c")).texts == ("a;; ", "b;", "c")
    before = by_pattern(LETTERS, "(?=c)")
    assert cut_by(before, LETTERS, LETTERS.encode_text("cab;c")).texts == ("cab;", "c"), "none before the first"


def test_token_ids_end_steps_whether_or_not_they_are_text() -> None:
    [semicolon] = LETTERS.encode_text(";")
    ids = [*LETTERS.encode_text("a;b"), END, *LETTERS.encode_text("c;;a")]
    found = cut_by(by_token_ids(LETTERS, [semicolon, END]), LETTERS, ids)
    assert found == Cut((2, 4, 6, 7, 8), ("a;", "b", "c;", ";", "a"), found=True)


def test_token_ids_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`process.token_ids` has 99, and the tokenizer has the tokens 0 to 7"):
        segmenter_of(ProcessSection(segmenter="token_ids", token_ids=[3, 99]), LETTERS, None)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["bytes", "letters", "pieces"]), st.sampled_from([r"\n", "[a ]", r"\W", "é|€"]))
def test_ends_are_exact_whatever_the_tokens(data: st.DataObject, kind: str, pattern: str) -> None:
    """No boundary is complete one token earlier, and every one is there at the end of its step."""
    codec = CODECS[kind]
    ids = data.draw(st.lists(st.integers(0, codec.vocab_size - 1), max_size=20))
    found = cut_by(by_pattern(codec, pattern), codec, ids)
    text, characters = codec.offsets(ids)
    assert "".join(found.texts) == text
    assert list(found.ends) == sorted(set(found.ends))
    assert len(found.ends) == len(found.texts)
    assert (found.ends[-1] if found.ends else 0) == len(ids)
    position = 0
    for end, step in list(zip(found.ends, found.texts, strict=True))[:-1]:
        position += len(step)
        assert characters[end - 1] >= position > (characters[end - 2] if end > 1 else 0)
        assert step.strip()


CODECS = {"bytes": BYTES, "letters": LETTERS, "pieces": Codec(sentencepiece_like())}


def function_segmenter(function: object) -> Segmenter:
    calls = load_stepwise(function, place="segmenter", kind="segmenter")  # type: ignore[arg-type]
    return segmenter_of(ProcessSection(segmenter="function", function="f.py:f"), LETTERS, calls)


def test_a_users_function_says_where_steps_end() -> None:
    segmenter = function_segmenter(lambda completion: [i + 1 for i, c in enumerate(completion) if c == ";"])
    assert cut_by(segmenter, LETTERS, LETTERS.encode_text("ab;c;a")) == Cut((3, 5, 6), ("ab;", "c;", "a"), found=True)


def test_a_function_over_lists_says_it_for_all_outputs() -> None:
    segmenter = function_segmenter(lambda completions, **rest: [[2] for _ in completions])
    assert cut_by(segmenter, LETTERS, LETTERS.encode_text("abc")).texts == ("ab", "c")


def test_an_output_for_which_the_function_fails_is_marked() -> None:
    def broken(completion: str) -> list[int]:
        raise ValueError(completion)

    context, told = listening()
    [[found]] = function_segmenter(broken)([output(LETTERS, LETTERS.encode_text("abc"))], context)
    assert found == Cut((3,), ("abc",), found=False, failed=True)
    assert "segmenter `broken` failed on an output" in told[0]
    assert context.metrics["segmenter/broken/failed"] == 1


@pytest.mark.parametrize("answer", [[2, 1], [0], [4], [1, 1], [1.5], ["a"], 3, "12"])
def test_positions_that_cannot_be_are_an_error(answer: object) -> None:
    with pytest.raises(RewardError, match=r"segmenter `.*` returned .* for a text of 3 characters(.|\n)*'abc'"):
        cut_by(function_segmenter(lambda completion: answer), LETTERS, LETTERS.encode_text("abc"))
