"""From files, options and `--set` to one checked job that knows where each of its values came from."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from groupwise.config import BUILTIN, PRESET_JOB_DEFAULTS, SCHEMA_VERSION, Job, knobs, section_type
from groupwise.disk import is_stream
from groupwise.errors import ConfigError
from groupwise.jobfile.checks import REASONS, check
from groupwise.jobfile.elsewhere import ELSEWHERE
from groupwise.jobfile.phrases import advice, as_toml, choices, found, suggestion, wanted
from groupwise.jobfile.presets import filled, is_of

OPTIONS = {
    "model": "model.path",
    "data": "data.path",
    "reward": "reward.functions",
    "step_reward": "reward.step_functions",
    "eval_data": "eval.data",
    "num_generations": "sampling.num_generations",
    "temperature": "sampling.temperature",
    "max_completion_length": "sampling.max_completion_length",
    "device": "model.device",
    "learning_rate": "train.learning_rate",
    "warmup_steps": "train.warmup_steps",
    "weights": "reward.weights",
}
"""Options whose key is not the only one of its name; every other knob goes by its own (`learning_rate`)."""

FUNCTIONS = ("reward.functions", "reward.step_functions", "reward.verifier")
"""Lists of which an option may give one entry without the list."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A job, and by dotted key where each value came from: `"default"`, `"job.toml"`, `"--set"`, `"--model"`, ..."""

    job: Job
    origins: Mapping[str, str]


_PATHS = {
    *("run", "model.path", "data.path", "eval.data", "reward_model.path", "reward_model.labels"),
    *("reward_model.completer", "process.function", *FUNCTIONS),
}
"""Keys that may name a file or folder of one's home as `~/...`."""


def at_home(value: Any) -> Any:
    """A path, or a list of paths, with the folder that `~` stands for: no shell has put it there in a job file."""
    if isinstance(value, list):
        return [at_home(item) for item in value]
    prefix, path = ("model:", value[6:]) if isinstance(value, str) and value.startswith("model:") else ("", value)
    return prefix + os.path.expanduser(path) if isinstance(path, str) and path.startswith("~") else value


class ReadOnce(str):
    """The name of a job that came through a pipe, which can be read only once, and its `text`."""

    text: str


def read_once(source: str | None) -> str | None:
    """`source`, read now where it is a pipe or a device and no file. Raises ConfigError where nothing comes."""
    source = at_home(source)
    if source is None or not is_stream(source):
        return source
    found = ReadOnce(source)
    found.text = _read(Path(source))
    return found


class Setting(NamedTuple):
    """One value that somebody gave: `Setting("train.steps", 10, "--set")`."""

    key: str
    value: Any
    origin: str


def load_job(
    source: str | Path | None = None, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None,
    *, training: bool = True,
) -> Resolved:  # fmt: skip
    """Resolve a job: defaults, the preset's, the file's, `options` by name, `overrides` (`"section.key=value"`).

    `source` is a path or the name of a shipped recipe; None is the recipe `arithmetic`, or no file at all when
    the options name another model or other data. An option of None was not given. Keys that training would not read
    are refused where it is for `training`. Raises ConfigError.
    """
    refuse_loaded("job", source)
    given = [*_from_options(options or {}), *(one for text in overrides for one in _from_override(text))]
    settings = _exchanged([*_from_source(source, given), *given])
    preset = next((one.value for one in reversed(settings) if one.key == "objective.preset"), None)
    brought = PRESET_JOB_DEFAULTS.get(preset, {}) if isinstance(preset, str) else {}
    values: dict[str, Any] = {}
    origins = dict.fromkeys(knobs(), "default")
    for key, value, origin in [*(Setting(key, value, f"preset {preset}") for key, value in brought.items()), *settings]:
        both_tables = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | value if both_tables else value
        origins[key] = origin
    _leave_other_data(values, origins)
    if _steps_alone(values, origins):
        values["reward.functions"] = []
        origins["reward.functions"] = origins["reward.step_functions"]
    for key in _PATHS & values.keys():
        values[key] = at_home(values[key])
    job = _validated(values, origins)
    check(job, origins, training=training)
    return Resolved(*filled(job, origins))


