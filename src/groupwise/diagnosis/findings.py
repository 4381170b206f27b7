"""What the doctor found: one finding per check, as a table for people and as one JSON object for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from groupwise.disk import in_words
from groupwise.readable import ABSENT, number

Verdict = Literal["passed", "warning", "failed", "not used"]
_STYLES: Final[Mapping[str, str]] = {"passed": "green", "warning": "yellow", "failed": "bold red", "not used": "dim"}
_NARROWEST, _WIDEST = 80, 140
"""Columns of a table: fewer break every sentence into words, more are hard to read."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was measured, the most that it may be, the verdict, and words where there is something to say.

    `error` and `bound` are None where nothing could be measured; they are pure numbers unless `unit` names one.
    """

    check: str
    verdict: Verdict
    error: float | None = None
    bound: float | None = None
    unit: Literal["", "bytes"] = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Every finding, in the order of the checks."""

    findings: tuple[Finding, ...]

    def count(self, verdict: Verdict) -> int:
        """How many checks ended so."""
        return sum(finding.verdict == verdict for finding in self.findings)

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return not self.count("failed")

    @property
    def closing_line(self) -> str:
        """What it came to, in a sentence, and what to do where something failed."""
        line = f"{self.count('passed')} checks passed, {self.count('failed')} failed"
        rest: tuple[Verdict, ...] = ("warning", "not used")
        others = [f"{self.count(verdict)} {verdict}" for verdict in rest if self.count(verdict)]
        line += f" ({', '.join(others)})" if others else ""
        if self.healthy:
            return f"{line}."
        names = ", ".join(finding.check for finding in self.findings if finding.verdict == "failed")
        return f"{line}: {names}. Do not train before this is mended: docs/doctor.md says what each check means."

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON; a number that is not finite is None."""
        findings = [{key: _finite(value) for key, value in asdict(finding).items()} for finding in self.findings]
        return {"passed": self.count("passed"), "failed": self.count("failed"), "findings": findings}


def measured(check: str, error: float, bound: float, *, words: str = "", fault: str = "") -> Finding:
    """Passed where `error` is at most `bound` (NaN never is); `fault` says what a failure means and what would do."""
    if error <= bound:
        return Finding(check, "passed", error, bound, words=words)
    return Finding(check, "failed", error, bound, words=f"{words}. {fault}" if words else fault)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the table and the closing line; `console` stands in for standard output."""
    console = console or _console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("check", "measured", "bound", "verdict", ""):
        table.add_column(name, justify="right" if name in ("measured", "bound") else "left", no_wrap=bool(name))
    for finding in report.findings:
        verdict = Text(finding.verdict, style=_STYLES[finding.verdict])
        values = [_shown(value, finding.unit) for value in (finding.error, finding.bound)]
        table.add_row(Text(finding.check), *values, verdict, Text(finding.words))
    console.print(table)
    console.print(Text(report.closing_line), soft_wrap=True)


def _console() -> Console:
    """Standard output; what is no terminal has no width of its own."""
    console = Console(highlight=False)
    width = max(console.width, _NARROWEST) if console.is_terminal else _WIDEST
    return Console(width=min(width, _WIDEST), highlight=False)


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ABSENT
    return in_words(int(value)) if unit == "bytes" else number(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
