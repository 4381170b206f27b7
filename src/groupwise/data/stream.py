"""Prompts in a seeded order that is a function of the position: to resume is to know how many were taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

from groupwise.errors import DataError
from groupwise.seeds import stable_hash
from groupwise.types import Prompt


class PromptStream:
    """Endless prompts, epoch after epoch; each epoch holds every prompt once, in its own order where shuffled.

    `position` counts the prompts taken so far. A batch may span epochs and may be longer than one: then a prompt comes
    more than once, as groups of their own.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        """Stream `prompts`; `seed` decides the order of every epoch. Raises DataError where there are none."""
        if not prompts:
            raise DataError("There are no prompts to draw from.")
        self.position = 0
        self.prompts = self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._epoch, self._order = -1, list(range(len(prompts)))

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        taken = [self._at(self.position + i) for i in range(n)]
        self.position += n
        return taken

    def __len__(self) -> int:
        """How many prompts an epoch has."""
        return len(self._prompts)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, fractions included."""
        return self.position / len(self._prompts)

    def state_dict(self) -> dict[str, int | str]:
        """What a checkpoint keeps: `{"position": 96, "prompts": 1000, "fingerprint": "9f2c41d07be3a856", ...}`."""
        return {
            "position": self.position, "prompts": len(self._prompts), "fingerprint": self._fingerprint,
            "contents": self._contents,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises DataError where that was over other prompts."""
        if state["fingerprint"] != self._fingerprint:
            same_texts = state["contents"] == self._contents
            why = "their texts are the same, and their tokens are not: it is the tokenizer or its chat template"
            raise DataError(
                f"The checkpoint was made on other prompts than these: {state['prompts']} of them (fingerprint"
                f" {state['fingerprint']}), here are {len(self._prompts)} ({self._fingerprint})"
                f"{f'; {why}' if same_texts else ''}. Bring back the data, tokenizer and length limit of the run, or"
                " start a new run from the checkpoint with --fork."
            )
        self.position = int(state["position"])

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self._prompts))
        if self._shuffle and epoch != self._epoch:
            order = range(len(self._prompts))
            self._epoch, self._order = epoch, sorted(order, key=lambda i: stable_hash(self._seed, "data", epoch, i))
        return self._prompts[self._order[index]]

    @cached_property
    def _contents(self) -> str:
        return contents_digest(self._prompts)

    @cached_property
    def _fingerprint(self) -> str:
        """Names the prompts by their ids and tokens, in order."""
        digest = blake2b(digest_size=8)
        for prompt in self._prompts:
            digest.update(json.dumps([prompt.prompt_id, prompt.token_ids]).encode())
        return digest.hexdigest()


def contents_digest(prompts: Sequence[Prompt]) -> str:
    """Names prompts by their ids and what they say, whatever a tokenizer makes of it."""
    digest = blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(_line([prompt.prompt_id, prompt.content]))
    return digest.hexdigest()


def columns_digest(prompts: Sequence[Prompt], name: str) -> dict[str, str]:
    """Names what stands in each column of the data set `name`: `{"rows.jsonl, column 'answer'": "41d07be3a856"}`."""
    digests = {column: blake2b(digest_size=8) for column in dict.fromkeys(key for p in prompts for key in p.row)}
    for prompt in prompts:
        for column, value in prompt.row.items():
            digests[column].update(_line([prompt.prompt_id, value]))
    return {f"{name}, column {column!r}": digest.hexdigest() for column, digest in digests.items()}


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    """What JSON has no form for: arrays as lists, dates and the like as they are written, anything else by its type."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if type(value).__module__ in ("datetime", "decimal", "uuid") else type(value).__name__
