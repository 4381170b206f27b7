"""A plan against what really happens, and what it says where a job does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, Qwen3Config
from typer.testing import CliRunner

import groupwise
from groupwise.cli import app
from groupwise.config import Job, SamplingSection
from groupwise.jobfile import load_job
from groupwise.models.head import HeadShape
from groupwise.models.load import load_config
from groupwise.models.policy import LayoutName
from groupwise.models.size import weight_bytes
from groupwise.objective import PRESETS
from groupwise.planning import hardware
from groupwise.planning import plan as plans
from groupwise.planning.hardware import Rates
from groupwise.planning.meter import Cost
from groupwise.planning.plan import Plan, in_text
from groupwise.planning.trace import Shape, TracedModel
from groupwise.wiring.python_objects import PythonObjects
from tests.run.tiny import save_model, save_rewards, save_rows
from tests.tiny_judges import save_judge

RATES = Rates(
    flops_many=1e9, flops_few=1e9, bytes_many=1e9, bytes_few=1e9, bytes_memory=1e9, operation_decoding=0.0,
    operation_forward=0.0, operation_training=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does 1e9 of everything a second."""
    monkeypatch.setattr(plans, "measure", lambda *_, **__: RATES)


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    save_model(folder / "model")
    save_rows(folder / "prompts.jsonl", [{"prompt": "a" * n, "want": "a"} for n in (4, 20, 12)])
    save_rewards(folder / "rewards.py")
    return folder


@pytest.fixture(scope="module")
def plain(at: Path) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "measure", lambda *_, **__: RATES)
        return a_plan(at)


def a_plan(at: Path, model: str = "model", **options: Any) -> Plan:
    settings = {
        "prompts_per_step": 2, "sampling.num_generations": 4, "max_completion_length": 16, "device": "cpu", "beta": 0.0,
        **options,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in settings.items() if "." in key]
    named = {key: value for key, value in settings.items() if "." not in key}
    return groupwise.plan(
        model=str(at / model), data=str(at / "prompts.jsonl"), reward=f"{at / 'rewards.py'}:share",
        overrides=overrides, **named,
    )  # fmt: skip


def test_reward_models_are_counted(at: Path, plain: Plan) -> None:
    """One that scores holds its weights, one that is trained its masters, gradients and means as well."""
    save_judge(at / "judge", "process")
    scoring = 4 * sum(t.numel() for t in load_file(at / "judge/model.safetensors").values())
    judged = a_plan(at, step_reward=f"model:{at / 'judge'}")
    assert judged.memory["reward models"] == scoring
    assert judged.needed - plain.needed == pytest.approx(scoring, abs=4096)
    elsewhere = a_plan(at, step_reward=f"model:{at / 'judge'}", **{"reward.device": "cuda:0"})
    assert "reward models" not in elsewhere.memory
    trained = a_plan(at, step_reward="reward_model", verifier=f"{at / 'rewards.py'}:share", labels="monte_carlo")
    backbone = sum(p.numel() for p in AutoModelForTokenClassification.from_pretrained(at / "model").parameters())
    assert trained.memory["reward model in training"] == 16 * backbone
    other = a_plan(
        at, step_reward="reward_model", verifier=f"{at / 'rewards.py'}:share", labels="monte_carlo",
        **{"reward_model.path": str(at / "judge")},
    )  # fmt: skip
    assert other.memory["reward model in training"] == 4 * scoring


def test_weights_by_hand() -> None:
    """Of 1,000 parameters: 4 bytes as masters, 4 of gradients, 8 of means; the narrow type's 2 for each copy."""
    assert sum(weight_bytes(1_000, torch.float32, reference=False).values()) == 16_000
    assert sum(weight_bytes(1_000, torch.float32, reference=True).values()) == 20_000
    assert sum(weight_bytes(1_000, torch.bfloat16, reference=True).values()) == 20_000


def test_stores_by_hand(at: Path, plain: Plan) -> None:
    """Two layers of a key and a value of one head of 16 floats: 256 bytes a token. Prompts of 20, outputs of 16."""
    found = plain.memory
    per_token = 2 * 2 * 1 * 16 * 4
    assert found["keys and values of prompts"] == pytest.approx(2 * 20 * per_token, rel=0.1)
    assert found["keys and values of outputs"] == pytest.approx(8 * 16 * per_token, rel=0.1)
    few = a_plan(at, max_live_outputs=4).memory
    assert few["keys and values of outputs"] == pytest.approx(4 * 16 * per_token, rel=0.1)


