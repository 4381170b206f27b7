"""What reward models read: outputs and steps as text, and the rows of token ids that they become.

A text is encoded by the reward model's own tokenizer, whatever tokens it was sampled as. Each step is encoded by
itself, so that no token lies across the end of a step, and is judged at its last token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final, NamedTuple, Protocol

from groupwise.errors import DataError, ModelError
from groupwise.tokenizer.codec import Codec
from groupwise.types import Message

Content = str | list[Message]
_ANSWER: Final = "AnyAnswerWhatever"
"""An answer that every chat template writes as it is, and that no prompt has."""


@dataclass(frozen=True, slots=True)
class Output:
    """A prompt and an output to it, to be judged as a whole. `finished`: it ended by itself, not at a length limit.

    `options` are the prompt's own for the chat template, such as its tools.
    """

    prompt: Content
    text: str
    finished: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Steps:
    """A prompt and the steps of an output to it, to be judged one by one; `options` as in `Output`."""

    prompt: Content
    texts: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Graded:
    """An output and how right it is: 0 is wrong, 1 is right."""

    output: Output
    label: float


@dataclass(frozen=True, slots=True)
class Preferred:
    """Two outputs of which one is the better."""

    chosen: Output
    rejected: Output


@dataclass(frozen=True, slots=True)
class Stepwise:
    """Steps and how right each is, from 0 to 1; None where nobody knows."""

    steps: Steps
    labels: tuple[float | None, ...]


Example = Graded | Preferred | Stepwise
Judged = Output | Steps


class Row(NamedTuple):
    """Token ids, and the indices of the tokens at which steps are judged; none where the row is judged as a whole."""

    token_ids: tuple[int, ...]
    places: tuple[int, ...] = ()


class Encoder(Protocol):
    """Makes rows of what is judged."""

    def __call__(self, judged: Judged) -> Row:
        """The row. Raises DataError or ModelError where the tokenizer or its template refuses the text."""


@dataclass(frozen=True)
class OutputEncoder:
    """Whole outputs: messages as the chat template says, texts as prompt, output and end token.

    A tokenizer with `[CLS]` and `[SEP]` joins prompt and output as its own pairs. An output that did not finish has no
    end token, and no end of its message. All of an output is in its row, also where the template leaves part of it out,
    as those of DeepSeek-R1's family do with what stands before `</think>`.
    """

    codec: Codec

    def __call__(self, judged: Judged) -> Row:
        """See `Encoder`."""
        assert isinstance(judged, Output)
        codec, tokenizer = self.codec, self.codec.tokenizer
        if not isinstance(judged.prompt, str):
            return Row(codec.encode_text(self._conversation(judged)))
        if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
            return Row(tuple(tokenizer(judged.prompt, judged.text, verbose=False)["input_ids"]))
        ids = codec.encode_prompt(judged.prompt) + codec.encode_text(judged.text)
        end = tokenizer.eos_token_id
        return Row(ids + ((end,) if judged.finished and end is not None else ()))

    def _conversation(self, judged: Output) -> str:
        """The text of a conversation that the output ends: the template's, where that has all of the output."""
        text = judged.text
        try:
            rendered = self._rendered(judged, text, judged.finished)
        except DataError:
            # Of an answer that is left open a template must write the last part as it is, or it is refused.
            rendered = ""
        if "".join(text.split()) in "".join(rendered.split()):  # templates may strip blanks
            return rendered
        before, found, after = self._rendered(judged, _ANSWER, finished=True).rpartition(_ANSWER)
        if not found:
            raise DataError(
                "The reward model's chat template leaves out part of the output, which would not be judged."
            )
        return before + text + (after if judged.finished else "")

    def _rendered(self, judged: Output, text: str, finished: bool) -> str:
        messages: list[Message] = [*judged.prompt, {"role": "assistant", "content": text}]
        return (self.codec.render_whole if finished else self.codec.render)(messages, judged.options)

    def last_tokens(self) -> frozenset[int]:
        """The tokens that rows of finished outputs end with, of texts and of conversations."""
        found: set[int] = set()
        prompts: tuple[Content, ...] = ("", [{"role": "user", "content": "a"}])
        for prompt in prompts:
            try:
                found.update(self(Output(prompt, "a")).token_ids[-1:])
            except (DataError, ModelError):
                continue  # no such rows: there is no chat template, or the tokenizer has not these letters
        return frozenset(found)


