"""A job shown, and the job file's template, schema and reference page, all written from the fields of `config.py`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from groupwise.config import Job, is_resumable, knobs, section_type
from groupwise.jobfile.load import Resolved, load_job
from groupwise.jobfile.phrases import as_toml, choices, wanted
from groupwise.jobfile.save import value

_OPEN = "as the preset says"
_STARTERS = ("run", "model.path", "data.path", "reward.functions", "objective.preset")
"""What is active in a template even at its default."""

_TEMPLATE_HEAD = """\
# A job for groupwise. `groupwise train {path}` runs it, `groupwise show {path}` says what it amounts to.
# Every key is here with its meaning. What the job sets is active; the rest is commented out, at its default.
"""
_EMBEDDED_HEAD = """\
#
# As it stands it trains the embedded model to add, in some minutes on two cores, and downloads nothing. For a model of
# your own name it in model.path, with data.path and reward.functions, and delete every line that is marked "embedded":
# those values suit a model of a million parameters and harm a large one. Or have the file written for your own:
# groupwise init my.toml --model ID --data prompts.jsonl --reward rewards.py:score
"""

_REFERENCE_HEAD = """\
# Configuration

<!-- Written by `make docs` from the docstrings of src/groupwise/config.py: change them there. -->

A job is a TOML file. Each value is the last one given of: the default below, the preset's job default, the file, an
option (`--model`, `train(model=...)`), `--set section.key=value`. `groupwise show` prints the resolved job with the
origin of each value; `groupwise init` writes a commented file. An unknown key, a wrong type and a combination that
cannot work are errors. Relative paths start from the folder in which the command runs.

A key marked † may change when a run is resumed; any other difference needs a new run (`--fork`).
"""


def show(resolved: Resolved) -> str:
    """The resolved job as TOML, the origin of each value beside it, and what a step amounts to in words."""
    rows: list[tuple[str, str]] = []
    for section, fields in _sections().items():
        rows += [("", ""), (f"[{section}]", "")] if section else []
        rows += [(_shown(resolved.job, key), f"# {resolved.origins[key]}") for key in fields]
    width = max(len(text) for text, _ in rows if len(text) <= 60)
    lines = [f"{text:<{width}}  {origin}".rstrip() for text, origin in rows]
    return "\n".join([*lines, "", *(f"# {line}" for line in batch_arithmetic(resolved.job)), ""])


def batch_arithmetic(job: Job) -> list[str]:
    """What a step and the job amount to: `"8 prompts x 8 outputs = 64 outputs -> 1 update per step"` and so on."""
    train, limit = job.train, job.sampling.max_completion_length
    outputs = train.prompts_per_step * job.sampling.num_generations
    updates = train.num_iterations * train.updates_per_batch
    steps, budget = train.iterations * train.steps, train.tokens_per_micro_batch
    several = f"s per step (num_iterations {train.num_iterations} x updates_per_batch {train.updates_per_batch})"
    return [
        f"{train.prompts_per_step:,} prompts x {job.sampling.num_generations:,} outputs = {outputs:,} outputs"
        f" -> {updates:,} update{several if updates > 1 else ' per step'}",
        f"at most {outputs:,} x {limit:,} = {outputs * limit:,} output tokens per step,"
        f" in micro-batches {f'of at most {budget:,} tokens' if budget else 'that fit into memory'}",
        f"{train.iterations:,} x {train.steps:,} = {steps:,} steps -> {steps * outputs:,} outputs,"
        f" {steps * updates:,} updates in all",
    ]


def template(path: str = "job.toml", options: Mapping[str, Any] | None = None) -> str:
    """A job file with every knob, its meaning and its default, for `groupwise init`.

    What `options` name, as `load_job` takes them, is active; without any, the values of the embedded job are, so that
    the file learns as it stands. Raises ConfigError where the job could not run.
    """
    named = {name: given for name, given in (options or {}).items() if given is not None}
    own = "model" in named or "data" in named
    resolved = load_job(None, (), {"run": f"runs/{Path(path).stem}"} | named)
    said = [key for key, origin in resolved.origins.items() if not origin.startswith(("default", "preset "))]
    set_ = {key: value(resolved.job, key) for key in said}
    lines = [(_TEMPLATE_HEAD if own else _TEMPLATE_HEAD + _EMBEDDED_HEAD).format(path=path)]
    for section, fields in _sections().items():
        lines += [f"# {_doc(section)}", f"[{section}]", ""] if section else []
        for key, field in fields.items():
            default = field.get_default(call_default_factory=True)
            takes = f" Takes {wanted(field)}." if default is None or choices(field) or field.examples else ""
            lines += textwrap.wrap(_sentence(field) + takes, 118, initial_indent="# ", subsequent_indent="# ")
            lines += [_template_line(key, default, set_, own), ""]
    return "\n".join(lines)


def _template_line(key: str, default: Any, set_: Mapping[str, Any], own: bool) -> str:
    """The line of a key in a template: active where it is set, with a mark where only the embedded model wants it."""
    given = set_.get(key, default)
    text = f"{_name(key)} ={'' if given is None else f' {as_toml(given)}'}"
    if key in set_ and not own and given != default and key != "run":
        return f"{text}  # embedded; default: {_unset(key) if default is None else as_toml(default)}"
    return text if key in set_ or key in _STARTERS else f"#{text}"


def json_schema() -> dict[str, Any]:
    """The job file as a JSON Schema, for editors that complete and check TOML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Job.model_json_schema()


def reference() -> str:
    """The page `docs/configuration.md`: per section a table of keys, what they take, defaults and meanings."""
    lines = [_REFERENCE_HEAD]
    for section, fields in _sections().items():
        lines += [f"## `[{section}]`", "", _doc(section), ""] if section else ["## Before the first section", ""]
        lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
        for key, field in fields.items():
            mark = " †" if is_resumable(field) else ""
            cells = (f"`{_name(key)}`{mark}", wanted(field), _default(key, field), _sentence(field))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _sections() -> dict[str, dict[str, FieldInfo]]:
    """The knobs by section, `""` being what stands before the first."""
    found: dict[str, dict[str, FieldInfo]] = {}
    for key, field in knobs().items():
        found.setdefault(key.rpartition(".")[0], {})[key] = field
    return found


def _shown(job: Job, key: str) -> str:
    given = value(job, key)
    if given is None:
        # A resolved job has what its preset says: what is still open is not read by it.
        return f"# {_name(key)}: {'not used' if _unset(key) == _OPEN else _unset(key)}"
    return f"{_name(key)} = {as_toml(given)}"


def _default(key: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    return _unset(key) if default is None else f"`{as_toml(default)}`"


def _unset(key: str) -> str:
    if key in ("objective.outcome_weight", "objective.process_weight"):
        return "1 where it is scored, else 0"
    return _OPEN if key.startswith("objective.") and key != "objective.dual_clip" else "not set"


def _sentence(field: FieldInfo) -> str:
    return " ".join(str(field.description).split())


def _doc(section: str) -> str:
    return " ".join(str(getattr(section_type(section), "__doc__", "")).split())


def _name(key: str) -> str:
    return key.rpartition(".")[2]
