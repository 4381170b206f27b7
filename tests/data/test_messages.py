"""Content in parts, tools and options of a row, texts made messages, answers left off."""

from __future__ import annotations

import json
from typing import Any

import pytest

from groupwise.config import DataSection
from groupwise.data.files import load_prompts
from groupwise.errors import DataError
from groupwise.reward_models.examples import load_examples
from groupwise.reward_models.text import OutputEncoder, rows_of
from groupwise.tokenizer.codec import Codec
from groupwise.types import Prompt
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level

PLAIN = Codec(byte_level(CHAT_TEMPLATE))
PARTS = Codec(
    byte_level(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}[{{ part.text | trim }}]{% endfor %}{% endif %}{% endfor %}<|assistant|>"
    )
)
QUESTION = {"role": "user", "content": "1+1?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def one(row: dict[str, Any], codec: Codec = PLAIN, **section: Any) -> Prompt:
    [prompt] = load_prompts(DataSection(**section), codec, rows=[row]).prompts
    return prompt


def text_of(row: dict[str, Any], codec: Codec = PLAIN, **section: Any) -> str:
    return codec.decode(one(row, codec, **section).token_ids, False)


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image": None} for text in texts]


# --- messages as JSON -------------------------------------------------------------------------------------------------


def test_messages_that_a_table_holds_as_json_are_messages_and_are_counted() -> None:
    texts = [json.dumps([QUESTION]), " " + json.dumps([{"role": "system", "content": "Add."}, QUESTION])]
    found = load_prompts(DataSection(), PLAIN, rows=[{"prompt": text} for text in (*texts, "1+1?")])
    assert (found.as_json, found.texts) == (2, 1)
    assert [prompt.content for prompt in found.prompts] == [json.loads(texts[0]), json.loads(texts[1]), "1+1?"]
    assert found.prompts[0].token_ids == one({"prompt": [QUESTION]}).token_ids


@pytest.mark.parametrize(
    "text", ["[1, 2] is a list", "[1, 2]", "[]", '[{"role": "user"}]', '{"role": "user", "content": "a"}']
)
def test_other_json_is_a_text_like_any_other(text: str) -> None:
    found = load_prompts(DataSection(), PLAIN, rows=[{"prompt": text}])
    assert (found.as_json, found.prompts[0].content) == (0, text)


# --- content in parts -------------------------------------------------------------------------------------------------


def test_text_parts_are_joined_for_a_template_that_prints_what_it_is_given() -> None:
    messages = [{"role": "system", "content": parts("Add", ".")}, {"role": "user", "content": ["1+1", "?"]}]
    assert text_of({"prompt": messages}) == "<|system|>Add.<end>\n<|user|>1+1?<end>\n<|assistant|>"


def test_a_template_that_reads_parts_is_given_parts() -> None:
    row = {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": parts(" 1+1 ", "?")}]}
    assert text_of(row, PARTS) == "<|system|>Add.<|user|>[1+1][?]<|assistant|>"


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content | tojson }}", "{{ 'a' + messages[0].content }}", "{{ messages[0].content }}"]
)
def test_a_template_that_prints_or_refuses_parts_is_given_the_text(template: str) -> None:
    found = text_of({"prompt": [{"role": "user", "content": parts("1+1", "?")}]}, Codec(byte_level(template)))
    assert found.strip('a"') == "1+1?"


def test_a_template_that_leaves_parts_out_is_given_the_text() -> None:
    codec = Codec(byte_level("{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}?"))
    assert text_of({"prompt": [{"role": "user", "content": parts("1+1")}]}, codec) == "1+1?"


@pytest.mark.parametrize("codec", [PLAIN, PARTS])
@pytest.mark.parametrize(
    "part, named", [({"type": "image", "image": "a.png"}, "'image'"), ({"type": "video"}, "'video'"), (7, "7")]
)
def test_a_part_that_is_no_text_is_refused_by_name(codec: Codec, part: Any, named: str) -> None:
    row = {"prompt": [QUESTION, {"role": "user", "content": [*parts("what is it?"), part]}]}
    with pytest.raises(DataError, match=rf"row 0 .*message 1 has a part .*{named} in its content, and only texts"):
        one(row, codec)
    with pytest.raises(DataError, match=rf"Message 1 has a part .*{named}"):
        codec.render(row["prompt"])


def test_a_last_message_in_parts_is_continued() -> None:
    row = {"prompt": [QUESTION, {"role": "assistant", "content": parts("It", " is")}]}
    assert text_of(row).endswith("<|assistant|>It is")


# --- tools and options of a row ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS), tuple(TOOLS)])
def test_a_rows_tools_and_options_reach_the_template(given: Any) -> None:
    row = {"prompt": [QUESTION], "tools": given, "chat_template_kwargs": {"mood": "calm"}}
    assert text_of(row) == "<|user|>1+1?<end>\ntools:1\nmood:calm\n<|assistant|>"
    assert one(row).row["tools"] == given, "a reward may ask for them too"
    assert text_of({"prompt": [QUESTION], "tools": None, "chat_template_kwargs": None}) == PLAIN.render([QUESTION])


def test_a_rows_options_win_over_the_jobs() -> None:
    codec = Codec(byte_level(CHAT_TEMPLATE), chat_template_kwargs={"mood": "calm", "tools": TOOLS * 3})
    row = {"prompt": [QUESTION], "tools": TOOLS, "chat_template_kwargs": '{"mood": "wild"}'}
    assert text_of(row, codec) == "<|user|>1+1?<end>\ntools:1\nmood:wild\n<|assistant|>"


@pytest.mark.parametrize(
    "columns, reason",
    [
        ({"tools": "add"}, "column 'tools' is a text and no JSON"),
        ({"tools": {"add": 1}}, "column 'tools' has to be a list of tools"),
        ({"chat_template_kwargs": [1]}, "column 'chat_template_kwargs' has to be an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "sets tokenize, which is not for the chat template"),
    ],
)
def test_options_that_are_none_are_refused_with_their_row(columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=rf"row 0 .*{reason}"):
        one({"prompt": [QUESTION], **columns})


def test_a_reward_model_reads_the_tools_too() -> None:
    row = {"prompt": [QUESTION], "completion": "2", "label": 1, "tools": TOOLS}
    [example] = load_examples([row], "outcome")
    ids = OutputEncoder(PLAIN)(rows_of(example)[0]).token_ids
    assert PLAIN.decode(ids, False) == "<|user|>1+1?<end>\n<|assistant|>2<end>\ntools:1\n"


# --- BOS --------------------------------------------------------------------------------------------------------------


def test_a_text_that_begins_with_bos_gets_no_second_one() -> None:
    plain = PLAIN.encode_text("1+1=")
    assert PLAIN.encode_prompt("1+1=") == (1, *plain)
    assert PLAIN.encode_prompt("<bos>1+1=") == (1, *plain)
    assert PLAIN.encode_prompt("<bos><bos>1+1=") == (1, 1, *plain), "what is written twice is meant"
    assert PLAIN.encode_prompt("<end>1+1=") == (1, 0, *plain)
    assert [PLAIN.begins_itself(text) for text in ("1+1=", "<bos>1+1=", "<end>1")] == [False, True, False]


# --- what a job makes of prompts --------------------------------------------------------------------------------------


def test_texts_become_messages_where_the_job_says_so() -> None:
    assert text_of({"prompt": "1+1?"}, chat=True) == "<|user|>1+1?<end>\n<|assistant|>"
    for row in ({"prompt": "1+1?"}, {"prompt": [QUESTION]}):
        assert text_of(row, system="Add.") == "<|system|>Add.<end>\n<|user|>1+1?<end>\n<|assistant|>"
    with pytest.raises(DataError, match=r"row 0 .*has a system message of its own, and data\.system"):
        one({"prompt": [{"role": "system", "content": "No."}, QUESTION]}, system="Add.")


def test_answers_at_the_end_are_left_off_where_the_job_says_so() -> None:
    messages = [QUESTION, {"role": "assistant", "content": "2"}]
    assert text_of({"prompt": messages}).endswith("<|assistant|>2")
    assert text_of({"prompt": messages}, drop_answer=True) == PLAIN.render([QUESTION])
    found = one({"messages": messages}, prompt_column="messages", drop_answer=True)
    assert found.content == [QUESTION]
    assert found.row == {"messages": messages}, "rewards can ask for the column as it was"
    with pytest.raises(DataError, match="messages of the assistant's only"):
        one({"prompt": messages[1:]}, drop_answer=True)
