"""Values and errors as they may stand inside a message of one paragraph."""

from __future__ import annotations


def one_line(error: BaseException, limit: int = 600) -> str:
    """An error's message without line breaks, at most `limit` characters, ending in a full stop."""
    message = " ".join(str(error).split())[:limit].rstrip(" .")
    return f"{message or type(error).__name__}."


def shown(value: object, limit: int = 120) -> str:
    """A value's repr; a long one keeps its first and last characters."""
    text, half = repr(value), limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def half_character(text: str) -> str:
    """What to say after a text that UTF-8 cannot hold; empty where it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"has half of a surrogate pair ({text[error.start]!r}) at character {error.start} (counted from 0), which "
            "is no character and cannot be written as UTF-8. Remove it, or write the character whole."
        )
    return ""
