"""Encoding, decoding, end tokens, offsets, stop strings and saving."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from groupwise.errors import ConfigError, DataError, ModelError
from groupwise.tokenizer.codec import BROKEN, Codec
from tests.tiny_hub import cached_snapshot
from tests.tiny_tokenizers import (
    CHAT_TEMPLATE,
    byte_level,
    character_level,
    saved,
    sentencepiece_like,
    word_pieces,
)

BYTES = Codec(byte_level(CHAT_TEMPLATE))
PIECES = Codec(sentencepiece_like())
WORDS = Codec(word_pieces())
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters=BROKEN + "▁"), max_size=30)
QUESTION = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]


def token_lists(codec: Codec) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, codec.vocab_size - 1), max_size=25)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_string_is_encoded_with_the_tokenizers_own_special_tokens() -> None:
    plain = BYTES.encode_text("the answer")
    assert BYTES.decode(plain) == "the answer"
    assert BYTES.encode_prompt("the answer") == (1, *plain)
    assert PIECES.encode_prompt("a") == PIECES.encode_text("a")  # this one adds no BOS


def test_messages_are_rendered_by_the_chat_template_and_get_no_second_bos() -> None:
    rendered = "<|system|>Add.<end>\n<|user|>1+1?<end>\n<|assistant|>"
    assert BYTES.render(QUESTION) == rendered
    ids = BYTES.encode_prompt(QUESTION)
    assert BYTES.decode(ids, skip_special_tokens=False) == rendered
    assert ids.count(0) == 2, "<end> in a template is one special token"
    assert 1 not in ids
    stock = BYTES.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert list(ids) == stock


def test_template_options_and_tools_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    codec = Codec(byte_level(CHAT_TEMPLATE), chat_template_kwargs={"mood": "calm", "tools": [tool, tool]})
    assert codec.render(QUESTION).endswith("<end>\ntools:2\nmood:calm\n<|assistant|>")


def test_a_template_that_asks_a_clock_is_told_the_day_of_the_job() -> None:
    dated = byte_level("{{ strftime_now('%d %b %Y, %H:%M') }}: {{ messages[0].content }}")
    assert Codec(dated, date="2024-02-29").render(QUESTION) == "29 Feb 2024, 00:00: Add."
    assert Codec(dated).render(QUESTION) == f"{date.today():%d %b %Y}, 00:00: Add."


def test_a_template_can_be_given_as_an_option() -> None:
    codec = Codec(byte_level(), chat_template_kwargs={"chat_template": "{{ messages[0].content }}!"})
    assert codec.render(QUESTION) == "Add.!"


def test_a_last_message_of_the_assistant_is_continued() -> None:
    rendered = BYTES.render([*QUESTION, {"role": "assistant", "content": "It is"}])
    assert rendered.endswith("<|assistant|>It is")


def test_options_that_are_no_options_of_a_template_are_refused() -> None:
    with pytest.raises(ConfigError, match="chat_template_kwargs sets add_generation_prompt, tokenize"):
        Codec(byte_level(), chat_template_kwargs={"tokenize": False, "add_generation_prompt": False})


def test_messages_without_a_chat_template_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"no chat template.*plain strings"):
        Codec(byte_level()).encode_prompt(QUESTION)


def test_messages_that_the_template_refuses_are_an_error_with_its_words() -> None:
    codec = Codec(byte_level("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(DataError, match=r"refuses the messages .*1\+1.* roles must alternate\."):
        codec.render(QUESTION)


def test_a_character_that_the_tokenizer_refuses_is_an_error_that_shows_the_text() -> None:
    with pytest.raises(DataError, match="cannot encode '1 x 1'"):
        Codec(character_level("1 ")).encode_prompt("1 x 1")


def test_spaces_are_not_cleaned_up_when_decoding() -> None:
    tokenizer = character_level("a .")
    tokenizer.clean_up_tokenization_spaces = True
    codec = Codec(tokenizer)
    assert tokenizer.decode(codec.encode_text("a .")) == "a."
    assert codec.decode(codec.encode_text("a .")) == "a ."


def test_special_tokens_are_decoded_on_request() -> None:
    ids = (*BYTES.encode_text("85"), 0)
    assert BYTES.decode(ids) == "85"
    assert BYTES.decode(ids, skip_special_tokens=False) == "85<end>"


def with_marks(*, skip: bool = False, **special: str) -> tuple[Codec, list[int]]:
    """A codec whose `<think>` and `</think>` are special tokens, and an output that has them and an end token."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<pad>"], **special})
    codec = Codec(tokenizer, skip_special_tokens=skip)
    return codec, [*codec.encode_text("<think>é 1+1</think>\n85"), codec.tokenizer.eos_token_id]


