"""What the evidence scripts share: cells that are kept once they are run, means and spreads, and a place in a page."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol, TypeVar

END = "<!-- end of evidence -->"
Result = dict[str, Any]


class Cell(Protocol):
    """One run, and where its result is kept."""

    @property
    def file(self) -> Path:
        """A JSON file."""


AnyCell = TypeVar("AnyCell", bound=Cell)


def train(
    recipe: str, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> tuple[list[Result], Result]:
    """Run a recipe in a process of its own, as a user would: its events and its `result.json`."""
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / "run"
        command = [sys.executable, "-m", "groupwise", "train", recipe, "--run", str(at), "--quiet"]
        subprocess.run([*command, *sets], check=True, env={**os.environ, **(environment or {})})
        events = [json.loads(line) for line in (at / "events.jsonl").read_text().splitlines()]
        return events, json.loads((at / "result.json").read_text())


def stored(cells: Iterable[Cell]) -> list[Result]:
    """The results of the cells that have been run."""
    return [json.loads(cell.file.read_text()) for cell in cells if cell.file.exists()]


def with_spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; no spread from a single value, a dash from none."""
    if not values:
        return "–"
    digits = 1 if max(values) > 2 else 3
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


def rows(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    head, *body = ("| " + " | ".join(cells) + " |" for cells in (header, *lines))
    return [head, "|---" * len(header) + "|", *body]


def where(results: Sequence[Result], all_cells: int) -> str:
    """How much has been run, on what, of which commits."""
    commits = sorted({str(result["commit"])[:7] for result in results})
    machines = sorted({f"{result['machine']['processor']}, {result['machine']['cores']} cores" for result in results})
    minutes = sum(result["seconds"] for result in results) / 60
    return (
        f"{len(results)} of {all_cells} cells, {minutes:.0f} minutes in all; {'; '.join(machines)}; "
        f"commit {', '.join(commits)}. Mean over seeds ± their sample standard deviation."
    )


def write_page(text: str, page: Path, begin: str) -> None:
    """Put text into its place in a page: between the line `begin` and `END`."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(END)
    assert found, f"{page} has no place for the tables"
    page.write_text(f"{before}{begin}\n\n{text}\n{END}{after}", encoding="utf-8")


def run_missing(
    cells: Iterable[AnyCell], run: Callable[[AnyCell], Result], told: Callable[[Result], str],
    write: Callable[[], None], about: str | None,
) -> None:  # fmt: skip
    """The command: run what has no file yet, a line per cell, and write the page after each."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--cells", nargs="+", default=[], help="only cells whose file's name contains one of these")
    parser.add_argument("--page", action="store_true", help="only write the page from what is stored")
    options = parser.parse_args()
    # Warm-ups run in this process: threads that spin long for each other are slow beside anything else (LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for cell in cells:
        name = cell.file.stem
        asked = not options.cells or any(part in name for part in options.cells)
        if options.page or cell.file.exists() or not asked:
            continue
        result = run(cell)
        cell.file.parent.mkdir(parents=True, exist_ok=True)
        cell.file.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: {told(result)} in {result['seconds']:.0f} s", flush=True)
        write()
    write()
