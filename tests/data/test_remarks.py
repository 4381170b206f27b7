"""What is said of prompts that can be used, but may not be what was meant: once, with numbers and what would do."""

from __future__ import annotations

from typing import Any

from groupwise.config import DataSection
from groupwise.data.files import load_prompts
from groupwise.data.remarks import GIVEN, remarks
from groupwise.rewards.functions.calling import HELPERS
from groupwise.tokenizer.codec import Codec
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level

CHAT, BARE = Codec(byte_level(CHAT_TEMPLATE)), Codec(byte_level())
ASKED = [{"role": "user", "content": "1+1?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "2"}]


def said(*rows: Any, codec: Codec = CHAT, **section: Any) -> list[str]:
    found = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    return remarks(load_prompts(DataSection(**section), codec, rows=found).prompts, codec)


def test_of_prompts_as_they_should_be_nothing_is_said() -> None:
    assert said(ASKED, ASKED) == []
    assert said("1+1?", codec=BARE) == []
    assert said("1+1?", chat=True) == []
    assert said(ANSWERED, drop_answer=True) == []


def test_texts_to_a_chat_model_are_named_with_the_key_that_wraps_them() -> None:
    [remark] = said("1+1?", "2+2?", ASKED)
    assert remark.startswith("2 of 3 prompts are texts, and the model has a chat template")
    assert "data.chat = true" in remark
    assert "data.system" in remark
    assert said("1+1?")[0].startswith("The prompt is a text")
    assert said("1+1?", "2+2?")[0].startswith("All 2 prompts are texts")


def test_texts_that_a_template_wrote_begin_with_bos_and_are_no_plain_texts() -> None:
    [remark] = said("<bos><|user|>1+1?", ASKED)
    assert remark.startswith("1 of 2 prompts begin with what the tokenizer puts before a text ('<bos>')")
    assert "no second one is added" in remark


def test_prompts_that_end_in_an_answer_are_counted_with_how_to_leave_it_off() -> None:
    [remark] = said(ANSWERED, ASKED, ANSWERED)
    assert remark.startswith("2 of 3 prompts end in a message of the assistant's, which the model goes on from")
    assert "data.drop_answer = true" in remark


def test_tools_that_no_template_reads_are_named() -> None:
    row = {"prompt": ASKED, "tools": [{"name": "add"}], "chat_template_kwargs": {"deep": 1, "mood": "calm"}}
    assert [remark.split("`")[1] for remark in said(row)] == ["deep"], "this template reads tools and mood"
    blind = Codec(byte_level("{{ messages[0].content }}"))
    assert [remark.split("`")[1] for remark in said(row, codec=blind)] == ["deep", "mood", "tools"]


def test_tools_beside_a_text_are_named() -> None:
    [remark] = said({"prompt": "1+1?", "tools": [{"name": "add"}]}, codec=BARE)
    assert remark.startswith("The row has a column `tools`, which is for the chat template")


def test_columns_that_the_outputs_hide_are_named() -> None:
    [remark] = said({"prompt": "1+1?", "completions": "2", "answer": "2"}, codec=BARE)
    assert remark.startswith("The column `completions` of the data is read by nothing")


def test_they_are_the_names_that_functions_are_given() -> None:
    assert set(HELPERS) < set(GIVEN)
