"""The speed of groupwise against TRL, `generate` and vLLM's CPU build. `make bench` runs all rows and prints the table.

Each finished row is written to `results/speed/ROW.json` at once; a row that is there for the code that is measured
(see `MEASURED`) is not measured again, so the whole may be done in pieces. Run it on a quiet machine: two
to three hours on two cores."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import environments, table
from benchmarks.cases import ROWS, SEED, Row
from benchmarks.measure import Bench, measure
from benchmarks.protocol import ROOT, WorkerError

RESULTS = ROOT / "benchmarks" / "results" / "speed"
NOISY = 0.05
MEASURED = (
    *(f"src/groupwise/{name}" for name in ("engines", "learn", "models", "objective", "seeds.py", "types.py")),
    *(f"benchmarks/{name}.py" for name in ("cases", "measure", "one_step", "protocol", "*_worker")),
)
"""What a row depends on: rows of the last commit that changed any of it are not measured again."""
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def main() -> None:
    """Measure what is missing, then print the table. Exits with 1 where a worker failed; a missed bar is no failure."""
    options = _options()
    rows = [ROWS[name] for name in options.cases or ROWS]
    if options.table:
        print(table.markdown(list(ROWS.values()), stored(ROWS)), end="")
        return
    bench = prepare(rows, options.pairs, options.patience)
    failed = [row.name for row in rows if not _row(row, bench, options.again)]
    Console().print(table.terminal(rows, stored(row.name for row in rows)))
    if failed:
        sys.exit(f"no result for {', '.join(failed)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=ROWS, metavar="ROW", help=f"only these rows: {', '.join(ROWS)}")
    parser.add_argument("--pairs", type=int, default=5, help="how many pairs of runs a ratio is the median of")
    parser.add_argument("--patience", type=float, default=120, help="seconds after which TRL's default is given up")
    parser.add_argument("--again", action="store_true", help="measure rows again that are there for this commit")
    parser.add_argument("--table", action="store_true", help="only print the stored results, as Markdown")
    return parser.parse_args()


def prepare(rows: Iterable[Row], pairs: int, patience: float) -> Bench:
    """Make the environments and models that the rows need."""
    home = environments.folder()
    bench = Bench(home / "models", home / "logs", pairs, patience)
    bench.logs.mkdir(parents=True, exist_ok=True)
    wanted = list(rows)
    for name, kinds in (("trl", ("step", "memory")), ("vllm", ("vllm",))):
        if any(row.kind in kinds for row in wanted):
            environments.make(name)
    for shape in sorted({row.case.shape for row in wanted} | {"micro"}):
        command = [sys.executable, "-m", "benchmarks.shapes", shape, str(bench.models / shape)]
        subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    return bench


def _row(row: Row, bench: Bench, again: bool) -> bool:
    """Measure and store one row, unless it is there; False where a worker failed."""
    commit = measured_commit()
    there = stored([row.name]).get(row.name)
    if there is not None and there["commit"] == commit and there["pairs"] >= bench.pairs and not again:
        print(f"{row.name}: there already", flush=True)
        return True
    took = "not measured before" if there is None else f"took {there['minutes']:.0f} min last time"
    print(f"{row.name}: {took}", flush=True)
    start, quiet = time.perf_counter(), Quiet()
    try:
        found = measure(row, bench)
    except WorkerError as error:
        # One row that cannot be measured must not cost the others.
        print(f"{row.name}: {error}", flush=True)
        return False
    minutes = (time.perf_counter() - start) / 60
    others = quiet.others()
    write(row, found, bench, commit=commit, minutes=minutes, others=others)
    print(f"{row.name}: {' | '.join(table.cells(row, found)[1:])} ({minutes:.1f} min)", flush=True)
    if others > NOISY:
        print(f"{row.name}: other programs took {others:.0%} of the machine meanwhile: measure it again", flush=True)
    return True


class Quiet:
    """How much of the machine other programs take: what its cores did, less what this process and its workers did."""

    def __init__(self) -> None:
        self.start, self.before = time.perf_counter(), self._busy()

    def others(self) -> float:
        """Their share of all cores since the start. Workers count once they have been waited for."""
        seconds = (time.perf_counter() - self.start) * (os.cpu_count() or 1)
        return max(0.0, (self._busy() - self.before) / seconds)

    @staticmethod
    def _busy() -> float:
        """Seconds of all cores that were neither idle nor spent for us."""
        if not Path("/proc/stat").exists():
            return 0.0
        user, nice, system = (int(part) for part in Path("/proc/stat").read_text().split()[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def write(
    row: Row, found: Mapping[str, Any], bench: Bench, *, commit: str | None, minutes: float, others: float
) -> None:  # fmt: skip
    """Store a row with everything that it came from."""
    result = {
        "row": row.name, "bar": row.bar, "met": table.met(row, found), "seed": SEED, "pairs": bench.pairs,
        "commit": commit, "minutes": round(minutes, 2), "others": round(others, 3),
        "machine": machine(bench.threads), "versions": versions(found),
        **found,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{row.name}.json").write_text(json.dumps(result, indent=1) + "\n")


def stored(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The results that are there, by row."""
    files = {name: RESULTS / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def versions(found: Mapping[str, Any]) -> dict[str, str]:
    """What the workers said they run with: ours and, by their own names, what only the other has."""
    raw = found.get("raw")
    about = raw.get("about", {}) if isinstance(raw, dict) else {}
    named: dict[str, str] = {"python": platform.python_version()}
    for side in ("best", "ours"):
        named |= about.get(side, {}).get("versions", {})
    return named


def machine(threads: int) -> dict[str, Any]:
    """The processor, what it can do with bfloat16, and its memory."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    flags = lines.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": lines.get("model name", platform.processor()), "cores": os.cpu_count(), "threads": threads,
        "features": " ".join(name for name in FEATURES if name in flags), "memory_bytes": memory,
        "load": os.getloadavg()[0],
    }  # fmt: skip


def measured_commit() -> str | None:
    """The last commit that changed what is measured, or how: everything else may change after it."""
    command = ["git", "log", "-1", "--format=%H", "--", *MEASURED]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no repository


if __name__ == "__main__":
    main()
