"""The tokenizer, owned once: prompts to token ids, outputs to text, end tokens, characters <-> tokens, stop strings.

Token ids are carried from here on and never made again from text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from groupwise.errors import ConfigError, DataError, ModelError
from groupwise.tokenizer import check, files
from groupwise.tokenizer.clock import start_of, stopped
from groupwise.tokenizer.template import suited
from groupwise.types import Message
from groupwise.wording import half_character, one_line, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN: Final = "\ufffd"
"""What decoders write for bytes that are no whole character (yet)."""

SET_BY_CODEC: Final = frozenset(
    {"conversation", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "return_tensors"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs", "padding", "truncation", "max_length"}
)
"""Arguments of `apply_chat_template` that are no options of a template."""


def reserved(options: Mapping[str, Any]) -> str:
    """The options that are no options of a template, in words; empty where there are none."""
    taken = ", ".join(sorted(SET_BY_CODEC & options.keys()))
    advice = "which is not for the chat template to read; leave only options of the template, such as enable_thinking"
    return taken and f"{taken}, {advice}"


class Codec:
    """Text to token ids and back, by one Hugging Face tokenizer.

    `end_token_ids` is the set of tokens that end an output. A pad token is never needed and may equal one of them.
    Neither is part of an output's text. `special_token_ids` are the other special tokens, such as some models'
    `<think>`; they are part of it unless `skip_special_tokens`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_token_ids: Iterable[int] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str | None = None,
        source: Path | None = None,
        skip_special_tokens: bool = False,
    ) -> None:
        """Own `tokenizer`; its eos token joins `end_token_ids`. `source` is the folder that its files came from.

        `date` (`"2026-12-01"`) is what templates are told is today; default: the day on which this codec was made, so
        that what it renders does not change at midnight. Raises ConfigError for template options that are the codec's
        own business.
        """
        own_end = tokenizer.eos_token_id
        self.tokenizer = tokenizer
        self.end_token_ids = frozenset(end_token_ids) | (frozenset() if own_end is None else {int(own_end)})
        special = files.special_ids(tokenizer)
        self.special_token_ids = special - self.end_token_ids - {tokenizer.pad_token_id}
        self.skip_special_tokens = skip_special_tokens
        self._silent_ids = special if skip_special_tokens else special - self.special_token_ids
        self._template_options = dict(chat_template_kwargs or {})
        self._today = start_of(date)
        self._source = source
        self._pieces: dict[int, str] = {}
        if taken := reserved(self._template_options):
            raise ConfigError(f"chat_template_kwargs sets {taken}.")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str | None = None,
        eos_token_ids: Iterable[int] | None = None,
        skip_special_tokens: bool = False,
    ) -> Codec:
        """Load the tokenizer of a Hugging Face folder or hub id.

        Without `eos_token_ids` the end tokens are those of the tokenizer, generation_config.json and config.json
        together; nothing else of the generation config is used. Raises ModelError where it cannot be loaded.
        """
        tokenizer = files.load_tokenizer(path, revision, trust_remote_code)
        source = files.source_folder(path, revision)
        ends = files.configured_end_ids(source) if eos_token_ids is None else eos_token_ids
        return cls(
            tokenizer, end_token_ids=ends, chat_template_kwargs=chat_template_kwargs, date=date, source=source,
            skip_special_tokens=skip_special_tokens,
        )  # fmt: skip

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id; a model may have more rows than that, never fewer."""
        return int(max(self.tokenizer.get_vocab().values())) + 1

    def encode_prompt(
        self, content: str | Sequence[Message], options: Mapping[str, Any] | None = None
    ) -> tuple[int, ...]:
        """Token ids of a prompt: a string as the tokenizer encodes it (BOS and all), messages as the template says.

        A string that begins with BOS, as a template writes it, gets no second one. `options` are those of the template
        for this prompt alone, such as its tools. Raises ModelError without a chat template, DataError for messages or
        characters that are refused.
        """
        if isinstance(content, str):
            return self._begun_once(content)
        return self.encode_text(self.render(content, options))  # a template writes its special tokens itself

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of a text as it stands: no special token is added, those written out in it are recognised.

        Raises DataError for characters that the tokenizer refuses.
        """
        return self._encode(text, add_special_tokens=False)

    def render(self, content: str | Sequence[Message], options: Mapping[str, Any] | None = None) -> str:
        """The text that a prompt is encoded from. A last message of the assistant is left open, to be continued.

        `options` are as in `encode_prompt`. Raises ModelError without a chat template, DataError where the template
        refuses the messages.
        """
        if isinstance(content, str):
            return content
        prefilled = bool(content) and content[-1].get("role") == "assistant"
        return self._templated(content, options, asked=not prefilled, left_open=prefilled)

    def render_whole(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> str:
        """The text of a conversation that is over: its last message is closed, and no answer is asked for.

        Raises as `render` does.
        """
        return self._templated(messages, options, asked=False, left_open=False)

    def _templated(
        self, messages: Sequence[Message], options: Mapping[str, Any] | None, *, asked: bool, left_open: bool
    ) -> str:
        if not self.has_template:
            raise ModelError(
                "The prompts are messages, but the tokenizer has no chat template. Use a chat model, put a"
                " chat_template.jinja into the model's folder, or give the prompts as plain strings."
            )
        options = {**self._template_options, **(options or {})}

        def render(conversation: Sequence[Message]) -> str:
            with stopped(self._today):
                return str(
                    self.tokenizer.apply_chat_template(
                        list(conversation), tokenize=False, add_generation_prompt=asked,
                        continue_final_message=left_open, **options,
                    )
                )  # fmt: skip

        messages = suited(messages, render)
        try:
            return render(messages)
        except Exception as error:  # a template is somebody's program: it may raise anything
            raise DataError(f"The chat template refuses the messages {shown(messages)}: {one_line(error)}") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool | None = None) -> str:
        """The text of token ids as they spell it: spaces are not cleaned up, whatever the tokenizer's config says.

        By default that is an output's text: without end and pad tokens, and with the other special ones unless the
        codec skips them. True skips every special token, False none.
        """
        if skip_special_tokens is None:
            token_ids = [token_id for token_id in token_ids if token_id not in self._silent_ids]
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=bool(skip_special_tokens), clean_up_tokenization_spaces=False
            )
        )

    def offsets(self, token_ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """The decoded text, and per token how many of its leading characters are complete once the token is there.

        A character that several tokens share is complete after the last: "é!" as the bytes C3 | A9 21 has ends (0, 2).
        """
        text = self.decode(token_ids)
        runs = list(self._whole_runs(token_ids))
        joined = "".join(run[-1] for run in runs)
        if not joined.endswith(text):  # this decoder looks further than one token back
            runs = [[self.decode(token_ids[: t + 1]) for t in range(len(token_ids))]]
            joined = text
        ends: list[int] = []
        start = len(text) - len(joined)  # negative where the decoder drops a leading space
        for run in runs:
            ends += [max(0, start + end) for end in _complete(run)]
            start += len(run[-1])
        return text, tuple(ends)

    def piece(self, token_ids: Sequence[int], skip_special_tokens: bool | None = None) -> str:
        """The text that tokens add when they follow another one; `BROKEN` stands for part of a character."""
        anchor, before = self._anchor
        text = self.decode([anchor, *token_ids], skip_special_tokens)
        return text[len(before) :] if text.startswith(before) else BROKEN

    def check(self, texts: Iterable[str]) -> list[str]:
        """Hold the tokenizer against its own tokenizer.json and against sample texts; return warnings.

        Raises ModelError where AutoTokenizer made another tokenizer than the file says, or where characters are lost.
        One that merely normalises (case, compatibility forms, spaces) gives a warning.
        """
        own = files.own_tokenizer(self._source)
        return check.check(self, own, list(texts))

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files into `directory`: byte for byte as they came, where they came from a folder."""
        if not files.copy_tokenizer(self._source, directory):
            self.tokenizer.save_pretrained(directory)

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered."""
        return self.tokenizer.chat_template is not None or "chat_template" in self._template_options

    @cached_property
    def opening(self) -> str:
        """What the tokenizer puts before a text, such as BOS, as far as it has a special token for it."""
        return str(self.tokenizer.bos_token or self.tokenizer.cls_token or "")

    def begins_itself(self, text: str) -> bool:
        """Whether a text begins with what the tokenizer would put before it, such as BOS."""
        begun = text.startswith(self._openings)
        return begun and self._encode(text, add_special_tokens=True) != self._begun_once(text)

    def _begun_once(self, text: str) -> tuple[int, ...]:
        """Token ids with what the tokenizer puts before a text, unless the text begins with that already."""
        ids = self._encode(text, add_special_tokens=True)
        if not text.startswith(self._openings):
            return ids
        plain = self.encode_text(text)
        places = range(1, len(ids) - len(plain) + 1)
        start = next((n for n in places if ids[n : n + len(plain)] == plain and plain[:n] == ids[:n]), 0)
        return ids[start:]

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            return tuple(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
        except Exception as error:  # what `tokenizers` raises for a character without a token is a plain Exception
            if half := half_character(text):
                raise DataError(f"{shown(text)} {half}") from error
            raise DataError(f"The tokenizer cannot encode {shown(text)}: {one_line(error)}") from error

    def _whole_runs(self, token_ids: Sequence[int]) -> Iterator[list[str]]:
        """The shortest runs of tokens that spell whole characters, each as its growing text: ["a"], [BROKEN, "é!"]."""
        run: list[int] = []
        texts: list[str] = []
        for token_id in token_ids:
            run.append(token_id)
            texts.append(self.piece(run) if len(run) > 1 else self._cached_piece(token_id))
            if not texts[-1].endswith(BROKEN):
                yield texts
                run, texts = [], []
        if run:
            yield texts

    def _cached_piece(self, token_id: int) -> str:
        if token_id not in self._pieces:
            self._pieces[token_id] = self.piece([token_id])
        return self._pieces[token_id]

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        """What a text begins with that may bring its BOS along: any special token."""
        return tuple(token for token in self.tokenizer.all_special_tokens if token)

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token to decode others after, and its text: decoders treat the first token of a text differently."""
        for token_id in sorted(self.tokenizer.get_vocab().values()):
            text = self.decode([token_id], skip_special_tokens=True)
            if text.strip() and BROKEN not in text:
                return token_id, text
        raise ModelError(f"The tokenizer ({type(self.tokenizer).__name__}) has no token that stands for text.")


def _complete(texts: Sequence[str]) -> list[int]:
    """Per growing text of one run, how many leading characters of the last one it holds for good."""
    ends = [_common_start(text.rstrip(BROKEN), texts[-1]) for text in texts[:-1]] + [len(texts[-1])]
    return list(accumulate(reversed(ends), min))[::-1]


def _common_start(a: str, b: str) -> int:
    """The number of leading characters that two texts share."""
    if b.startswith(a):
        return len(a)
    return next(i for i, (x, y) in enumerate(zip(a, b + "\0", strict=False)) if x != y)
