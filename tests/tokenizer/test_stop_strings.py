"""Stop strings, and characters, are found at the token that completes them, however their bytes are split."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from groupwise.errors import ConfigError
from groupwise.tokenizer.codec import Codec
from groupwise.tokenizer.stop_strings import StopChecker
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level, sentencepiece_like, wrapped

BYTES = Codec(byte_level(CHAT_TEMPLATE))
PIECES = Codec(sentencepiece_like())


def token_lists(codec: Codec) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, codec.vocab_size - 1), max_size=25)


def first_stop(codec: Codec, ids: list[int], stop: list[str]) -> int | None:
    """The definition: the first token after which a stop string is in the whole text."""
    texts = (codec.decode(ids[: t + 1], skip_special_tokens=False) for t in range(len(ids)))
    return next((t for t, text in enumerate(texts) if any(s in text for s in stop)), None)


@given(token_lists(BYTES), st.lists(st.sampled_from(["a", "\n\n", "e a", "é", "85", "<end>", "😀", "st"]), max_size=3))
@settings(max_examples=120, deadline=None)
def test_stops_are_found_where_decoding_everything_finds_them(ids: list[int], stop: list[str]) -> None:
    checker = StopChecker(BYTES, stop)
    found = next((t for t in range(len(ids)) if checker.ends_with_stop(ids[: t + 1])), None)
    assert found == first_stop(BYTES, ids, stop)


@pytest.mark.parametrize("codec", [BYTES, PIECES], ids=["byte-level", "byte-fallback"])
@pytest.mark.parametrize("stop", ["\n", "京", "é!", "answer is", " a", "zz"])
def test_stops_in_a_long_text(codec: Codec, stop: str) -> None:
    ids = list(codec.encode_text("the 😎 東京\n ß the answer is é! ok\n and a 😎 " * 2))
    checker = StopChecker(codec, [stop])
    found = [t for t in range(len(ids)) if checker.ends_with_stop(ids[: t + 1])]
    texts = [codec.decode(ids[: t + 1]) for t in range(len(ids))]
    assert found == [t for t in range(len(ids)) if texts[t].count(stop) > (texts[t - 1].count(stop) if t else 0)]


def test_only_tokens_that_may_complete_a_stop_are_looked_at() -> None:
    newline = StopChecker(BYTES, ["\n"])
    texts = {token_id: BYTES.decode([token_id]) for token_id in range(BYTES.vocab_size)}
    assert {i for i, text in texts.items() if "\n" in text} == set(newline.may_stop_V.nonzero()[0])
    assert StopChecker(BYTES, ["é"]).may_stop_V.sum() > 100, "bytes may complete a character that is not ASCII"
    assert not StopChecker(BYTES, []).may_stop_V.any()
    assert StopChecker(BYTES, ["\n"], vocab_size=512).may_stop_V.shape == (512,)
    assert not newline.ends_with_stop([])


def test_a_token_that_ends_one_character_and_holds_the_next_may_stop() -> None:
    core = Tokenizer(models.BPE({"Ã": 0, "©a": 1, "x": 2}, []))  # C3 | A9 a | x
    core.decoder = decoders.ByteLevel()
    checker = StopChecker(Codec(wrapped(core)), ["a"])
    assert checker.may_stop_V.tolist() == [False, True, False]
    assert checker.ends_with_stop([2, 0, 1])


def test_a_stop_is_found_behind_tokens_without_text() -> None:
    checker = StopChecker(BYTES, ["ab"], vocab_size=1000)
    a, b = BYTES.encode_text("a")[0], BYTES.encode_text("b")[0]
    assert checker.ends_with_stop([a, *[999] * 20, b])  # rows that a padded model has and its tokenizer has not
    assert not checker.ends_with_stop([a, *[999] * 20, a])


def test_a_stop_counts_once_when_its_last_character_comes_again() -> None:
    ids = [BYTES.encode_text(character)[0] for character in "oiss"]
    checker = StopChecker(BYTES, ["is"])
    assert [checker.ends_with_stop(ids[: t + 1]) for t in range(4)] == [False, False, True, False]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="stop string is empty"):
        StopChecker(BYTES, ["\n", ""])


# --- characters that are several tokens -------------------------------------------------------------------------------

SCRIPTS = ["回答完毕終わりです한국", "конец Ответ: ", "🛑😀👩\u200d💻🇩🇪é", "ab #\n"]
WRITTEN = st.lists(st.sampled_from([*"".join(SCRIPTS), *SCRIPTS, "回答完毕", "🛑🛑"]), max_size=8).map("".join)
STOPS = st.lists(st.one_of(*(st.text(alphabet=script, min_size=1, max_size=5) for script in SCRIPTS)), max_size=2)
Piece = tuple[str, bytes]
"""A token's name in its vocabulary, and the bytes that it stands for."""