def test_what_is_needed_is_what_stays_and_the_largest_pass(plain: Plan) -> None:
    assert plain.needed == sum(plain.memory.values()) + max(plain.passes.values())
    assert plain.longest_prompt == 20
    assert "12 on average" in plain.prompts
    assert plain.step_seconds == sum(plain.seconds.values())


def test_time_follows_the_work(at: Path, plain: Plan) -> None:
    """Twice the passes, twice the time of training; old log-probs and a reference cost a forward each."""
    assert "old and reference log-probs" not in plain.seconds
    found = a_plan(at, num_iterations=2, beta=0.04)
    assert found.seconds["forward and backward"] == pytest.approx(2 * plain.seconds["forward and backward"])
    assert found.seconds["optimizer"] == pytest.approx(2 * plain.seconds["optimizer"])
    # Of four products' worth with backward and recomputed head, a forward is one; twice one of three is two.
    share = found.seconds["old and reference log-probs"] / found.seconds["forward and backward"]
    assert 0.2 < share < 0.4


def test_a_config_is_enough(at: Path, plain: Plan) -> None:
    (at / "bare").mkdir(exist_ok=True)
    (at / "bare" / "config.json").write_text((at / "model" / "config.json").read_text())
    found = a_plan(at, "bare", max_prompt_length=20)
    assert (found.memory, found.passes) == (plain.memory, plain.passes)
    assert "data.max_prompt_length" in found.prompts
    job = load_job(None, (), {"model": str(at / "bare"), "data": "x.jsonl", "reward": "a.py:f"}).job
    job = job.model_copy(update={"sampling": SamplingSection(max_completion_length=16)})
    unknown = plans._prompts(job, PythonObjects(), load_config(str(at / "bare")))
    assert unknown.longest == 64 - 16  # what the context leaves
    assert "assumed: set data.max_prompt_length" in unknown.source


def a_verdict(monkeypatch: pytest.MonkeyPatch, room: int, budget: int = 1000, checkpoints: bool = True) -> str:
    """Of two groups of 20 + 4 * 16 = 84 tokens that take 100 bytes each, 30 where layers are computed twice."""

    def peak(traced: TracedModel, shape: Shape, part: tuple[int, ...], checkpointing: bool) -> Cost:
        return Cost(peak=shape.tokens(part, shared=True) * (30 if checkpointing else 100))

    monkeypatch.setattr(TracedModel, "training", peak)
    monkeypatch.setattr(TracedModel, "can_checkpoint", checkpoints)
    job = Job.model_validate(
        {"sampling": {"num_generations": 4, "max_completion_length": 16}}
        | {"train": {"prompts_per_step": 2, "tokens_per_micro_batch": budget}}
    )
    traced = TracedModel(Qwen3Config(), "shared", None, torch.float32)
    prompts = plans._Prompts(20, 20.0, "by hand")
    planned = plans._Planned(job, traced, torch.device("cpu"), PRESETS["dapo"], 0, True, prompts)
    return plans._verdict(job, plans._what_fits(planned, room, sampling=300))


@pytest.mark.parametrize(
    "room, said",
    [
        (16_800, "fits"),
        (16_799, "fits with tokens_per_micro_batch = 84"),  # one whole group: 8,400 bytes
        (8_399, "fits with gradient checkpointing"),  # of all 168 tokens: 5,040
        (5_039, "fits with gradient checkpointing and tokens_per_micro_batch = 84"),  # 2,520
        (2_519, "fits with gradient checkpointing and tokens_per_micro_batch = 42"),  # 20 + 16 tokens: 1,080
        (1_079, "does not fit"),
        (299, "does not fit"),  # sampling needs 300
    ],
)
def test_the_verdict_names_what_would_do(monkeypatch: pytest.MonkeyPatch, room: int, said: str) -> None:
    assert a_verdict(monkeypatch, room) == said


def test_without_checkpointing_single_outputs_are_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    assert a_verdict(monkeypatch, 8_399, checkpoints=False) == "fits with tokens_per_micro_batch = 42"
    assert a_verdict(monkeypatch, 3_599, checkpoints=False) == "does not fit"


