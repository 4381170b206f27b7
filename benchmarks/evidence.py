"""The embedded job on three seeds, and the bar that it must meet. `make evidence` writes `results/arithmetic.json`.

The bar: held-out accuracy at least doubles, gains 40 points, and the job with its warm-up takes at most five minutes on
two cores. The warm-up is done anew for each seed, in an empty cache. With `--untimed` the minutes are printed and
stored but decide nothing: on a machine that others use too they say little about the job."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def run_seed(seed: int, recipe: str, folder: Path) -> dict[str, Any]:
    """Train one seed in a process of its own, as a user would; returns its `result.json`."""
    run = folder / f"seed-{seed}"
    command = [sys.executable, "-m", "groupwise", "train", recipe, "--run", str(run), "--set", f"seed={seed}"]
    environment = {**os.environ, "GROUPWISE_CACHE": str(folder / f"cache-{seed}")}
    subprocess.run([*command, "--quiet"], check=True, env=environment)
    return dict(json.loads((run / "result.json").read_text()))


def meets_bar(result: dict[str, Any], minutes: float = 5.0) -> bool:
    """Doubled, 40 points gained, and in time."""
    before, after = result["eval_before"], result["eval_after"]
    return bool(after >= 2 * before and after - before >= 0.4 and result["seconds"] <= 60 * minutes)


def main() -> None:
    """Run the seeds, print a line each, store the results, and fail where one misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="arithmetic")
    parser.add_argument("--untimed", action="store_true", help="the bar is what is learned, not how long it takes")
    parser.add_argument("--output", type=Path, help="where to write; default: benchmarks/results/RECIPE.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            result = run_seed(seed, options.recipe, Path(folder))
            result.pop("run")
            rows.append({**result, "met": meets_bar(result, math.inf if options.untimed else 5.0)})
            print(
                f"seed {seed}: {result['eval_before']:.3f} -> {result['eval_after']:.3f} in {result['seconds']:.0f} s, "
                f"bar {'met' if rows[-1]['met'] else 'MISSED'}",
                flush=True,
            )
    target = options.output or RESULTS / f"{options.recipe}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"machine": machine(), "seeds": rows}, indent=2) + "\n")
    if not all(row["met"] for row in rows):
        sys.exit(1)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


if __name__ == "__main__":
    main()
