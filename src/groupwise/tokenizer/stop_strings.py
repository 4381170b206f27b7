"""Stop strings: the token that completes one is found as it is drawn, however the tokenizer writes characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groupwise.errors import ConfigError
from groupwise.tokenizer.codec import BROKEN, Codec

_MOST_BYTES: Final = 4
"""Bytes of a character in UTF-8, and so the most tokens that share one."""


class StopChecker:
    """Finds the token that completes a stop string, without decoding whole outputs.

    `may_stop_V` (bool, one per token of the vocabulary) is True for tokens that may complete one: index it with the
    new tokens, and ask `ends_with_stop` only where it is True. Special tokens count as text here, so that a stop
    string may name one.
    """

    def __init__(self, codec: Codec, stop: Sequence[str], vocab_size: int | None = None) -> None:
        """Decode each token of the vocabulary once. `vocab_size` is the model's, where it has more rows.

        Raises ConfigError for an empty stop string.
        """
        if "" in stop:
            raise ConfigError("A stop string is empty: every output would end at once. Take it out of `stop`.")
        self._codec = codec
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self.may_stop_V: NDArray[np.bool_] = np.zeros(max(vocab_size or 0, codec.vocab_size), dtype=np.bool_)
        if not stop:
            return  # the vocabulary need not be decoded
        last_characters = {text[-1] for text in stop}
        if not all(character.isascii() for character in last_characters):
            last_characters.add(BROKEN)  # part of a character may complete one, while ASCII never comes in parts
        for token_id in codec.tokenizer.get_vocab().values():
            piece = codec.piece([token_id], skip_special_tokens=False)
            self.may_stop_V[token_id] = not last_characters.isdisjoint(piece)

    def ends_with_stop(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of an output's tokens completes a stop string (it may hold characters after it, too)."""
        if not token_ids or not self.may_stop_V[token_ids[-1]]:
            return False
        before, text = self._tail(token_ids)
        return any(text.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in self._stop)

    def _tail(self, token_ids: Sequence[int]) -> tuple[str, str]:
        """The end of the output without and with its last token: as much as the longest stop string can reach.

        Both are cut at whole characters. A decoder may turn a whole run of bytes into replacement characters where the
        run begins or ends inside a character, and those would be counted as characters that are none.
        """
        tokens = self._longest + 1
        while True:
            start = self._start_of_character(token_ids, max(0, len(token_ids) - 1 - tokens))
            before = self._whole_characters(token_ids[start:-1])
            if start == 0 or len(before.lstrip(BROKEN)) >= self._longest:
                return before, self._decode(token_ids[start:])
            tokens *= 2

    def _start_of_character(self, token_ids: Sequence[int], start: int) -> int:
        """The nearest token at or before `start` that begins a character; `start` where the bytes there spell none."""
        near = range(start, max(-1, start - _MOST_BYTES), -1)
        return next((place for place in near if self._begins_character(token_ids[place : place + _MOST_BYTES])), start)

    def _begins_character(self, token_ids: Sequence[int]) -> bool:
        lengths = range(1, len(token_ids) + 1)
        return any(not self._decode(token_ids[:length]).startswith(BROKEN) for length in lengths)

    def _whole_characters(self, token_ids: Sequence[int]) -> str:
        """The text of tokens without a character that is not complete at their end."""
        text = self._decode(token_ids)
        if not text.endswith(BROKEN):
            return text
        shorter = (self._decode(token_ids[:-missing]) for missing in range(1, _MOST_BYTES))
        return max((found.rstrip(BROKEN) for found in (text, *shorter)), key=len)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._codec.decode(token_ids, skip_special_tokens=False)
