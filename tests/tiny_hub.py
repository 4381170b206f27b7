"""A hub's cache as its library leaves it, made in the test, and a hub that does not answer."""

from __future__ import annotations

from pathlib import Path

NOBODY_LISTENS = "http://127.0.0.1:1"


def cached_snapshot(cache: Path, name: str) -> Path:
    """The empty folder of a model's only commit in a cache: what is put there has been downloaded."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("c0ffee")
    snapshot = model / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    return snapshot
