"""Labels of steps by Monte Carlo on the embedded task: how often they agree with the rule, and how fast they come.

`python -m benchmarks.monte_carlo agreement` labels sampled outputs with N = 4, 8 and 16 continuations per step and
holds the labels against the rule that checks each line; `speed` draws the continuations of outputs of 8 steps, N = 8,
from trees and in two ways without them. Results go to `results/monte_carlo/`.

Ways of drawing: `tree` computes prompt and output once; `step` has the full prefix of each step as a prompt, shared by
its N continuations; `each` has it as a prompt of each continuation, as a loop over `generate` would. All draw the same
tokens with the same engine."""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.evidence import RESULTS, machine

TRIES = (4, 8, 16)
STEPS, N, STEP_TOKENS = 8, 8, 16
PROMPTS = {"short": 32, "long": 256}
"""Tokens of a prompt, by the case's name."""
WAYS = ("tree", "step", "each")
BAR = 3.0
"""Times the tokens per second of `each` that `tree` has to reach."""


def agreement(prompts: int, outputs: int, seed: int) -> dict[str, Any]:
    """Label `outputs` outputs of each of `prompts` held-out questions by the built-in model, for each of `TRIES`."""
    from groupwise.demo.task import held_out
    from groupwise.demo.warmup import ensure_warm
    from groupwise.engines.mailbox import Mailbox
    from groupwise.engines.native.engine import NativeEngine
    from groupwise.models.load import load_policy
    from groupwise.reward_models.monte_carlo import Completer, MonteCarlo
    from groupwise.rewards.functions.load import load_reward
    from groupwise.rewards.scorer import Scorer
    from groupwise.rewards.steps import by_pattern
    from groupwise.run.rollouts import GroupSampler
    from groupwise.tokenizer.codec import Codec
    from groupwise.types import Prompt, Sampling
    from groupwise.watch.record import Record

    folder = ensure_warm(seed)
    codec = Codec.load(folder)
    engine = NativeEngine(load_policy(str(folder), device="cpu").policy, codec)
    scorer = Scorer([load_reward("builtin:arithmetic")], None, 1, print)
    sampling = Sampling(max_tokens=32)
    rows = [
        Prompt(str(i), row["prompt"], codec.encode_prompt(row["prompt"]), {"answer": row["answer"]})
        for i, row in enumerate(held_out(prompts))
    ]
    groups = GroupSampler(sampling, outputs, seed, "label").sample(Mailbox(engine), rows, 0)
    scored = scorer(groups, Record(0))
    found = {}
    for n in TRIES:
        labeller = MonteCarlo(
            Mailbox(engine), lambda asked: scorer(asked, Record(0)), codec, by_pattern(codec, r"\n"),
            Completer(n, sampling, seed), soft=True,
        )  # fmt: skip
        start = time.perf_counter()
        labelled = labeller.label(scored)
        seconds = time.perf_counter() - start
        found[str(n)] = compared([(o.group.prompt.content, o.steps, o.labels) for o in labelled])
        found[str(n)] |= {"seconds": seconds, "tokens": labeller.tokens}
    return {"machine": machine(), "seed": seed, "outputs": prompts * outputs, "by_tries": found}


def compared(labelled: Iterable[tuple[Any, Sequence[str], Sequence[float | None]]]) -> dict[str, float]:
    """Shares of steps, over `(prompt, steps, soft labels)`.

    `line`: the hard label is what `check_steps` says of the line by itself. `so_far`: it says whether every line up to
    here is right, which is what a continuation can tell. Of the steps that are right so far, `missed` are labelled 0;
    of those that are not, `lucky` are labelled 1. `soft_error` is the mean distance of soft labels from `so_far`.
    """
    from groupwise.demo.reward import check_steps

    pairs = []
    for prompt, steps, labels in labelled:
        so_far = True
        # A break that ends the text makes an empty last line, which is no step of its own.
        checked = check_steps(prompt, "".join(steps))[: len(steps)]
        for (_, right), label in zip(checked, labels, strict=True):
            so_far = so_far and right
            if label is not None:
                pairs.append((right, so_far, label))
    sound = [label for _, so_far, label in pairs if so_far]
    broken = [label for _, so_far, label in pairs if not so_far]
    return {
        "steps": float(len(pairs)),
        "line": share((label > 0) == right for right, _, label in pairs),
        "so_far": share((label > 0) == so_far for _, so_far, label in pairs),
        "missed": share(label == 0 for label in sound),
        "lucky": share(label > 0 for label in broken),
        "soft_error": sum(abs(label - so_far) for _, so_far, label in pairs) / max(1, len(pairs)),
    }