@dataclass(frozen=True)
class StepEncoder:
    """Steps as TRL's stepwise trainer has them: each is followed by the separator, and judged at its last token."""

    codec: Codec
    separator: str

    def __call__(self, judged: Judged) -> Row:
        """See `Encoder`."""
        assert isinstance(judged, Steps)
        after = self.codec.encode_text(self.separator)
        pieces = [self.codec.encode_prompt(judged.prompt, judged.options)]
        pieces += [self.codec.encode_text(bare(text, self.separator)) + after for text in judged.texts]
        ends = list(accumulate(map(len, pieces)))[1:]
        return Row(tuple(token for piece in pieces for token in piece), tuple(end - 1 for end in ends))


class Tags(NamedTuple):
    """What a causal model was trained to say after each step: the tag's text, and the words for right and wrong."""

    tag: str
    right: str
    wrong: str


class TagEncoder:
    """Steps as Math-Shepherd's model has them: `prompt step1 TAG\\nstep2 TAG`, each judged at its tag.

    `verdicts` are the token ids of wrong and right. Raises ModelError where tag or words are no single tokens.
    """

    def __init__(self, codec: Codec, tags: Tags) -> None:
        self.codec, self.tags = codec, tags
        self.tag_id = self._single(tags.tag)
        self.verdicts = self._single(tags.wrong), self._single(tags.right)

    def __call__(self, judged: Judged) -> Row:
        """See `Encoder`. Raises DataError where a step has the tag in its own text."""
        assert isinstance(judged, Steps)
        steps = "\n".join(f"{bare(text, self.tags.tag)} {self.tags.tag}" for text in judged.texts)
        if isinstance(judged.prompt, str):
            ids = self.codec.encode_prompt(f"{judged.prompt.rstrip()} {steps}")
        else:
            ids = self.codec.encode_text(self.codec.render(judged.prompt, judged.options) + steps)
        asked = self.codec.encode_prompt(judged.prompt, judged.options).count(self.tag_id)
        places = [index for index, token in enumerate(ids) if token == self.tag_id][asked:]
        if len(places) != len(judged.texts):
            raise DataError(
                f"The tag {self.tags.tag!r} was found {len(places)} times in {len(judged.texts)} steps: their own text "
                "has it."
            )
        return Row(ids, tuple(places))

    def _single(self, word: str) -> int:
        """The token that stands for a word after a space, which is how the words are met."""
        codec = self.codec
        ids = codec.encode_text(f" {word}") or codec.encode_text(word)
        if not ids or codec.decode(ids[-1:], skip_special_tokens=False).strip() != word:
            raise ModelError(
                f"{word!r} is no single token of the tokenizer ({type(codec.tokenizer).__name__}), as a tag has to be: "
                "`reward.step_tags` names tag, right and wrong as the model was trained with."
            )
        return ids[-1]


def bare(step: str, separator: str) -> str:
    """A step's text without the separator and the blanks at its end, which every reader puts back in its own way."""
    return step.rstrip().removesuffix(separator.strip()).rstrip() if separator.strip() else step.rstrip()


def rows_of(example: Example) -> Sequence[Judged]:
    """What of an example is judged: one output, two, or steps."""
    if isinstance(example, Preferred):
        return (example.chosen, example.rejected)
    return (example.output,) if isinstance(example, Graded) else (example.steps,)


def prompt_of(example: Example) -> str:
    """What tells an example's prompt from others: the prompt itself or, of texts without one, the better text."""
    prompt = rows_of(example)[0].prompt
    if not prompt and isinstance(example, Preferred):
        return example.chosen.text
    return json.dumps(prompt, sort_keys=True)
