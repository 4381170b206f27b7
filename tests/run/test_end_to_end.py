"""A person's own model, data and reward, from the first command to a folder that transformers loads."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import groupwise
from groupwise.jobfile import load_job
from groupwise.watch.metrics import unknown
from tests.commandline import call
from tests.run.tiny import events, rollouts, save_model, save_rewards, save_rows

STEPS = 16
GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": 1, "pad_token_id": 0}


class World:
    """A folder with everything, the run in it, and what the command printed."""

    def __init__(self, at: Path) -> None:
        self.at, self.model, self.run = at, at / "model", at / "runs" / "mine"
        save_model(self.model, dtype=torch.bfloat16)
        (self.model / "generation_config.json").write_text(json.dumps(GENERATION, indent=4))
        (self.model / "chat_template.jinja").write_text("{{ messages[0].content }}\n")
        save_rows(at / "prompts.jsonl")
        save_rows(at / "held_out.jsonl", [{"prompt": f"{letter}{letter}d", "want": "a"} for letter in "abcdefgh"])
        save_rewards(at / "rewards.py")
        command = "train --model model --data prompts.jsonl --reward rewards.py:share --run runs/mine"
        options = ["--eval-data", "held_out.jsonl", "--set", "watch.tensorboard=true", "--set", "eval.every=8"]
        for knob in ("max_completion_length=12", "num_generations=8"):
            options += ["--set", f"sampling.{knob}"]
        for knob in (f"steps={STEPS}", "prompts_per_step=8", "learning_rate=4e-3"):
            options += ["--set", f"train.{knob}"]
        self.ended = subprocess.run(
            [sys.executable, "-m", "groupwise", *command.split(), *options], cwd=at, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def in_the_world(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run where the job's relative paths start from."""
    monkeypatch.chdir(world.at)


def test_the_reward_rises(world: World) -> None:
    assert world.ended.returncode == 0, world.ended.stderr
    rewards = [event["reward"] for event in events(world.run)[1:]]
    assert len(rewards) == STEPS
    assert fmean(rewards[:2]) < 0.25
    assert fmean(rewards[-2:]) > fmean(rewards[:2]) + 0.3
    result = json.loads((world.run / "result.json").read_text())
    assert result["eval_reward_after"] > result["eval_reward_before"]
    assert result["steps"] == STEPS


def test_a_log_file_gets_plain_lines_and_nothing_else(world: World) -> None:
    [warning] = world.ended.stderr.splitlines()
    assert warning.startswith("warning: All 24 prompts are texts, and the model has a chat template")
    *before, begin = (line for line in world.ended.stdout.splitlines()[:4])
    assert before[0] == "loading model"
    assert before[1].startswith("Qwen3ForCausalLM, ")
    assert before[2] == "answering 8 held-out prompts before the first step"
    assert begin.startswith("eval at step 0: ")
    _, *lines, following, last = world.ended.stdout.splitlines()[2:]
    lines.remove("sampling the outputs of the first step")
    assert following == (
        'what next: groupwise sample runs/mine "TEXT" · groupwise eval runs/mine · groupwise export runs/mine DIR'
    )
    assert all(line.startswith(("step ", "eval at step ")) for line in lines)
    assert len(lines) == STEPS + 3
    result = json.loads((world.run / "result.json").read_text())
    accuracy = f"{result['eval_before']:.2f} -> {result['eval_after']:.2f}"
    assert last.startswith(f"held-out accuracy {accuracy} in ")
    assert last.endswith(" s · run: runs/mine")


def test_the_run_folder_holds_what_is_promised(world: World) -> None:
    found = {path.name for path in world.run.iterdir()}
    wanted = {"job.toml", "events.jsonl", "rollouts.jsonl", "checkpoints", "lock", "result.json", "tensorboard"}
    assert found - {"rewards.log"} == wanted
    assert {path.name for path in (world.run / "checkpoints").iterdir()} == {f"step-{STEPS:08d}", "best"}
    assert list((world.run / "tensorboard").glob("events.out.tfevents.*"))
    assert load_job(world.run / "job.toml").job.train.learning_rate == 4e-3
    result = json.loads((world.run / "result.json").read_text())
    assert {"eval_before", "eval_after", "seconds", "seed", "commit"} <= result.keys()
    assert list(world.run.rglob("*.pt")) == list(world.run.rglob("*.pkl")) == list(world.run.rglob("*.bin")) == []


