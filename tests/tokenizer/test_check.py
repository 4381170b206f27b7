"""A tokenizer that loses what the data says is refused; one that merely normalises gives a warning."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from groupwise.errors import ModelError
from groupwise.tokenizer.codec import Codec
from tests.tiny_tokenizers import (
    CHAT_TEMPLATE,
    byte_level,
    character_level,
    saved,
    sentencepiece_like,
    word_pieces,
    wrapped,
)

ARITHMETIC = character_level("0123456789+= \n")


def test_a_sound_tokenizer_passes_without_a_word(tmp_path: Path) -> None:
    codec = Codec.load(saved(byte_level(CHAT_TEMPLATE), tmp_path))
    conversation = codec.render([{"role": "user", "content": "1+1?"}])
    assert codec.check(["the answer: 東京 😀\n", "", "  two  spaces\t", conversation]) == []
    assert Codec(sentencepiece_like()).check(["the answer: 東京 😀\n", " a  b"]) == []


def test_autotokenizer_that_ignores_tokenizer_json_is_refused(tmp_path: Path) -> None:
    codec = Codec.load(saved(ARITHMETIC, tmp_path, model_type="qwen2"))
    assert codec.decode(codec.encode_text("1 + 2\n=3")) == "1+2=3", "the trap: spaces and newlines are gone"
    with pytest.raises(ModelError) as caught:
        codec.check(["1 + 2\n=3"])
    message = str(caught.value)
    assert "Qwen2Tokenizer that is unlike the model's own tokenizer.json" in message
    assert r"the text '1 + 2\n=3' is 5 tokens [2, 11, 3, 12, 4] under the first, 8 tokens" in message
    assert "PreTrainedTokenizerFast(tokenizer_file=...)" in message


def test_both_ways_out_that_the_message_offers_work(tmp_path: Path) -> None:
    saved(ARITHMETIC, tmp_path / "qwen3", model_type="qwen3")
    assert Codec.load(tmp_path / "qwen3").check(["1 + 2\n=3"]) == []
    by_hand = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "qwen3" / "tokenizer.json"), eos_token="<end>")
    assert Codec(by_hand).check(["1 + 2\n=3"]) == []


def test_a_stale_tokenizer_json_is_refused_with_both_sizes(tmp_path: Path) -> None:
    codec = Codec.load(saved(byte_level(), tmp_path))
    character_level("the answr").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'the answer' is 2 tokens .* under the first, 10 tokens"):
        codec.check(["the answer"])


def test_truncation_left_over_in_the_file_does_not_count_as_a_difference(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path)
    file = folder / "tokenizer.json"
    core = Tokenizer.from_file(str(file))
    core.enable_truncation(max_length=3)
    core.save(str(file))
    codec = Codec.load(folder)
    long = "the answer is 85.\n" * 3
    assert len(codec.encode_prompt(long)) > 3
    assert codec.check([long]) == []


@pytest.mark.parametrize("unknown", [True, False], ids=["unknown token", "no unknown token"])
def test_characters_without_a_token_are_named(unknown: bool, tmp_path: Path) -> None:
    tokenizer = character_level("0123456789+= ", unknown=unknown)
    for codec in (Codec(tokenizer), Codec.load(saved(tokenizer, tmp_path))):
        with pytest.raises(ModelError, match=r"loses '\\n', 'x' of the text '1 x 1=1\\n'"):
            codec.check(["1+1=2", "1 x 1=1\n"])


def test_a_word_without_a_token_is_refused() -> None:
    with pytest.raises(ModelError, match=r"loses .* of the text 'hello moon'"):
        Codec(word_pieces()).check(["hello world", "hello moon"])


def test_an_unknown_token_that_the_text_spells_out_is_no_loss() -> None:
    tokenizer = byte_level()
    tokenizer.unk_token = "<end>"  # GPT-2 uses one token for everything
    assert Codec(tokenizer).check(["the answer<end>"]) == []


def test_newlines_that_are_dropped_or_turned_into_spaces_are_refused() -> None:
    with pytest.raises(ModelError, match=r"loses '\\n' of the text"):
        Codec(word_pieces()).check(["hello\nworld"])


@pytest.mark.parametrize(
    ("normalizer", "text", "read"),
    [
        (normalizers.Lowercase(), "The Answer", "the answer"),
        (normalizers.NFC(), "cafe\u0301", "café"),
        (normalizers.NFKC(), "ｘ² ﬁ", "x2 fi"),
        (normalizers.Replace("  ", " "), "a  b", "a b"),
        (normalizers.Replace("\u200b", ""), "a\u200bb", "ab"),
        (normalizers.Prepend(" "), "a", " a"),
    ],
)
def test_a_tokenizer_that_normalises_gives_a_warning_that_shows_it(
    normalizer: normalizers.Normalizer, text: str, read: str
) -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizer
    [warning] = Codec(tokenizer).check([text, text])
    assert warning == f"The tokenizer changes text: {text!r} is read as {read!r}."


def test_a_missing_end_token_gives_a_warning() -> None:
    [warning] = Codec(word_pieces()).check(["hello world"])
    assert "No end token is known" in warning


def test_an_end_token_that_is_ordinary_text_gives_a_warning(tmp_path: Path) -> None:
    folder = saved(ARITHMETIC, tmp_path, eos_token_id=2)  # as a LlamaConfig writes it when nobody says otherwise
    [warning] = Codec.load(folder).check(["1+1=2"])
    assert "The end token 2 is the ordinary text '1'" in warning


def test_end_tokens_that_were_added_or_have_no_text_give_no_warning() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<turn>"])  # as some chat models do: added, but not marked as special
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert Codec(tokenizer, end_token_ids=[turn, 5000]).check(["85"]) == []


def test_an_end_token_appended_to_every_prompt_gives_a_warning() -> None:
    core = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    [warning] = Codec(wrapped(core, eos_token="<end>")).check(["a"])
    assert "appends an end token to prompts" in warning
