"""Plans against real steps, in memory and in time, for four shapes: `python benchmarks/plan_check.py`.

Random weights, outputs of full length; each step runs in a process of its own, the second of two is timed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import groupwise
from groupwise.demo.model import character_tokenizer, small_model

ALPHABET = "".join(chr(0x4E00 + i) for i in range(20_000))
SHAPES = {
    # name: (vocabulary, hidden, layers, prompts, prompt tokens, output tokens, dtype)
    "embedded: hidden 192, 2 layers, Q16 G8 P10 C48": (62, 192, 2, 16, 10, 48, "float32"),
    "tiny: hidden 128, 4 layers, Q16 G8 P16 C64": (64, 128, 4, 16, 16, 64, "float32"),
    "middle: hidden 384, 4 layers, Q4 G8 P128 C64": (4094, 384, 4, 4, 128, 64, "float32"),
    "small: hidden 512, 8 layers, Q4 G8 P256 C32": (8190, 512, 8, 4, 256, 32, "float32"),
}


def job(folder: Path, name: str) -> Path:
    """A job of a shape, with everything it needs."""
    vocabulary, hidden, layers, prompts, prompt, length, dtype = SHAPES[name]
    alphabet = ALPHABET[:vocabulary]
    tokenizer = character_tokenizer(alphabet)
    small_model(len(tokenizer), hidden=hidden, layers=layers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [json.dumps({"prompt": alphabet[i] * prompt}) for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "job.toml").write_text(
        f'[model]\npath = "{folder}"\ndtype = "{dtype}"\ndevice = "cpu"\n'
        f'[data]\npath = "{folder / "prompts.jsonl"}"\n[reward]\nfunctions = ["rewards.py:f"]\n'
        f"[sampling]\nmax_completion_length = {length}\n[train]\n"
        f"prompts_per_step = {prompts}\n[objective]\nbeta = 0.0\n"
    )
    return folder / "job.toml"


def main() -> None:
    """Print planned, real and their ratio."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            file = job(Path(folder), name)
            start = time.perf_counter()
            plan = groupwise.plan(file)
            planning = time.perf_counter() - start
            script = Path(__file__).with_name("one_step.py")
            done = subprocess.run([sys.executable, script, file, "2"], capture_output=True, text=True, check=True)
        real = json.loads(done.stdout)
        sampling = sum(plan.seconds[phase] for phase in ("prefill", "decode"))
        print(f"{name}, planned in {planning:.1f} s")
        for what, planned, found in (
            ("memory, MB", plan.needed / 1e6, real["bytes"] / 1e6),
            ("sampling, s", sampling, real["seconds"]["sampling"]),
            ("training, s", plan.step_seconds - sampling, real["seconds"]["training"]),
            ("step, s", plan.step_seconds, sum(real["seconds"].values())),
        ):
            print(f"  {what:<14} planned {planned:8.2f}  real {found:8.2f}  ratio {planned / found:.2f}")
        print("  " + ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in plan.seconds.items()))


if __name__ == "__main__":
    main()