def test_every_metric_is_documented_and_none_that_is_promised_is_missing(world: World) -> None:
    first, *steps = events(world.run)
    assert [event["step"] for event in (first, *steps)] == list(range(STEPS + 1))
    promised = {
        "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "kl", "entropy", "loss", "grad_norm",
        "clip_ratio/region_mean", "sampling/logp_difference/max", "time/step", "time/sample", "time/reward",
        "time/update", "tokens/sampled", "tokens/per_second", "memory/peak_bytes", "rewards/share/mean",
    }  # fmt: skip
    for event in steps:
        assert unknown(event) == []
        assert promised <= event.keys()
        assert event["sampling/logp_difference/max"] < 1e-4
        assert event["memory/peak_bytes"] > 1e6
    assert unknown(first) == []
    assert [event["step"] for event in events(world.run) if "eval/reward" in event] == [0, 8, 16]


def test_groups_are_kept_with_rewards_and_advantages(world: World) -> None:
    groups = rollouts(world.run)
    assert len(groups) == STEPS * 8
    assert {(group["step"], group["slot"]) for group in groups} == {(s + 1, q) for s in range(STEPS) for q in range(8)}
    for group in groups:
        outputs = group["outputs"]
        rewards, advantages = ([output[name] for output in outputs] for name in ("reward", "advantage"))
        assert rewards == pytest.approx([output["text"].count("a") / max(1, len(output["text"])) for output in outputs])
        assert fmean(advantages) == pytest.approx(0, abs=1e-9)
        assert (max(advantages) > 0) == (max(rewards) > min(rewards))
    texts = [[output["text"] for output in group["outputs"]] for group in groups if group["step"] == 1]
    assert all(len(set(of_group)) > 1 for of_group in texts)
    assert len({tuple(of_group) for of_group in texts}) == len(texts)


def test_the_export_is_an_ordinary_folder(world: World, tmp_path: Path) -> None:
    target = tmp_path / "export"
    ended = call("export", "runs/mine", target)
    assert (ended.status, ended.out) == (0, f"exported to {target}\n")
    config = json.loads((target / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 10_000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16", "as the source"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (target / name).read_bytes() == (world.model / name).read_bytes(), name
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("abc")["input_ids"] == AutoTokenizer.from_pretrained(world.model)("abc")["input_ids"]
    card = (target / "README.md").read_text()
    for said in (
        "`model`",
        "`prompts.jsonl`",
        f"{STEPS} steps",
        "`rewards.py:share`",
        "accuracy",
        '"learning_rate": 0.004',
    ):
        assert said in card


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[2, 3, 4, 5, 2]])).logits


@pytest.mark.parametrize("which", ["latest", "best", "base"])
def test_exported_weights_are_those_of_the_run(world: World, tmp_path: Path, which: str) -> None:
    groupwise.export("runs/mine", tmp_path / "export", which=which)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert exported.dtype == torch.bfloat16
    stock = AutoModelForCausalLM.from_pretrained(world.model)
    assert which == "base" or not logits(exported).equal(logits(stock))
    folder = {"latest": f"step-{STEPS:08d}", "best": "best"}
    if which != "base":
        stock.load_state_dict(load_file(world.run / "checkpoints" / folder[which] / "model.safetensors"), strict=False)
        stock.tie_weights()
    assert logits(exported).equal(logits(stock))


def test_a_float32_model_is_exported_to_the_bit(world: World, tmp_path: Path) -> None:
    """And a fresh engine on it samples what the run's own weights sample."""
    model = save_model(tmp_path / "model")
    groupwise.train(
        model=model, data="prompts.jsonl", reward="rewards.py:share", run=tmp_path / "run", steps=2, num_generations=4,
        max_completion_length=8, learning_rate=1e-2, show="quiet",
    )  # fmt: skip
    exported = load_file(groupwise.export(tmp_path / "run", tmp_path / "export") / "model.safetensors")
    saved = load_file(tmp_path / "run/checkpoints/step-00000002/model.safetensors")
    assert all(exported[name].equal(saved[name]) for name in saved)
    again = groupwise.train(
        model=tmp_path / "export", data="prompts.jsonl", reward="rewards.py:share", run=tmp_path / "again", steps=1,
        max_completion_length=8, eval_data="held_out.jsonl", show="quiet",
    )  # fmt: skip
    found = groupwise.evaluate(tmp_path / "run", eval_data="held_out.jsonl")
    assert found["reward"] == again.eval_reward_before


def test_sample_continues_a_prompt(world: World) -> None:
    ended = call("sample", "runs/mine", "bb")
    assert (ended.status, ended.out.count("a") > 6) == (0, True), ended
    assert ended.err.startswith("loading model\nQwen3ForCausalLM"), "what the output is not goes beside it"
    drawn = [call("sample", "runs/mine", "bb", "-n", "4", "--temperature", "1", "--seed", seed).out for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0].count("\n---\n") == 3
    found = call("sample", "runs/mine", "bb", "-n", "2", "--temperature", "2", "--json", "--which", "base")
    lines = [json.loads(line) for line in found.out.splitlines()]
    assert [line.keys() for line in lines] == [{"text", "tokens", "finish"}] * 2