@pytest.mark.parametrize("pad", ["<pad>", "<end>", None])
def test_an_output_reads_as_it_was_sampled_but_for_its_end_and_padding(pad: str | None) -> None:
    codec, ids = with_marks(**({"pad_token": pad} if pad else {}))
    assert codec.decode(ids) == "<think>é 1+1</think>\n85"
    assert codec.encode_text(codec.decode(ids)) == tuple(ids[:-1])
    padding = codec.tokenizer.convert_tokens_to_ids("<pad>")
    assert codec.decode([*ids, padding]).endswith("85" if pad == "<pad>" else "85<pad>")
    text, ends = codec.offsets(ids)
    assert text == codec.decode(ids)
    assert ends[0] == len("<think>")
    assert ends[-2:] == (len(text), len(text))
    assert {codec.tokenizer.convert_ids_to_tokens(i) for i in codec.special_token_ids} >= {"<think>", "</think>"}


def test_special_tokens_can_be_left_out_of_the_text() -> None:
    codec, ids = with_marks(skip=True)
    assert codec.decode(ids) == "é 1+1\n85"
    text, ends = codec.offsets(ids)
    assert text == codec.decode(ids)
    assert ends[0] == 0
    assert codec.decode(ids, skip_special_tokens=False) == "<think>é 1+1</think>\n85<end>"


# --- end tokens -------------------------------------------------------------------------------------------------------


def test_end_tokens_are_the_union_of_what_the_folder_says(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path, eos_token_id=7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "temperature": 0.6}))
    assert Codec.load(folder).end_token_ids == {0, 5, 6, 7}
    assert Codec.load(str(folder), eos_token_ids=[9]).end_token_ids == {0, 9}


def test_an_end_token_of_id_zero_and_one_of_a_nested_config_count(tmp_path: Path) -> None:
    folder = saved(word_pieces(), tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 0, "text_config": {"eos_token_id": 3}}
    (folder / "config.json").write_text(json.dumps(config))
    assert Codec.load(folder).end_token_ids == {0, 3}


def test_a_damaged_generation_config_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        Codec.load(folder)


# --- offsets ----------------------------------------------------------------------------------------------------------


def test_offsets_of_characters_that_span_tokens() -> None:
    tokens = ["x", "aÃ", "Ł", "\u010a", "ðŁ", "ĺ", "İ", "b"]  # x | a + C3 | 9F | newline | F0 9F | 98 | 8E | b
    ids = [BYTES.tokenizer.get_vocab()[token] for token in tokens]
    assert BYTES.offsets(ids) == ("xaß\n😎b", (1, 2, 3, 4, 4, 4, 5, 6))


def test_bytes_that_are_no_character_count_once_it_is_known_what_follows() -> None:
    ids = [BYTES.tokenizer.get_vocab()[token] for token in ["â", "Ĥ", "x"]]  # E2 | 82 | x: the third byte is missing
    assert BYTES.offsets(ids) == (BROKEN + "x", (0, 0, 2))
    assert BYTES.offsets(ids[:2]) == (BROKEN, (0, 1))


def token_bytes(codec: Codec, ids: Sequence[int]) -> list[bytes]:
    """What each token spells, read off its name: an oracle that decodes nothing."""
    names = codec.tokenizer.convert_ids_to_tokens(list(ids))
    if codec is BYTES:
        return [b"?" * len(name) for name in names]  # only their number counts: one character names one byte
    return [bytes([int(n[3:5], 16)]) if n.startswith("<0x") else n.replace("▁", " ").encode() for n in names]


