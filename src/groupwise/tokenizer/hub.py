"""The Hugging Face hub, asked once whether it answers at all: its library goes on trying for half a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from groupwise.errors import ModelError
from groupwise.wording import one_line

NOT_HERE: Final = "There is no such folder here, and a hub id needs a connection or a filled cache."
_PATIENCE = 5.0
"""Seconds for one small answer. Where there is no connection at all, that is known much sooner."""


def check_within_reach(path: str | Path, revision: str | None, what: str) -> None:
    """Raise ModelError, at once, where a model's files can be neither in the cache nor on the hub.

    `what` begins the message: "The model org/name". A folder, a model in the cache and a hub that answers pass.
    """
    if Path(path).is_dir():
        return
    from huggingface_hub import try_to_load_from_cache

    # What is in the cache is loaded without a connection, and without a wait.
    try:
        cached = try_to_load_from_cache(str(path), "config.json", revision=revision)
    except ValueError:
        return  # a name that is none: whoever loads it says that best
    if isinstance(cached, str):
        return
    if silent := hub_error(str(path), "model"):
        raise ModelError(f"{what} cannot be loaded: the hub does not answer ({silent}). {NOT_HERE}")


def hub_error(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Why the hub says nothing about a repository, in one request; None where it answers, be it with an error."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_PATIENCE)
    except (HfHubHTTPError, ValueError):
        return None  # an answer, or a name that is none: whoever loads it says that best
    except Exception as error:  # noqa: BLE001 - a boundary: each version of the hub's library has errors of another one
        return f"{type(error).__name__}: {one_line(error, 200).rstrip('.')}"
    return None