def test_the_text_names_every_component(plain: Plan) -> None:
    text = in_text(plain)
    for part in (*plain.memory, *plain.passes, *plain.activations, *plain.seconds, "verdict: fits", "12 on average"):
        assert part in text


def test_the_command_tells_what_python_does(at: Path, monkeypatch: pytest.MonkeyPatch, plain: Plan) -> None:
    objects: list[Job] = []
    monkeypatch.setattr(plans, "plan_of", lambda job, _: objects.append(job) or plain)
    arguments = ["plan", "--model", str(at / "model"), "--data", str(at / "prompts.jsonl"), "--reward", "r.py:f"]
    arguments += ["--set", "sampling.max_completion_length=16"]
    text = CliRunner().invoke(app, arguments)
    assert (text.exit_code, text.output) == (0, f"{in_text(plain)}\n")
    assert objects[0].sampling.max_completion_length == 16
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert found == json.loads(json.dumps(plain.as_dict()))


@pytest.mark.parametrize(("layout", "cached"), [("shared", True), ("plain", True), ("plain", False)])
def test_rates_are_of_this_machine(at: Path, layout: LayoutName, cached: bool) -> None:
    traced = TracedModel(load_config(str(at / "model")), layout, HeadShape(), torch.float32)
    found = hardware.measure(traced, few=2, many=64, cached=cached)
    assert found.flops_few > 1e6
    assert 1e7 < found.flops_many < 1e15
    assert 1e7 < found.bytes_memory < 1e13
    for seconds in (found.operation_decoding, found.operation_forward, found.operation_training):
        assert 1e-8 < seconds < 1


def test_seconds_by_hand() -> None:
    """A decoding step: weights of 8 bytes at 2 a second outlast 6 FLOPs at 2; 5 of 1 byte; 3 operations of 7."""
    cost = Cost(flops=6, moved=5, operations=3)
    found = Rates(
        flops_many=1, flops_few=2, bytes_many=10, bytes_few=1, bytes_memory=2, operation_decoding=7,
        operation_forward=11, operation_training=13,
    )  # fmt: skip
    assert found.decoding(cost, weights=8) == 4 + 5 + 21
    assert found.decoding(cost, weights=2) == 3 + 5 + 21
    assert found.seconds(cost) == 6 + 0.5 + 33
    assert found.seconds(cost, training=True) == 6 + 0.5 + 39


CASES: dict[str, dict[str, Any]] = {
    "float32, checkpointed": {"model.gradient_checkpointing": "true", "train.prompts_per_step": 24},
    "float32 with a reference, several micro-batches": {"objective.beta": 0.04, "train.tokens_per_micro_batch": 1600},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of a process")
@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_a_real_step_takes(tmp_path: Path, case: str) -> None:
    """Within a quarter, of several hundred MB. Two steps: from the second on Adam's moments are there beside the
    rest."""
    real, planned = real_and_planned(tmp_path, CASES[case])
    assert planned.needed == pytest.approx(real, rel=0.25), in_text(planned)


def real_and_planned(at: Path, changes: dict[str, Any]) -> tuple[int, Plan]:
    alphabet = "".join(chr(0x4E00 + i) for i in range(8190))
    save_model(at / "model", alphabet=alphabet, hidden=128, layers=6, max_length=512)
    save_rows(at / "prompts.jsonl", [{"prompt": alphabet[i] * 128, "want": "a"} for i in range(24)])
    save_rewards(at / "rewards.py")
    settings = {
        "sampling.num_generations": 4, "sampling.max_completion_length": 32, "train.prompts_per_step": 12,
        "objective.beta": 0.0, "model.device": '"cpu"', "model.path": f'"{at / "model"}"',
        "data.path": f'"{at / "prompts.jsonl"}"', "reward.functions": f'["{at / "rewards.py"}:share"]', **changes,
    }  # fmt: skip
    lines: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        lines.setdefault(section, []).append(f"{name} = {value}")
    job = at / "job.toml"
    job.write_text("".join("\n".join([f"[{section}]", *rows, ""]) for section, rows in lines.items()))
    script = Path(__file__).parents[2] / "benchmarks" / "one_step.py"
    # glibc keeps what small tensors leave, as much again as such a model needs; here it gives all of it back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    done = subprocess.run([sys.executable, script, job], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["bytes"]), groupwise.plan(str(job))