@given(st.sampled_from([BYTES, PIECES]), TEXT)
@settings(max_examples=120, deadline=None)
def test_offsets_count_the_characters_whose_bytes_are_all_there(codec: Codec, text: str) -> None:
    ids = codec.encode_text(text)
    data = text.encode()
    seen = len(data) - sum(map(len, token_bytes(codec, ids)))  # -1 where a leading space is dropped
    expected = []
    for spelled in token_bytes(codec, ids):
        seen += len(spelled)
        expected.append(len(data[: max(0, seen)].decode(errors="ignore")))
    assert codec.offsets(ids) == (text, tuple(expected))


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_offsets_of_any_tokens_never_claim_what_is_not_there_yet(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from([BYTES, WORDS]))
    ids = data.draw(token_lists(codec))
    text, ends = codec.offsets(ids)
    assert text == codec.decode(ids)
    assert list(ends) == sorted(ends)
    assert list(ends[-1:]) == [len(text)] * bool(ids)
    for t, end in enumerate(ends):
        assert codec.decode(ids[: t + 1]).startswith(text[:end])


def test_offsets_where_the_decoder_drops_the_first_space() -> None:
    assert PIECES.offsets(PIECES.encode_text("a the\n")) == ("a the\n", (1, 2, 3, 4, 5, 6))


def test_offsets_where_the_decoder_joins_words() -> None:
    ids = WORDS.encode_text("hello worldly, don't")
    text, ends = WORDS.offsets(ids)
    assert text == "hello worldly, don ' t"
    spelled = [text[a:b] for a, b in pairwise((0, *ends))]
    assert spelled == ["hello", " world", "ly", ",", " don", " '", " t"]


def test_special_tokens_add_no_characters() -> None:
    assert BYTES.offsets([*BYTES.encode_text("85"), 0])[1][-2:] == (2, 2)
    assert BYTES.offsets([]) == ("", ())


# --- loading and saving -----------------------------------------------------------------------------------------------


def test_tokenizer_files_are_saved_byte_for_byte(tmp_path: Path) -> None:
    folder = saved(byte_level(CHAT_TEMPLATE), tmp_path / "model")
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("\n", "\n\n") + " ")  # nobody's serializer writes this
    (folder / "model.safetensors").write_text("weights")
    Codec.load(folder).save(tmp_path / "export")
    names = {file.name for file in (tmp_path / "export").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names:
        assert (tmp_path / "export" / name).read_bytes() == (folder / name).read_bytes()
    Codec.load(folder).save(folder)  # onto itself changes nothing
    assert config.read_text().endswith(" ")


def test_a_tokenizer_that_came_from_no_folder_is_saved_by_transformers(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again("the answer 東京")["input_ids"] == list(BYTES.encode_prompt("the answer 東京"))


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "a/b/c", Path("model")])
def test_a_missing_folder_is_an_error(path: str | Path) -> None:
    with pytest.raises(ModelError, match="is no folder with a model"):
        Codec.load(path)


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(ModelError, match="is no folder with a model"):
        Codec.load(str(tmp_path / "model"))


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("left", [(), ("chat_template.jinja",), ("tokenizer_config.json",)])
def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path, model_type: str | None, left: tuple[str]) -> None:
    """Of these classes some refuse to load, and some load with nothing but special tokens."""
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name in left:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError) as caught:
        Codec.load(tmp_path)
    said = str(caught.value)
    assert "tokenizer.json" in said
    assert "\n" not in said
    if left != ("tokenizer_config.json",):
        assert said.startswith(f"The folder {str(tmp_path)!r} has no tokenizer: none of the files")
        assert "save_pretrained(folder)" in said


def test_a_tokenizer_without_a_vocabulary_on_the_hub_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (cached_snapshot(tmp_path, "org/bare") / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"^The model 'org/bare' has no tokenizer"):
        Codec.load("org/bare")


def test_a_damaged_tokenizer_file_is_an_error(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ModelError, match="cannot be loaded"):
        Codec.load(folder)


def test_a_hub_id_without_a_connection_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"'nobody/nothing' cannot be loaded: .*no such folder here, .*filled cache"):
        Codec.load("nobody/nothing")


def test_a_hub_id_in_the_cache_is_loaded_with_its_end_tokens_and_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = saved(byte_level(), cached_snapshot(tmp_path / "hub", "org/tiny"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    codec = Codec.load("org/tiny")
    assert codec.end_token_ids == {0, 5}
    codec.save(tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_half_of_a_surrogate_pair_is_named_with_its_place() -> None:
    """Tokenizers say of it that their input has another type."""
    codec = Codec(byte_level())
    with pytest.raises(DataError, match=r"half of a surrogate pair \('\\ud800'\) at character 2 .* Remove it"):
        codec.encode_prompt("a \ud800 b")
