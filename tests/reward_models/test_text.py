"""Texts to rows: what a reward model is shown, and where its steps are judged."""

from __future__ import annotations

import pytest

from groupwise.errors import DataError, ModelError
from groupwise.reward_models.text import (
    Graded,
    Output,
    OutputEncoder,
    Preferred,
    StepEncoder,
    Steps,
    Stepwise,
    TagEncoder,
    Tags,
    bare,
    rows_of,
)
from groupwise.tokenizer.codec import Codec
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level, character_level, wrapped

CODEC = Codec(character_level("ab \n#+-"))
END = 0


def ids(text: str) -> tuple[int, ...]:
    return CODEC.encode_text(text)


def test_a_finished_output_has_its_end_token_and_one_that_was_cut_has_none() -> None:
    encode = OutputEncoder(CODEC)
    assert encode(Output("a", "b")).token_ids == (*ids("ab"), END)
    assert encode(Output("a", "b", finished=False)).token_ids == ids("ab")
    assert encode(Output("", "")).token_ids == (END,)
    assert encode(Output("a", "b")).places == ()


def test_messages_go_through_the_chat_template() -> None:
    codec = Codec(byte_level(CHAT_TEMPLATE))
    asked = [{"role": "user", "content": "1+1?"}]
    encode = OutputEncoder(codec)
    closed = "<|user|>1+1?<end>\n<|assistant|>2<end>\n"
    assert encode(Output(asked, "2")).token_ids == codec.encode_text(closed)
    assert encode(Output(asked, "2", finished=False)).token_ids == codec.encode_text(
        "<|user|>1+1?<end>\n<|assistant|>2"
    )
    with pytest.raises(ModelError, match="no chat template"):
        OutputEncoder(CODEC)(Output(asked, "2"))


R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] | trim }}<end>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
"""DeepSeek-R1's way: what an answer says before `</think>` is not part of the conversation."""


@pytest.mark.parametrize("reasoning", ["12 is 10 + 2", "", "so </think> it is"])
def test_what_a_template_drops_of_an_output_is_judged_all_the_same(reasoning: str) -> None:
    codec = Codec(byte_level(R1))
    encode, asked = OutputEncoder(codec), [{"role": "user", "content": "10+2?"}]
    text = f"<think>{reasoning}</think>\n\nThe answer is 12."
    whole, cut = (
        codec.decode(encode(Output(asked, text, finished)).token_ids, skip_special_tokens=False)
        for finished in (True, False)
    )
    assert whole == f"<|user|>10+2?<|assistant|>{text}<end>\n"
    assert cut == f"<|user|>10+2?<|assistant|>{text}"
    plain = codec.decode(encode(Output(asked, " 12 ")).token_ids, skip_special_tokens=False)
    assert plain == "<|user|>10+2?<|assistant|>12<end>\n", "what the template writes otherwise stays as it is"


def test_an_output_that_a_template_does_not_write_is_not_judged() -> None:
    codec = Codec(byte_level("{% for m in messages %}{{ m.content if m.role == 'user' else 'said' }}{% endfor %}"))
    with pytest.raises(DataError, match="leaves out part of the output"):
        OutputEncoder(codec)(Output([{"role": "user", "content": "a"}], "b"))


def test_a_tokenizer_of_pairs_joins_them_as_its_own() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3, "b": 4}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    codec = Codec(wrapped(core, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"))
    assert OutputEncoder(codec)(Output("a", "b b")).token_ids == (0, 3, 1, 4, 4, 1)


def test_each_step_is_followed_by_the_separator_and_judged_at_its_last_token() -> None:
    row = StepEncoder(CODEC, "\n")(Steps("a", ("b b\n", "a", "ab")))
    assert row.token_ids == ids("ab b\na\nab\n")
    assert row.places == (4, 6, 9)
    row = StepEncoder(CODEC, " #\n")(Steps("a", ("b #\n", "a \n")))
    assert row.token_ids == ids("ab #\na #\n")
    assert row.places == (4, 8)
    assert StepEncoder(CODEC, "\n")(Steps("a", ())).places == ()


@pytest.mark.parametrize(
    "step, separator, expected",
    [("a\n", "\n", "a"), ("a", "\n", "a"), ("\n a \n\n", "\n", "\n a"), ("a #", "#", "a"), ("a# \n", " #", "a")],
)
def test_what_every_reader_puts_back_is_taken_off(step: str, separator: str, expected: str) -> None:
    assert bare(step, separator) == expected


def test_a_tag_follows_each_step_and_is_where_it_is_judged() -> None:
    encode = TagEncoder(CODEC, Tags("#", "+", "-"))
    row = encode(Steps("a# ", ("ab\n", "b")))
    assert row.token_ids == ids("a# ab #\nb #")
    assert row.places == (6, 10), "the tag in the prompt is none of a step's"
    assert encode.verdicts == (ids("-")[0], ids("+")[0])
    with pytest.raises(DataError, match="found 3 times in 2 steps"):
        encode(Steps("a", ("a#b", "b")))


@pytest.mark.parametrize("tags, word", [(("##", "+", "-"), "##"), (("#", "aa", "-"), "aa"), (("#", "+", "?"), "?")])
def test_a_tag_is_one_token(tags: tuple[str, str, str], word: str) -> None:
    codec = Codec(character_level("ab \n#+-", unknown=True))
    with pytest.raises(ModelError, match="is no single token") as caught:
        TagEncoder(codec, Tags(*tags))
    assert repr(word) in str(caught.value)


def test_what_is_judged_of_each_kind_of_example() -> None:
    one, other, steps = Output("a", "b"), Output("a", "a"), Steps("a", ("b",))
    assert rows_of(Graded(one, 1.0)) == (one,)
    assert rows_of(Preferred(one, other)) == (one, other)
    assert rows_of(Stepwise(steps, (1.0,))) == (steps,)
