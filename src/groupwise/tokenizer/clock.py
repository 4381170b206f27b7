"""The clock that chat templates see: Llama 3.2's, Granite's and others write today's date into each conversation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date as day
from datetime import datetime, time
from threading import RLock
from types import SimpleNamespace

_lock = RLock()


def start_of(date: str | None) -> datetime:
    """The first moment of a day such as `"2026-12-01"`, or of today."""
    return datetime.combine(day.fromisoformat(date) if date else day.today(), time())


@contextmanager
def stopped(now: datetime) -> Iterator[None]:
    """Have a template's `strftime_now` say `now`.

    transformers gives templates a function that asks `datetime.now()`, and takes no other in its place: what is handed
    to a template is made plain data first.
    """
    from transformers.utils import chat_template_utils

    with _lock:
        names = vars(chat_template_utils)
        before = names["datetime"]
        names["datetime"] = SimpleNamespace(now=lambda: now)
        try:
            yield
        finally:
            names["datetime"] = before