def test_sample_reads_standard_input(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("bb"))
    assert call("sample", "runs/mine", "-").out == call("sample", "runs/mine", "bb").out


def test_sample_is_short_where_the_context_ends(world: World) -> None:
    assert groupwise.sample("runs/mine", "b" * 60, temperature=1.0, seed=3)[0].finish
    assert len(groupwise.sample("runs/mine", "b" * 60, overrides=["eval.max_completion_length=50"])[0].token_ids) <= 4


def test_eval_finds_what_the_run_found(world: World) -> None:
    ended = call("eval", "runs/mine", "--json")
    found = json.loads(ended.out)
    last = events(world.run)[-1]
    assert {f"eval/{name}": value for name, value in found.items()} == {
        name: value for name, value in last.items() if name.startswith("eval/")
    }
    base = json.loads(call("eval", "runs/mine", "--json", "--which", "base").out)
    assert base["reward"] == pytest.approx(events(world.run)[0]["eval/reward"])


def test_eval_is_a_table_for_people(world: World) -> None:
    options = ("--set", "eval.num_generations=4", "--set", "eval.temperature=1.0", "--data", "prompts.jsonl")
    ended = call("eval", "runs/mine", *options)
    names = [line.split()[0] for line in ended.out.splitlines()]
    assert names == ["reward", "above_threshold", "mean_length", "unscored"], "a share of letters is no accuracy"
    assert "+-" in ended.out.splitlines()[0]


def test_a_job_is_evaluated_before_it_is_trained(world: World) -> None:
    (world.at / "job.toml").write_text((world.run / "job.toml").read_text())
    assert json.loads(call("eval", "job.toml", "--json").out)["reward"] == pytest.approx(
        events(world.run)[0]["eval/reward"]
    )


def test_show_and_init(world: World, tmp_path: Path) -> None:
    shown = call("show", "runs/mine")
    assert shown.status == 0
    assert "8 prompts x 8 outputs = 64 outputs -> 1 update per step" in shown.out
    written = call("init", tmp_path / "new.toml")
    assert "groupwise train" in written.out
    again = call("show", tmp_path / "new.toml")
    assert again.status == 0
    assert again.out == call("show", tmp_path / "new.toml").out
    assert call("init", tmp_path / "new.toml").status == 2, "nothing is written over"
    assert json.loads(call("show", "--schema").out)["title"] == "Job"


def test_help_and_version() -> None:
    assert call("--version").out == f"groupwise {groupwise.__version__}\n"
    listed = call("--help").out
    for command in ("train", "resume", "eval", "sample", "export", "show", "init"):
        assert f"  {command} " in listed
    assert "..." not in listed.removeprefix("Usage: groupwise [OPTIONS] COMMAND [ARGS]..."), "each says all of it"
    for command in ("train", "resume", "eval", "sample", "export", "show", "init"):
        assert call(command, "--help").status == 0


def test_from_python_with_rows_and_a_function(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": letter * 2, "want": "c"} for letter in "abcd"]

    def wanted(prompt: str, completion: str, want: str) -> float:
        return float(want in completion)

    options: dict[str, Any] = {"max_completion_length": 6, "num_generations": 4, "prompts_per_step": 2, "steps": 2}
    result = groupwise.train(
        model=world.model, data=rows, reward=[wanted, lambda prompt, completion: 0.5], run=tmp_path / "run",
        eval_data=iter(rows[:2]), overrides=["reward.weights=[1.0, 0.5]"], **options,
    )  # fmt: skip
    assert (result.run, result.steps, result.stopped_by) == (str(tmp_path / "run"), 2, None)
    assert result.eval_before is None, "the sum of two rewards is no accuracy"
    assert result.eval_reward_before is not None
    assert capsys.readouterr().out.splitlines()[-1].startswith("held-out reward")
    last = events(tmp_path / "run")[-1]
    assert last["rewards/lambda/mean"] == 0.5
    assert last["reward"] == pytest.approx(last["rewards/wanted/mean"] + 0.25)
    with pytest.raises(groupwise.GroupwiseError):
        groupwise.train(model=world.model, data=rows, reward=wanted, run=tmp_path / "run", **options)


def test_a_conversation_is_trained_on_as_well(world: World, tmp_path: Path) -> None:
    seen = []

    def polite(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        seen.append((prompts[0], completions[0]))
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": letter}]} for letter in "abcd"]
    groupwise.train(
        model=world.model, data=rows, reward=polite, run=tmp_path / "run", max_completion_length=6, num_generations=4,
        prompts_per_step=2, steps=1, show="quiet",
    )  # fmt: skip
    prompt, completion = seen[0]
    assert prompt[0]["role"] == "user"
    assert completion[0]["role"] == "assistant"
    assert rollouts(tmp_path / "run")[0]["prompt"] == prompt
