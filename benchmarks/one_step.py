"""Steps of a job as a run makes them, in a process of its own: how much memory they took, and how long.

`python one_step.py JOB [STEPS]` prints a JSON object. Outputs never end early, so that lengths are those of a plan."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from groupwise.demo.model import small_model
from groupwise.engines.mailbox import Mailbox, generate
from groupwise.engines.native.engine import NativeEngine
from groupwise.jobfile import load_job
from groupwise.learn.learner import PolicyLearner
from groupwise.models.probe import probe
from groupwise.types import Group, GroupKey, Request, Score, ScoredGroup
from groupwise.wiring.models import open_model
from groupwise.wiring.prompts import training_prompts
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.settings import learner_settings, objective_of, sampling_of


def status(name: str) -> int:
    """A line of the kernel's account of this process, in bytes. `ru_maxrss` is no use: it starts at the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def warm_up() -> None:
    """What the first pass and the first update import and start."""
    probe(small_model(64, hidden=32).config)
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(64, 64, dtype=dtype)
        layer(torch.ones(64, 64, dtype=dtype)).sum().backward()
        torch.optim.AdamW(layer.parameters(), fused=True).step()


def main(path: str, steps: int) -> None:
    """Sample and update as often as asked."""
    job = load_job(path).job
    objects = PythonObjects()
    warm_up()
    before = status("VmRSS")
    model = open_model(job, objects, lambda line: None, training=True)
    prompts = training_prompts(job, model, objects).prompts[: job.train.prompts_per_step]
    model.codec.end_token_ids = frozenset()
    objective = objective_of(job)
    engine = NativeEngine(model.loaded.policy, model.codec, max_live=job.sampling.max_live_outputs)
    learner = PolicyLearner(model.loaded.policy, objective, learner_settings(job, model.loaded.compute_dtype))
    seconds: dict[str, list[float]] = {"sampling": [], "training": []}
    count = job.sampling.num_generations
    for step in range(steps):
        start = time.perf_counter()
        requests = [Request(f"{step}/{i}", p.token_ids, count, sampling_of(job), i) for i, p in enumerate(prompts)]
        groups = [
            Group(GroupKey(step, i, str(i)), prompts[i], outputs)
            for i, outputs in enumerate(generate(Mailbox(engine), requests))
        ]
        middle = time.perf_counter()
        scored = [ScoredGroup(group, (Score(0.0),) * count) for group in groups]
        credit = [[float(i % 2) * 2 - 1 for i in range(count)] for _ in groups]
        batch = learner.prepare(scored, credit)
        for done in range(job.train.num_iterations):
            learner.update(batch, done)
        seconds["sampling"].append(middle - start)
        seconds["training"].append(time.perf_counter() - middle)
    taken = status("VmHWM") - before
    print(json.dumps({"bytes": taken, "seconds": {name: min(times) for name, times in seconds.items()}}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2)