def share(truths: Iterable[bool]) -> float:
    """Of booleans, those that hold; 0 of none."""
    found = list(truths)
    return sum(found) / max(1, len(found))


def continuations(prompt: int, prompts: int, vocabulary: int) -> list[Any]:
    """Requests from each step's end but the last of an output per prompt: N continuations that take the steps left."""
    from groupwise.types import Branch, Request, Sampling, Tree

    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocabulary) for _ in range(count))

    found = []
    for i in range(prompts):
        tree = Tree(str(i), tokens(prompt), (tokens(STEPS * STEP_TOKENS),))
        for step in range(1, STEPS):
            branch = Branch(tree, 0, step * STEP_TOKENS)
            left = (STEPS - step) * STEP_TOKENS
            sampling = Sampling(max_tokens=left, min_tokens=left)
            seed = (i * STEPS + step) << 20
            found.append(Request(f"{i}/{step}", branch.token_ids, N, sampling, seed, branch))
    return found


def asked_as(way: str, requests: Sequence[Any]) -> list[Any]:
    """The same continuations, asked for in one of `WAYS`."""
    if way == "tree":
        return list(requests)
    if way == "step":
        return [replace(request, branch=None) for request in requests]
    return [
        replace(request, uid=f"{request.uid}/{i}", n=1, seed=request.seed + i, branch=None)
        for request in requests
        for i in range(request.n)
    ]


def speed(shape: str, folder: Path, prompts: int, pairs: int, names: Sequence[str] = ()) -> dict[str, Any]:
    """Tokens per second of each way in the cases `names` (default: all), the median of `pairs` rounds in which every
    way has its turn."""
    from benchmarks.cases import SHAPES
    from benchmarks.shapes import save, tokenizer_of
    from groupwise.engines.mailbox import Mailbox, generate
    from groupwise.engines.native.engine import NativeEngine
    from groupwise.models.load import load_policy
    from groupwise.tokenizer.codec import Codec

    save(shape, folder)
    codec = Codec(tokenizer_of(folder))
    codec.end_token_ids = frozenset()
    policy = load_policy(str(folder), device="auto").policy
    cases: dict[str, Any] = {}
    for name in names or PROMPTS:
        length = PROMPTS[name]
        requests = continuations(length, prompts, SHAPES[shape].vocabulary)
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        drawn: dict[str, list[Any]] = {}
        for _ in range(pairs):
            for way in WAYS:
                start = time.perf_counter()
                groups = generate(Mailbox(NativeEngine(policy, codec, max_live=256)), asked_as(way, requests))
                seconds = time.perf_counter() - start
                drawn[way] = [c.token_ids for group in groups for c in group]
                rates[way].append(sum(map(len, drawn[way])) / seconds)
        alike = {way: share(a == b for a, b in zip(drawn["tree"], drawn[way], strict=True)) for way in WAYS[1:]}
        middle = {way: median(values) for way, values in rates.items()}
        cases[name] = {
            "prompt_tokens": length, "tokens_per_second": middle, "all": rates, "same_outputs": alike,
            "over_step": middle["tree"] / middle["step"], "over_each": middle["tree"] / middle["each"],
        }  # fmt: skip
    sizes = {"prompts": prompts, "steps": STEPS, "n": N, "step_tokens": STEP_TOKENS, "threads": os.cpu_count()}
    return {"machine": machine(), "device": str(policy.device), "shape": shape, **sizes, "cases": cases}


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("agreement", "speed"))
    parser.add_argument("--prompts", type=int, help="questions (default 256), or outputs drawn on for speed (4)")
    parser.add_argument("--outputs", type=int, default=4, help="outputs per question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--folder", type=Path, help="where the shape's random weights are kept")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=PROMPTS, default=[], help="lengths of prompts; default: all")
    options = parser.parse_args()
    if options.part == "agreement":
        name, found = "agreement", agreement(options.prompts or 256, options.outputs, options.seed)
    else:
        folder = options.folder or Path("bench-shapes") / options.shape
        sizes = options.prompts or 4, options.pairs, options.cases
        name, found = f"speed-{options.shape}", speed(options.shape, folder, *sizes)
    target = RESULTS / "monte_carlo" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
