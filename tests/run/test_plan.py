"""A plan against what really happens, and what it says where a job does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import groupwise
from groupwise.cli import app
from groupwise.run import plan as plans
from groupwise.run.memory import weight_bytes
from groupwise.run.plan import Plan, in_text
from groupwise.run.rates import Rates
from tests.run.tiny import save_model, save_rewards, save_rows

RATES = Rates(
    flops_many=1e9, flops_few=1e9, bytes_activation=1e9, bytes_memory=1e9, operation_forward=0.0,
    operation_training=0.0,
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


def a_plan(at: Path, model: str = "model", **options: Any) -> Plan:
    settings = {
        "prompts_per_step": 2, "sampling.num_generations": 4, "max_completion_length": 16, "device": "cpu", **options,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in settings.items() if "." in key]
    named = {key: value for key, value in settings.items() if "." not in key}
    return groupwise.plan(
        model=str(at / model), data=str(at / "prompts.jsonl"), reward=f"{at / 'rewards.py'}:share",
        overrides=overrides, **named,
    )  # fmt: skip


def test_weights_by_hand() -> None:
    """Of 1,000 parameters: 4 bytes as masters, 4 of gradients, 8 of means; the narrow type's 2 for each copy."""
    assert sum(weight_bytes(1_000, torch.float32, reference=False).values()) == 16_000
    assert sum(weight_bytes(1_000, torch.float32, reference=True).values()) == 20_000
    assert sum(weight_bytes(1_000, torch.bfloat16, reference=True).values()) == 20_000


def test_stores_by_hand(at: Path) -> None:
    """Two layers of a key and a value of one head of 16 floats: 256 bytes a token. Prompts of 20, outputs of 16."""
    found = a_plan(at).memory
    per_token = 2 * 2 * 1 * 16 * 4
    assert found["keys and values of prompts"] == pytest.approx(2 * 20 * per_token, rel=0.1)
    assert found["keys and values of outputs"] == pytest.approx(8 * 16 * per_token, rel=0.1)
    few = a_plan(at, max_live_outputs=4).memory
    assert few["keys and values of outputs"] == pytest.approx(4 * 16 * per_token, rel=0.1)


def test_what_is_needed_is_what_stays_and_the_largest_pass(at: Path) -> None:
    found = a_plan(at)
    assert found.needed == sum(found.memory.values()) + max(found.passes.values())
    assert found.longest_prompt == 20
    assert "12 on average" in found.prompts


def test_time_follows_the_work(at: Path) -> None:
    """Twice the passes, twice the time of training; a reference and old log-probs cost a forward each."""
    one, two = a_plan(at, beta=0.0), a_plan(at, beta=0.0, num_iterations=2)
    assert two.seconds["forward and backward"] == pytest.approx(2 * one.seconds["forward and backward"])
    assert "old and reference log-probs" not in one.seconds
    old, both = two.seconds["old and reference log-probs"], a_plan(at, num_iterations=2, beta=0.04).seconds
    assert both["old and reference log-probs"] == pytest.approx(2 * old)
    assert one.step_seconds == sum(one.seconds.values())


def test_a_config_is_enough(at: Path) -> None:
    (at / "bare").mkdir(exist_ok=True)
    (at / "bare" / "config.json").write_text((at / "model" / "config.json").read_text())
    found, whole = a_plan(at, "bare", max_prompt_length=20), a_plan(at)
    assert (found.memory, found.passes) == (whole.memory, whole.passes)
    assert "data.max_prompt_length" in found.prompts
    assert a_plan(at, "bare").longest_prompt == 64 - 16  # what the context leaves


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(plans, "available_memory", lambda device: int(size))


def test_the_verdict_names_what_would_do(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step has 2 * (20 + 4 * 16) = 168 tokens: with less room its groups go one by one, then layers twice."""
    plain = a_plan(at)
    free(monkeypatch, plain.needed / plans.ROOM + 100)
    assert a_plan(at).verdict == "fits"
    free(monkeypatch, plain.needed * 0.99 / plans.ROOM)
    smaller = a_plan(at)
    assert (smaller.verdict, smaller.fits) == ("fits with tokens_per_micro_batch = 84", False)
    assert a_plan(at, tokens_per_micro_batch=84).verdict == "fits"
    one_group = a_plan(at, tokens_per_micro_batch=84)
    free(monkeypatch, one_group.needed * 0.99 / plans.ROOM)
    again = a_plan(at)
    assert again.gradient_checkpointing
    assert again.verdict.startswith("fits with gradient checkpointing")
    found = {"gradient_checkpointing": True, "tokens_per_micro_batch": again.tokens_per_micro_batch}
    assert a_plan(at, **found).verdict == "fits"
    free(monkeypatch, sum(plain.memory.values()))
    assert a_plan(at).verdict == "does not fit"


def test_the_command_prints_it(at: Path) -> None:
    arguments = [
        "plan", "--model", str(at / "model"), "--data", str(at / "prompts.jsonl"), "--set",
        "sampling.max_completion_length=16", "--reward", f"{at / 'rewards.py'}:share", "--set", "model.device=cpu",
    ]  # fmt: skip
    text = CliRunner().invoke(app, arguments)
    assert text.exit_code == 0, text.output
    for part in ("master weights", "keys and values of prompts", "verdict: fits", "decode", "forward and backward"):
        assert part in text.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert found["needed"] == sum(found["memory"].values()) + max(found["passes"].values())


def test_rates_are_of_this_machine(at: Path) -> None:
    from groupwise.models.load import load_config
    from groupwise.run import rates

    found = rates.measure(load_config(str(at / "model")), torch.float32, torch.device("cpu"), few=2, many=64)
    assert found.flops_few > 1e6
    assert 1e7 < found.flops_many < 1e15
    assert 1e7 < found.bytes_memory < 1e13
    assert 1e-8 < found.operation_forward < 1e-2


CASES = {
    "float32": {},
    "float32, checkpointed": {"model.gradient_checkpointing": "true"},
    "bfloat16 with a reference": {"model.dtype": '"bfloat16"', "objective.beta": 0.04},
    "bfloat16, checkpointed, long prompts": {
        "model.dtype": '"bfloat16"', "model.gradient_checkpointing": "true", "prompt": 256,
    },
    "float32 with a reference, several micro-batches": {"objective.beta": 0.04, "train.tokens_per_micro_batch": 700},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of a process")
@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_a_real_step_takes(tmp_path: Path, case: str) -> None:
    """Within a quarter, of several hundred MB. Two steps: from the second on Adam's means are there beside the rest."""
    changes = dict(CASES[case])
    prompt = int(str(changes.pop("prompt", 128)))
    real, planned = real_and_planned(tmp_path, prompt, changes)
    assert planned.needed == pytest.approx(real, rel=0.25), in_text(planned)


def real_and_planned(at: Path, prompt: int, changes: dict[str, Any]) -> tuple[int, Plan]:
    alphabet = "".join(chr(0x4E00 + i) for i in range(4094))
    save_model(at / "model", alphabet=alphabet, hidden=384, layers=4, max_length=512)
    save_rows(at / "prompts.jsonl", [{"prompt": alphabet[i] * prompt, "want": "a"} for i in range(4)])
    save_rewards(at / "rewards.py")
    settings = {
        "sampling.num_generations": 8, "sampling.max_completion_length": 64, "train.prompts_per_step": 4,
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
    done = subprocess.run([sys.executable, script, job], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["bytes"]), groupwise.plan(str(job))
