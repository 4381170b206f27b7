"""The doctor: tries the properties that the library promises on a user's own model and job, before training.

Every check is run whatever the others found, and one that crashes has failed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from groupwise.config import Job
from groupwise.diagnosis.findings import Finding, Report
from groupwise.diagnosis.inputs import chat_template, end_token, memory, rewards, tokenizer
from groupwise.diagnosis.numbers import NUMBERS, Check
from groupwise.diagnosis.opened_job import OpenedJob, open_job
from groupwise.errors import GroupwiseError
from groupwise.wiring.memory import lacking_memory
from groupwise.wiring.models import model_source
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wording import one_line

CHECKS: tuple[tuple[str, Check], ...] = (
    ("tokenizer", tokenizer), ("end token", end_token), ("chat template", chat_template), *NUMBERS,
    ("rewards", rewards), ("memory", memory),
)  # fmt: skip
"""In the order of the table; the last one allocates the most."""


def examine(job: Job, objects: PythonObjects, say: Callable[[str], None]) -> Report:
    """Open a job and run every check on it. Raises GroupwiseError where it cannot be opened.

    A model whose weights cannot be trained in the memory that is free is not loaded: that is then the only finding.
    """
    shortage = lacking_memory(job, model_source(job, say), objects.trust_remote_code)
    if shortage is not None:
        others = [Finding(name, "not used", words="the model was not loaded") for name, _ in CHECKS[:-1]]
        return Report((*others, Finding("memory", "failed", words=str(shortage))))
    with ExitStack() as closing:
        return run_checks(open_job(job, objects, say, closing))


def run_checks(opened: OpenedJob) -> Report:
    """Every check's findings."""
    found: list[Finding] = []
    for name, check in CHECKS:
        opened.say(f"checking: {name}")
        found += _tried(name, check, opened)
    return Report(tuple(found))


def _tried(name: str, check: Check, opened: OpenedJob) -> list[Finding]:
    try:
        return check(opened)
    except GroupwiseError as error:
        return [Finding(name, "failed", words=one_line(error))]
    except Exception as error:  # noqa: BLE001 - a boundary: whatever a model or a reward raises, the others are tried
        return [Finding(name, "failed", words=f"{type(error).__name__}: {one_line(error)}")]
