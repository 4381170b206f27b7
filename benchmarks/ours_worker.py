"""groupwise's end of the comparison: the parts of a run, driven as `groupwise.run.loop` drives them."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import groupwise
from benchmarks.cases import SEED, Case, reward_of, text_of
from benchmarks.protocol import Channel, FamilyPeak, peak, resident
from benchmarks.shapes import tokenizer_of
from groupwise.cpu.malloc import keep_freed_memory, own_process
from groupwise.data.stream import PromptStream
from groupwise.engines.mailbox import Mailbox
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.processes import PooledEngine
from groupwise.learn.learner import LearnerSettings, PolicyLearner
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.models.load import LoadedPolicy, load_policy
from groupwise.models.policy import Policy
from groupwise.objective import objective_named, token_advantages
from groupwise.rewards.functions.load import load_reward
from groupwise.rewards.scorer import Scorer
from groupwise.run.rollouts import GroupSampler, Rollouts
from groupwise.tokenizer.codec import Codec
from groupwise.types import Prompt, Request, Sampling, Scored
from groupwise.watch.record import Record

AFTER_IMPORTS = resident()
PROMPTS = 64
"""How many steps have prompts of their own."""


class PrescribedEngine(NativeEngine):
    """Ends each output at its prescribed length, at no more cost than the test for an end token that it replaces."""

    def __init__(self, case: Case, policy: Policy, codec: Codec) -> None:
        super().__init__(policy, codec)
        self.case = case
        self._lengths: dict[str, list[int]] = {}

    def submit(self, request: Request) -> None:
        step, slot = (int(part) for part in request.uid.split("/")[1:])
        lengths = self.case.lengths(step)[slot * self.case.outputs :][: self.case.outputs]
        self._lengths[request.uid] = [min(length, request.sampling.max_tokens) for length in lengths]
        super().submit(request)

    def _finish(self, row: Any) -> Any:
        return "stop" if len(row.token_ids) >= self._lengths[row.request.uid][row.index] else None


class Session:
    """A case under way: one step whenever it is asked for."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.case = Case(**settings["case"])
        self.dtype = getattr(torch, settings["dtype"])
        folder = Path(settings["folder"])
        own_process()
        keep_freed_memory("cpu")  # as every command does that trains or samples
        loaded = load_policy(str(folder), device="cpu", dtype=settings["dtype"])
        self.line = loaded.line
        codec = self._codec(folder)
        self.engine = PooledEngine(PrescribedEngine(self.case, loaded.policy, codec))
        self.rollouts = self._rollouts(codec)
        if settings.get("sampling_only"):
            for parameter in loaded.policy.model.parameters():
                parameter.data = parameter.data.to(loaded.compute_dtype)
        else:
            self._learn(loaded, settings["tokens_per_micro_batch"])

    def _learn(self, loaded: LoadedPolicy, budget: int) -> None:
        """What a step needs beside its outputs."""
        self.objective = objective_named("grpo", max_completion_length=self.case.completion, beta=self.case.beta)
        optimizer = OptimizerSettings(learning_rate=1e-6, total_updates=1_000_000)
        settings = LearnerSettings(
            optimizer=optimizer, tokens_per_micro_batch=budget, compute_dtype=loaded.compute_dtype, seed=SEED
        )
        self.learner = PolicyLearner(loaded.policy, self.objective, settings)
        self.learner.refresh(0)
        self.rollouts.load_weights(self.learner)

    def _codec(self, folder: Path) -> Codec:
        codec = Codec(tokenizer_of(folder))
        codec.end_token_ids = frozenset()  # lengths are prescribed
        return codec

    def _rollouts(self, codec: Codec) -> Rollouts:
        case = self.case
        prompts = []
        for number in range(PROMPTS * case.prompts):
            text = text_of(case.prompt_ids(number))
            prompts.append(Prompt(str(number), text, codec.encode_prompt(text)))
            assert len(prompts[-1].token_ids) == case.prompt, f"a prompt has {len(prompts[-1].token_ids)} tokens"
        scorer = Scorer([load_reward(_reward, timeout=60, output_timeout=10)], None, 1_000_000, _warn)
        draw = GroupSampler(Sampling(max_tokens=case.completion), case.outputs, SEED, "train")
        stream = PromptStream(prompts, seed=SEED, shuffle=False)
        return Rollouts(stream, Mailbox(self.engine), scorer, draw, case.prompts)

    def step(self, number: int, short: int | None = None) -> dict[str, Any]:
        """One step; `short` cuts its outputs, for warming up."""
        lengths = self._prescribe(number, short)
        record = Record(number)
        start = time.perf_counter()
        scored = self.rollouts.collect(number, record)
        sampled = time.perf_counter()
        credit = token_advantages(scored, self.objective) if self.case.outputs > 1 else _alone(scored)
        batch = self.learner.prepare(scored, credit)
        metrics = self.learner.update(batch)
        self.rollouts.load_weights(self.learner)
        end = time.perf_counter()
        _check(scored, lengths)
        return {
            "seconds": end - start, "sample": sampled - start, "train": end - sampled, "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"], "micro_batches": metrics["micro_batches"],
            "mismatch": metrics["sampling/logp_difference/max"], "tokens": sum(lengths),
        }  # fmt: skip

    def sample(self, number: int, short: int | None = None) -> dict[str, Any]:
        """Sampling alone."""
        lengths = self._prescribe(number, short)
        prompts = self.rollouts.prompts.take(self.case.prompts)
        start = time.perf_counter()
        groups = self.rollouts.draw.sample(Mailbox(self.engine), prompts, number)
        seconds = time.perf_counter() - start
        assert [len(c.token_ids) for group in groups for c in group.completions] == lengths
        return {"seconds": seconds, "tokens": sum(lengths)}

    def product_rate(self, size: int = 2048, times: int = 8, patience: float = 3.0) -> dict[str, Any]:
        """FLOP per second of a large matrix product in the compute type: the best of several."""
        left, right = (torch.randn(size, size).to(self.dtype) for _ in range(2))
        seconds: list[float] = []
        while len(seconds) < times and sum(seconds) < patience:
            start = time.perf_counter()
            left @ right
            seconds.append(time.perf_counter() - start)
        return {"rate": 2 * size**3 / min(seconds)}

    def _prescribe(self, number: int, short: int | None) -> list[int]:
        lengths = [min(length, short or length) for length in self.case.lengths(number)]
        sampling = replace(self.rollouts.draw.sampling, max_tokens=max(lengths))
        self.rollouts.draw = replace(self.rollouts.draw, sampling=sampling)
        return lengths

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked: a step, sampling alone, or a matrix product."""
        together = 0
        if "memory" in command:
            family = FamilyPeak()
            family.start()
            found = self.step(command["memory"])
            together = family.stop()
        elif "step" in command:
            found = self.step(command["step"], command.get("short"))
        elif "sample" in command:
            found = self.sample(command["sample"], command.get("short"))
        else:
            found = self.product_rate()
        return {**found, "peak": max(peak(), together) - AFTER_IMPORTS}


def _check(scored: Scored, lengths: list[int]) -> None:
    seen = [len(c.token_ids) for group in scored for c in group.group.completions]
    assert seen == lengths, f"lengths are {seen}"
    assert all(len(set(group.rewards)) > 1 for group in scored if len(group.rewards) > 1), "a group is constant"


def _alone(scored: Scored) -> list[list[float]]:
    """Advantages of outputs without siblings: within the group they would be 0, and there would be nothing to train."""
    return [[score.reward + 0.5 for score in group.scores] for group in scored]


def _reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [reward_of(ids) for ids in completion_ids]


def _warn(message: str) -> None:
    sys.stderr.write(f"{message}\n")


def main() -> None:
    """Serve the case and the settings of the command line."""
    channel = Channel()
    session = Session(json.loads(sys.argv[1]))
    versions = {module.__name__: module.__version__ for module in (groupwise, torch, transformers)}
    channel.send(versions=versions, line=session.line, threads=torch.get_num_threads())
    for command in channel.commands():
        channel.send(**session.answer(command))


if __name__ == "__main__":
    main()