def _exchanged(settings: Sequence[Setting]) -> list[Setting]:
    """The settings without what an earlier preset said, where a later one takes its place: a run folder's job has the
    values of its preset written out, and a fork may choose another."""
    presets = [index for index, one in enumerate(settings) if one.key == "objective.preset"]
    kept = list(settings)
    for index, later in pairwise(presets):
        if settings[index].value != settings[later].value:
            gone = [one for one in settings[:later] if is_of(settings[index].value, one.key, one.value)]
            kept = [one for one in kept if one not in gone]
    return kept


_OF_DATA = ("data.revision", "data.subset", "data.split", "eval.data", "eval.split")


def _leave_other_data(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Take off what a recipe says of its own data where other data takes its place: splits, and what is held out."""

    def drop(keys: Iterable[str]) -> None:
        for key in keys:
            if key in values and origins[key].startswith("recipe "):
                del values[key]
                origins[key] = "default"

    own = values.get("data.path", BUILTIN) == BUILTIN or origins["data.path"].startswith("recipe ")
    if not own:
        drop(_OF_DATA)
        if values.get("eval.data") is None:
            drop([key for key in values if key.startswith("eval.")])
    elif not origins["eval.data"].startswith("recipe "):
        drop(["eval.split"])


def _steps_alone(values: Mapping[str, Any], origins: Mapping[str, str]) -> bool:
    """Whether steps of one's own data are scored and nobody named a function for outputs: the built-in one is none."""
    own = values.get("data.path", BUILTIN) != BUILTIN and bool(values.get("reward.step_functions"))
    return own and (origins["reward.functions"] == "default" or origins["reward.functions"].startswith("recipe "))


def recipe_names() -> list[str]:
    """The job files that come with the package, by name."""
    files = (file.name for file in _recipes().iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def _recipes() -> Traversable:
    return resources.files("groupwise.recipes")


def _from_source(source: str | Path | None, given: Sequence[Setting]) -> list[Setting]:
    """The settings of a file. A job of one's own starts from the defaults, not from what suits the embedded model."""
    if source is None:
        own = any(one.key in ("model.path", "data.path") and one.value != BUILTIN for one in given)
        return [] if own else _from_source("arithmetic", given)
    if isinstance(source, str) and source in recipe_names():
        text = (_recipes() / f"{source}.toml").read_text(encoding="utf-8")
        return list(_flatten(_parsed(text, f"recipe {source}"), f"recipe {source}"))
    text = source.text if isinstance(source, ReadOnce) else _read(Path(source))
    return list(_flatten(_parsed(text, str(source)), str(source)))


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if is_stream(path) and not text.strip():
            raise ConfigError(f"The job that was to come through `{path}` is empty. What writes it may have failed.")
        return text
    except FileNotFoundError:
        recipes = ", ".join(f"`{name}`" for name in recipe_names())
        message = (
            f"There is no job file `{path}`: it is neither a file nor a recipe.{suggestion(str(path), recipe_names())} "
            f"The shipped recipes are {recipes}; `groupwise init` writes a new job file."
        )
        raise ConfigError(message) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The job file `{path}` cannot be read as text: {error}.") from None


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"line (\d+)", str(error))
        lines = text.split("\n")  # as TOML counts them: other separators may stand inside a text
        line = f" That line reads `{lines[int(place[1]) - 1].strip()}`." if place else ""
        raise ConfigError(f"{origin} is not valid TOML: {error}.{line} Strings need quotes, as in TOML.") from None


def _from_options(options: Mapping[str, Any]) -> Iterator[Setting]:
    """Options go by a short name (`model`), a knob's own name (`learning_rate`) or its dotted key."""
    by_name: dict[str, list[str]] = {}
    for key in knobs():
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    short = {name: keys[0] for name, keys in by_name.items() if len(keys) == 1} | OPTIONS
    for name, value in options.items():
        if value is None:
            continue
        refuse_loaded(name, value)
        key = short.get(name, name)
        value = [value] if key in FUNCTIONS and isinstance(value, str | Path) else value
        yield from _flatten(_nested(key, _plain(name, value)), "--" + name.replace("_", "-"))


def refuse_loaded(name: str, value: Any) -> None:
    """Say of a loaded model or tokenizer what to give in its place. Raises ConfigError."""
    if not hasattr(value, "save_pretrained"):
        return
    place = getattr(getattr(value, "config", value), "name_or_path", "") or getattr(value, "name_or_path", "")
    was = f' It was loaded from "{place}": model="{place}" takes that.' if place else ""
    raise ConfigError(
        f"`{name}` got a loaded {type(value).__name__}, and a run begins from a folder or hub id, which brings "
        f"the tokenizer along and can be read again.{was} Changed since, it is saved first: "
        'model.save_pretrained("mine"), tokenizer.save_pretrained("mine"), and then model="mine".'
    )


def _plain(name: str, value: Any) -> Any:
    """An option from Python as TOML would give it: paths become strings, tuples lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    try:
        as_toml(value)
    except ValueError:
        raise ConfigError(f"The option `{name}` got {value!r}, which cannot be written in a job file.") from None
    return value


def _from_override(text: str) -> Iterator[Setting]:
    key, value = parse_override(text)
    yield from _flatten(_nested(key, value), "--set")


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`, the value as in TOML; a bare word or path that is no TOML is a string.

    Raises ConfigError.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not (key and equals and value):
        raise ConfigError(f"--set takes section.key=value, as in --set train.steps=10; found `{text}`.")
    try:
        parsed = tomllib.loads(f"value = {value}")
        plain = len(parsed) == 1
    except tomllib.TOMLDecodeError:
        parsed = {"value": value}
        plain = value[0] not in "\"'[{" and "\n" not in value
    if not plain:
        raise ConfigError(
            f"--set {key} got `{value}`, which is not a TOML value. The shell takes quotes away, so put it in single "
            f"""quotes, as in --set '{key}=["a", "b"]'."""
        )
    return key, parsed["value"]


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _flatten(table: Mapping[str, Any], origin: str, prefix: str = "") -> Iterator[Setting]:
    """The table's values by dotted key. Raises ConfigError at a key that no section has."""
    for name, value in table.items():
        key = prefix + name
        if key in knobs():
            yield Setting(key, value, origin)
        elif section_type(key) is None:
            raise ConfigError(f"{origin}: {_unknown(key, value)}")
        elif isinstance(value, dict):
            yield from _flatten(value, origin, prefix=f"{key}.")
        else:
            raise ConfigError(f"{origin}: `{key}` is a section, so it takes a table of keys; found {found(value)}.")


def _unknown(key: str, value: Any) -> str:
    """What to say of a key that no section has: of a table, of what in it other trainers have, or what is near."""
    leaves = list(_leaves(key, value))
    own = {known.rpartition(".")[2] for known in knobs()}
    foreign = next((leaf for leaf in leaves if leaf.rpartition(".")[2] in ELSEWHERE), None)
    if foreign is None and isinstance(value, dict):
        near = suggestion(key, [name for name in Job.model_fields if section_type(name)])
        if near:
            return f"there is no key `{key}`.{near}"
    meant = foreign or next((leaf for leaf in leaves if leaf.rpartition(".")[2] in own), key)
    return f"there is no key `{meant}`.{suggestion(meant, list(knobs()), ELSEWHERE)}"


def meant_as_keys(arguments: Sequence[str], options: Collection[str]) -> Iterator[str]:
    """How a key is given, for each argument of a command that looks like an option, is none, and is near a key."""
    for given in (one.partition("=")[0] for one in arguments if one.startswith("--")):
        near = suggestion(given.lstrip("-").replace("-", "_"), list(knobs()), ELSEWHERE)
        if given not in options and near:
            yield f"{given} is no option; a key is given by --set section.key=value.{near}"


def _leaves(key: str, value: Any) -> Iterator[str]:
    """The dotted keys within a value: `rollout.n` of `rollout = {"n": 8}`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key


def _validated(values: Mapping[str, Any], origins: Mapping[str, str]) -> Job:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    try:
        return Job.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_complaint(error.errors()[0], values, origins)) from None


def _complaint(error: ErrorDetails, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """What pydantic found, said for people: the key, what it takes, who gave what, and what would do."""
    places = [str(place) for place in error["loc"]]
    key = places[0] if places[0] in values else ".".join(places[:2])
    value, field = values[key], knobs()[key]
    if key == "schema_version" and value != SCHEMA_VERSION:
        return (
            f"{origins[key]}: schema_version is {as_toml(value)}, but this groupwise reads version {SCHEMA_VERSION}. "
            "A newer job file needs a newer groupwise."
        )
    if isinstance(value, str) and (key, value) in REASONS:
        return f"{origins[key]}: `{key}` = {as_toml(value)} is refused: {REASONS[key, value]}"
    near = suggestion(value, choices(field)) if isinstance(value, str) and choices(field) else ""
    return f"{origins[key]}: `{key}` takes {wanted(field)}; found {found(value)}.{near}{advice(field, value)}"
