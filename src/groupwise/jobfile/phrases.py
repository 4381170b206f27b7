"""How keys, types and values are put into words, in error messages and in the documentation alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tomlkit
from pydantic.fields import FieldInfo

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a table",
    list[str]: "a list of strings",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
}
_BOUNDS = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}
_ALIKE = 0.74
"""How alike a typing error leaves two names: below it stand words of another meaning, as `save_steps` and `steps`."""
_RARE = "reward_model."
"""A reward model is trained in few jobs: its keys are meant where they are named in full."""
_FEW = 2**32
"""Bounds beyond this only keep a value inside its machine type: not worth a reader's time."""


def as_toml(value: Any) -> str:
    """The value as it stands in a job file, on one line. Raises ValueError where TOML has no such value."""
    if not isinstance(value, dict):
        return str(tomlkit.item(value).as_string())
    inline = tomlkit.inline_table()
    inline.update(value)
    return inline.as_string()


def wanted(field: FieldInfo) -> str:
    """What the knob takes: `"a whole number, at least 1"`."""
    kind = _without_none(field.annotation)
    if field.examples:
        return "a string like " + ", ".join(f"`{example}`" for example in field.examples)
    if options := choices(field):
        words = ", ".join(f"`{option}`" for option in options)
        return f"one of {words}" if len(options) > 1 else words
    bounds = [
        text.format(f"{bound:g}" if isinstance(bound, float) else bound)
        for part in field.metadata
        for name, text in _BOUNDS.items()
        if (bound := getattr(part, name, None)) is not None and bound < _FEW
    ]
    if any(hasattr(part, "min_length") for part in field.metadata):
        bounds.append("not empty")
    return ", ".join([_KINDS[get_origin(kind) if get_origin(kind) is dict else kind], *bounds])


def choices(field: FieldInfo) -> list[str]:
    """The values that the knob may have, if they are few and named; else an empty list."""
    kind = _without_none(field.annotation)
    return [str(option) for option in get_args(kind)] if get_origin(kind) is Literal else []


def found(value: Any) -> str:
    """What a value is, when something else was wanted: `"the string \\"ten\\""`."""
    text = as_toml(value)
    kind = {int: "the number ", float: "the number ", str: "the string ", list: "the list ", dict: "the table "}
    return kind.get(type(value), "") + (text if len(text) <= 80 else text[:77] + "...")


def advice(field: FieldInfo, value: Any) -> str:
    """How to write the value so that it has the wanted type, where that can be guessed; else an empty string."""
    kind = _without_none(field.annotation)
    if kind == list[str] and isinstance(value, str):
        return f" Write [{as_toml(value)}]."
    if kind is str and not isinstance(value, list | dict | str):
        return f' Write "{as_toml(value)}", with the quotes.'
    if kind in (bool, int, float) and isinstance(value, str):
        return " Numbers, true and false stand without quotes."
    return ""


def suggestion(key: str, known: Sequence[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """`" Did you mean ...?"` with the nearest known name, in whichever section it lives; empty if none is near.

    `elsewhere` says what other trainers' names are here: a known name, or a sentence, which is the answer then.
    """
    name = _last(key)
    answer = None if key.startswith(_RARE) else (elsewhere or {}).get(name.lower().replace("-", "_"))
    if answer is not None and answer not in known:
        return f" {answer}"
    near = [answer] if answer else [other for other in known if _last(other) == name]
    if not near:
        best = max(known, key=lambda other: _likeness(key, other), default="")
        near = [best] if _likeness(key, best) >= _ALIKE else []
    return f" Did you mean {' or '.join(f'`{other}`' for other in near)}?" if near else ""


def _likeness(key: str, other: str) -> float:
    """How alike the last parts are, from 0 to 1; the same section breaks a tie."""
    same_section = key.rpartition(".")[0] == other.rpartition(".")[0]
    ratio = SequenceMatcher(None, _last(key), _last(other)).ratio()
    return ratio + 0.01 * same_section - 0.005 * other.startswith(_RARE)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation
