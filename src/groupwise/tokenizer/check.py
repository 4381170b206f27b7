"""Does a tokenizer keep what the data says? Silent loss would be a wrong experiment, so it is an error beforehand."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from groupwise.errors import ModelError
from groupwise.wording import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from groupwise.tokenizer.codec import Codec


def check(codec: Codec, own: Tokenizer | None, texts: Sequence[str]) -> list[str]:
    """Raise ModelError where the tokenizer differs from its file or loses characters; warn of the rest."""
    for text in texts:
        if own is not None:
            _compare(codec, own, text)
        if lost := lost_characters(codec, text):
            raise ModelError(
                f"The tokenizer ({type(codec.tokenizer).__name__}) loses {', '.join(map(repr, lost[:20]))} of the text"
                f" {shown(text)}: the model would never see it. Use a tokenizer that knows these characters, or take"
                " them out of the data."
            )
    return [*_normalises(codec, texts), *_appends_end(codec, texts), *_end_tokens(codec)]


def lost_characters(codec: Codec, text: str) -> list[str]:
    """The characters that encoding loses: refused, turned into the unknown token, or never seen again when decoded.

    Case, compatibility forms (NFKC) and the number of repeated characters may change; control and format characters
    may vanish.
    """

    def unknown(part: str) -> bool:
        ids = _attempt(codec.encode_text, part)
        return ids is None or (codec.tokenizer.unk_token_id in ids and codec.tokenizer.unk_token not in part)

    characters = sorted(set(text))
    if unknown(text):
        return [character for character in characters if unknown(character)] or characters
    missing = _folded(text) - _folded(codec.decode(codec.encode_text(text), skip_special_tokens=False))
    return [character for character in characters if _folded(character) & missing]


def _folded(text: str) -> set[str]:
    """The kinds of characters in a text, as far as a tokenizer has to keep them apart."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return {c for c in folded if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf")}


def _attempt(encode: Callable[[str], Sequence[int]], text: str) -> tuple[int, ...] | None:
    """Token ids, or None where a tokenizer without an unknown token refuses the text."""
    try:
        return tuple(encode(text))
    except Exception:  # noqa: BLE001 - a plain Exception is what `tokenizers` raises; the caller reports it
        return None


def _compare(codec: Codec, own: Tokenizer, text: str) -> None:
    ids = _attempt(codec.encode_text, text)
    expected = _attempt(lambda part: own.encode(part, add_special_tokens=False).ids, text)
    if ids == expected:
        return
    made, filed = (
        "refused" if found is None else f"{len(found)} tokens {shown(list(found))}" for found in (ids, expected)
    )
    raise ModelError(
        f"AutoTokenizer made a {type(codec.tokenizer).__name__} that is unlike the model's own tokenizer.json: the text"
        f" {shown(text)} is {made} under the first, {filed} under the second. transformers picks the class by"
        " model_type and may ignore the file. If tokenizer.json is right, load it with"
        " PreTrainedTokenizerFast(tokenizer_file=...) and give that one, or save the model under a model_type that"
        " keeps its own tokenizer (qwen3, llama); if the file is stale, write it again with"
        " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
    )


def _normalises(codec: Codec, texts: Sequence[str]) -> list[str]:
    for text in texts:
        decoded = codec.decode(codec.encode_text(text), skip_special_tokens=False)
        if decoded != text:
            return [f"The tokenizer changes text: {shown(text)} is read as {shown(decoded)}."]
    return []


def _appends_end(codec: Codec, texts: Sequence[str]) -> list[str]:
    last = {encode(text)[-1:] for text in texts[:1] for encode in (codec.encode_prompt, codec.encode_text)}
    if len(last) == 2 and any(codec.end_token_ids.intersection(tokens) for tokens in last):
        return ["The tokenizer appends an end token to prompts: set add_eos_token to false in tokenizer_config.json."]
    return []


def _end_tokens(codec: Codec) -> list[str]:
    if not codec.end_token_ids:
        return [
            "No end token is known, so outputs only end at their longest: set eos_token in tokenizer_config.json or"
            " eos_token_id in generation_config.json."
        ]
    ordinary = sorted(codec.end_token_ids - codec.tokenizer.added_tokens_decoder.keys())
    return [
        f"The end token {token_id} is the ordinary text {text!r}: outputs end there. If that is a left-over default,"
        " correct eos_token_id in config.json and generation_config.json."
        for token_id in ordinary
        if (text := codec.decode([token_id]))
    ]