def byte_names() -> dict[int, str]:
    """GPT-2's names of bytes: printable ones stand for themselves, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def codec_of(pieces: Sequence[Piece], decoder: decoders.Decoder) -> tuple[Codec, list[int]]:
    """A codec that has just these tokens, and one to decode others after; and their ids."""
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(["x", *(name for name, _ in pieces)]))}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.decoder = decoder
    return Codec(wrapped(core)), [vocabulary[name] for name, _ in pieces]


@st.composite
def split_bytes(draw: st.DrawFn, data: bytes) -> list[Piece]:
    """As byte-level BPE may have learned it: tokens end anywhere, inside characters too."""
    names = byte_names()
    cuts = sorted(draw(st.sets(st.integers(0, len(data)))) | {0, len(data)})
    return [("".join(names[byte] for byte in data[a:b]), data[a:b]) for a, b in pairwise(cuts)]


@st.composite
def fallen_back(draw: st.DrawFn, text: str) -> list[Piece]:
    """As Llama 2 and Gemma have it: some characters have tokens, the others a token like <0xE4> for each byte."""
    known = draw(st.sets(st.sampled_from(sorted(set(text)))))
    pieces: list[Piece] = []
    for character in text:
        data = character.encode()
        spelled = [(f"<0x{byte:02X}>", bytes([byte])) for byte in data]
        pieces += [(character.replace(" ", "▁"), data)] if character in known else spelled
    return pieces


def check_against_bytes(codec: Codec, ids: list[int], pieces: Sequence[Piece], stop: list[str]) -> None:
    """The definition: a token completes a stop string if bytes that it brings are the last of one."""
    checker = StopChecker(codec, stop)
    data, expected = b"", []
    for _, piece in pieces:
        ends = (len(data) + end for end in range(1, len(piece) + 1))
        expected.append(any((data + piece)[:end].endswith(text.encode()) for end in ends for text in stop))
        data += piece
    assert [checker.ends_with_stop(ids[: t + 1]) for t in range(len(ids))] == expected


def check_offsets(codec: Codec, ids: list[int], pieces: Sequence[Piece]) -> None:
    """As many characters are complete as the bytes so far spell."""
    spelled = list(accumulate(piece for _, piece in pieces))
    expected = tuple(len(data.decode(errors="ignore")) for data in spelled)
    assert codec.offsets(ids) == (spelled[-1].decode(), expected)


@given(st.data(), WRITTEN.filter(bool), STOPS)
@settings(max_examples=150, deadline=None)
def test_a_stop_is_found_however_its_bytes_are_split(data: st.DataObject, text: str, stop: list[str]) -> None:
    pieces = data.draw(split_bytes(text.encode() + "".join(stop).encode()))
    codec, ids = codec_of(pieces, decoders.ByteLevel())
    check_against_bytes(codec, ids, pieces, stop)
    check_offsets(codec, ids, pieces)


@given(st.data(), st.binary(max_size=6), WRITTEN, STOPS)
@settings(max_examples=80, deadline=None)
def test_a_stop_is_found_behind_bytes_that_are_no_characters(
    data: st.DataObject, before: bytes, text: str, stop: list[str]
) -> None:
    pieces = data.draw(split_bytes(before + text.encode() + b"\xe5" + "".join(stop).encode()))
    codec, ids = codec_of(pieces, decoders.ByteLevel())
    check_against_bytes(codec, ids, pieces, stop)


@pytest.mark.parametrize("strips", [False, True], ids=["gemma", "llama"])
@given(data=st.data(), text=WRITTEN.filter(bool), stop=STOPS)
@settings(max_examples=150, deadline=None)
def test_a_stop_is_found_in_characters_that_fall_back_to_bytes(
    data: st.DataObject, text: str, stop: list[str], strips: bool
) -> None:
    pieces = data.draw(fallen_back("x" + text + "".join(stop)))
    decoding: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    codec, ids = codec_of(pieces, decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if strips else decoding))
    check_against_bytes(codec, ids, pieces, stop)
    check_offsets(codec, ids, pieces)


@given(WRITTEN.filter(bool), STOPS)
@settings(max_examples=50, deadline=None)
def test_a_stop_is_found_in_single_characters(text: str, stop: list[str]) -> None:
    pieces = [(character, character.encode()) for character in text + "".join(stop)]
    codec, ids = codec_of(pieces, decoders.Fuse())
    check_against_bytes(codec, ids, pieces, stop)


@pytest.mark.parametrize("stop", ["回答完毕", "終わりです", "👩\u200d💻", "🛑🛑🛑", "конец", "答え:终"])
@pytest.mark.parametrize("codec", [BYTES, PIECES], ids=["byte-level", "byte-fallback"])
def test_a_stop_that_is_written_in_bytes_is_found_at_its_last_token(codec: Codec, stop: str) -> None:
    ids = list(codec.encode_text(f"so the answer is {stop}"))
    checker = StopChecker(codec, [stop])
    assert [t for t in range(len(ids)) if checker.ends_with_stop(ids[: t + 1])] == [len(ids) - 1]
