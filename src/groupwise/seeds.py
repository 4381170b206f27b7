"""Seeds as a function of where they are used, never a state: a restart, more ranks, another batch draw the same."""

from __future__ import annotations

import json
from hashlib import blake2b

Part = int | str | float | bool | None


def stable_hash(*parts: Part) -> int:
    """A number in [0, 2**63) that depends on the parts' types, values and order, on no machine and no process."""
    digest = blake2b(json.dumps(parts, separators=(",", ":")).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def group_seed(run_seed: int, purpose: str, global_step: int, slot: int, attempt: int = 0, turn: int = 0) -> int:
    """The seed of a group in [0, 2**62): output `i` draws with seed + i, which stays below 2**63.

    `purpose` keeps training (`"train"`) and evaluation (`"eval"`) apart, `slot` the groups of one step, `attempt` the
    repetitions of a slot that was refilled, `turn` the turns of a conversation.
    """
    return stable_hash(run_seed, purpose, global_step, slot, attempt, turn) >> 1
