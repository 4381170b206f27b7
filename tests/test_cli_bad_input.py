"""Bad input ends with status 2 and one paragraph that says what, where, what was found and what would do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import groupwise
from groupwise.errors import GroupwiseError
from groupwise.models.load import load_policy
from groupwise.store import checkpoint
from groupwise.wiring import memory
from tests.commandline import Ended, call
from tests.run.tiny import CONTEXT, events, save_model, save_rewards, save_rows

SMALL = {
    "sampling.num_generations": 4,
    "sampling.max_completion_length": 8,
    "train.prompts_per_step": 2,
    "train.steps": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def at(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a reward, in which commands run."""
    (tmp_path / "model").symlink_to(model)
    save_rows(tmp_path / "rows.jsonl")
    save_rewards(tmp_path / "rewards.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*more: str, **knobs: Any) -> Ended:
    """`groupwise train` on the folder's own things; `knobs` change the job by dotted key (`train__steps=3`)."""
    changed = {"model.path": "model", "data.path": "rows.jsonl", "reward.functions": ["rewards.py:share"], **SMALL}
    changed |= {name.replace("__", "."): value for name, value in knobs.items()}
    options = [part for key, value in changed.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return call("train", "--run", "run", *options, *more)


def refused(ended: Ended, *said: str) -> None:
    """Status 2, and one paragraph on standard error with all of this in it."""
    assert ended.status == 2, ended
    [paragraph] = ended.err.split("groupwise: ")[1:]
    assert "\n\n" not in paragraph
    assert str(Path(groupwise.__file__).parent) not in ended.err, "a traceback holds the user's frames or is none"
    for part in said:
        assert part in paragraph


def test_without_a_fault_it_trains(at: Path) -> None:
    assert train().status == 0


@pytest.mark.parametrize(
    "knobs, said",
    [
        ({"train__learning_rat": 0.1}, ["there is no key `train.learning_rat`", "Did you mean `train.learning_rate`?"]),
        ({"train__lr": 0.1}, ["Did you mean `train.learning_rate`?"]),
        ({"train__steps": "ten"}, ["`train.steps` takes a whole number, at least 1", 'the string "ten"']),
        ({"train__steps": 2.5}, ["`train.steps` takes a whole number", "2.5"]),
        ({"objective__preset": "grop"}, ["`objective.preset` takes one of", "Did you mean `grpo`?"]),
        ({"reward__functions": "rewards.py:share"}, ['Write ["rewards.py:share"].']),
        ({"sampling__num_generations": 1}, ["`sampling.num_generations` = 1", "Take at least 2"]),
        ({"sampling__temperature": 0.0}, ["`sampling.temperature` = 0"]),
        ({"sampling__top_p": 0.9}, ["`sampling.top_p` = 0.9", "biased"]),
        ({"sampling__top_k": 50}, ["`sampling.top_k` = 50"]),
        ({"sampling__min_p": 0.1}, ["`sampling.min_p` = 0.1"]),
        ({"objective__kl": "k1"}, ['`objective.kl` = "k1" is refused', "gradient is zero", "k1_in_reward"]),
        ({"train__updates_per_batch": 3}, ["`train.updates_per_batch` = 3 is more than `train.prompts_per_step`"]),
        ({"eval__every": 2}, ["there are no held-out prompts"]),
        ({"sampling__stop": [""]}, ["stop string is empty"]),
        ({"sampling__max_completion_length": CONTEXT}, [f"`sampling.max_completion_length` = {CONTEXT}", "context"]),
        ({"model__device": "tpu"}, ["`model.device` takes a string like"]),
    ],
)
def test_a_job_that_cannot_run(at: Path, knobs: dict[str, Any], said: list[str]) -> None:
    refused(train(**knobs), *said)
    assert not (at / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "text, said",
    [
        ("[train]\nsteps = ten\n", ["job.toml is not valid TOML", "line 2", "`steps = ten`"]),
        ("[trane]\nsteps = 3\n", ["Did you mean `train`?"]),
        ("schema_version = 2\n", ["schema_version is 2, but this groupwise reads version 1"]),
    ],
)
def test_a_job_file_that_cannot_be_read(at: Path, text: str, said: list[str]) -> None:
    (at / "job.toml").write_text(text)
    refused(call("train", "job.toml"), *said)


def test_an_unknown_recipe(at: Path) -> None:
    refused(call("train", "arithmetik"), "no job file `arithmetik`", "Did you mean `arithmetic`?")


def test_what_the_command_line_itself_refuses(at: Path) -> None:
    assert call("trian").status == 2
    assert call("train", "--step", "3").status == 2
    refused(train("--quiet", "--json"), "--quiet and --json")
    refused(train("--set", "train.steps"), "--set takes section.key=value")
    recipes = "(arithmetic, arithmetic-iterative, arithmetic-prm, arithmetic-process, gsm8k)"
    refused(call("sample", "run", "a"), f"run is no run folder, no job file and no recipe {recipes}")


def test_no_room_for_a_reference(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = sum(p.numel() for p in load_policy("model", device="cpu").policy.parameters())
    monkeypatch.setattr(memory, "available_memory", lambda device: 18 * count)
    refused(train(), "`objective.beta` = 0.04", "no room", "Set objective.beta to 0")
    assert train(objective__beta=0.0).status == 0
    monkeypatch.setattr(memory, "available_memory", lambda device: 8 * count)
    refused(train("--run", "other"), "does not fit")


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def make_it_an_encoder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertModel"]}))


def remove_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, said",
    [
        (shutil.rmtree, ["./mine"]),
        (damage_weights, ["./mine cannot be loaded"]),
        (damage_config, ["./mine cannot be loaded"]),
        (remove_tokenizer, ["'./mine' has no tokenizer", "tokenizer.json", "Put the tokenizer's files"]),
        (remove_a_weight, ["./mine lacks 1 of the model's weights", "up_proj"]),
        (make_it_an_encoder, ["./mine"]),
    ],
)
def test_a_model_that_cannot_be_loaded(at: Path, damage: Callable[[Path], None], said: list[str]) -> None:
    mine = Path(shutil.copytree(at / "model", at / "mine"))
    damage(mine)
    refused(train(model__path="./mine"), *said)


def test_a_models_own_code_runs_only_where_it_is_asked_for(at: Path) -> None:
    mine = Path(shutil.copytree(at / "model", at / "mine"))
    config = json.loads((mine / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (mine / "config.json").write_text(json.dumps(config))
    (mine / "own.py").write_text("import pathlib\npathlib.Path('was_run').touch()\n")
    refused(train(model__path="./mine"), "code of its own", "--trust-remote-code")
    assert not (at / "was_run").exists()


@pytest.mark.parametrize(
    "text, said",
    [
        (None, ["There is no file 'mine.jsonl'"]),
        ('{"prompt": "a"}\n\n{"prompt": "b"\n', ["mine.jsonl, line 3 is not valid JSON", """'{"prompt": "b"'"""]),
        ('{"prompt": "a"}\n["b"]\n', ["mine.jsonl, line 2 has to be a JSON object"]),
        ('{"prompt": "a"}\n{"question": "b"}\n', ["row 1", "no column 'prompt'; it has 'question'", "prompt_column"]),
        ('{"prompt": 7}\n', ["row 0", "but is 7"]),
        ('{"prompt": ""}\n', ["row 0"]),
        ("", ["mine.jsonl has no rows"]),
        (
            '{"prompt": "' + "a" * CONTEXT + '"}\n',
            ["every prompt is too long", f"has {CONTEXT} tokens", "at most 56 fit"],
        ),
        ('{"prompt": "aXb"}\n', ["row 0", "cannot encode 'aXb'"]),
        ('{"prompt": [{"role": "user", "content": "a"}]}\n', ["has no chat template"]),
    ],
)
def test_data_that_cannot_be_used(at: Path, text: str | None, said: list[str]) -> None:
    if text is not None:
        (at / "mine.jsonl").write_text(text)
    refused(train(data__path="mine.jsonl"), *said)


def test_a_prompt_that_is_too_long_is_left_out_or_an_error(at: Path) -> None:
    save_rows(at / "rows.jsonl", [{"prompt": "a" * length, "want": "a"} for length in (3, 57, 2)])
    refused(train(data__long_prompts="error"), "row 1", "has 57 tokens, but at most 56 fit")
    ended = train()
    assert ended.status == 0
    assert "warning: 1 prompts are too long and were left out\n" in ended.err
    assert events(at / "run")[-1]["data/dropped_long"] == 1


def test_a_tokenizer_that_loses_characters(at: Path) -> None:
    """One with an unknown token says nothing when it meets what it does not know."""
    mine = Path(shutil.copytree(at / "model", at / "mine"))
    tokenizer = json.loads((mine / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = "h"
    (mine / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((mine / "tokenizer_config.json").read_text())
    (mine / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "h"}))
    save_rows(at / "rows.jsonl", [{"prompt": "aXbY", "want": "a"}])
    refused(train(model__path="./mine"), "loses 'X', 'Y'", "'aXbY'")


@pytest.mark.parametrize(
    "text, said",
    [
        (None, ["there is no file", "mine.py"]),
        ("def score(:\n", ["mine.py` does not import", "mine.py, line 1: SyntaxError"]),
        ("import nothing_of_that_name\n", ["mine.py, line 1: ModuleNotFoundError: No module"]),
        ("def scores(prompt, completion):\n    return 1.0\n", ["has no `score`", "did you mean `scores`?"]),
        ("score = 3\n", ["`score`"]),
        ("def score(prompts, completions, **kw):\n    return [1.0]\n", ["returned 1 values for 8 outputs"]),
        ("def score(prompts, completions, **kw):\n    return 1.0\n", ["must return a list of 8 numbers"]),
        ("def score(prompt, completion):\n    return 'good'\n", ["returned 'good', which is of type str", "prompt"]),
        ("def score(prompt, completion):\n    return float('nan')\n", ["returned nan, which is not finite", "output"]),
        ("def score(prompt, completion):\n    return float('-inf')\n", ["returned -inf"]),
    ],
)
def test_a_reward_that_cannot_be_used(at: Path, text: str | None, said: list[str]) -> None:
    if text is not None:
        (at / "mine.py").write_text(text)
    ended = train(reward__functions=["mine.py:score"])
    refused(ended, *said)
    assert "Traceback" not in ended.err
    save_rewards(at / "rewards.py")
    assert train().status == 0, "nothing was begun, so the same folder serves"


def test_a_reward_of_none_is_counted_and_no_error(at: Path) -> None:
    (at / "mine.py").write_text("def score(prompt, completion):\n    return None if 'a' in completion else 1.0\n")
    assert train(reward__functions=["mine.py:score"]).status == 0
    assert any(event["rewards/unscored"] > 0 for event in events(at / "run")[1:])


@pytest.mark.parametrize(
    "body, counted, said",
    [
        ("raise ValueError('no such sum')", "failed", "ValueError: no such sum"),
        ("__import__('os')._exit(7)", "worker_restarts", "it ended with status 7"),
        ("__import__('time').sleep(60)", "timeouts", "it took longer than 2 s"),
    ],
)
def test_a_reward_that_fails_on_some_outputs_costs_only_their_scores(
    at: Path, body: str, counted: str, said: str
) -> None:
    """It raises, ends its process, or hangs, wherever an `a` is written."""
    text = f"def score(prompt, completion):\n    if 'a' in completion[:1]:\n        {body}\n    return 1.0\n"
    (at / "mine.py").write_text(text)
    knobs = {"reward__timeout": 2.0, "reward__output_timeout": 2.0, "train__steps": 1}
    ended = train(reward__functions=["mine.py:score"], sampling__num_generations=8, train__prompts_per_step=4, **knobs)
    assert ended.status == 0, ended
    assert said in ended.err
    event = events(at / "run")[-1]
    assert event[f"rewards/score/{counted}"] > 0
    assert 0 < event["rewards/unscored"] == event["rewards/score/failed"] < 32
    assert event["reward"] == 1.0, "not scored is not a reward of 0"


ONE_EACH = "def score(steps, **columns):\n    return [[1.0] * len(output) for output in steps]\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("def score(steps, **kw):\n    return [[1.0]] * 3\n", ["returned 3 values for 8 outputs"]),
        (ONE_EACH.replace("[1.0]", "[1.0, 1.0]"), ["`score` returned", "values for the", "steps of an output"]),
        (ONE_EACH.replace("1.0", "float('nan')"), ["returned nan, which is not finite", "output 1 of 4", "step 1 of"]),
        ("def score(completions, **kw):\n    return 1\n", ["returned int 1; it must return a list of 8 lists"]),
        ("def score(completions):\n    return 1\n", ["does not take `steps`"]),
        (None, ["step reward function `mine.py:score` cannot be loaded", "there is no file"]),
    ],
)
def test_a_step_reward_that_cannot_be_used(at: Path, text: str | None, said: list[str]) -> None:
    if text is not None:
        (at / "mine.py").write_text(text)
    refused(train("--step-reward", "mine.py:score"), *said)


def test_an_output_without_any_boundary_is_one_step(at: Path) -> None:
    (at / "mine.py").write_text(ONE_EACH)
    ended = train("--step-reward", "mine.py:score", process__segmenter="blank_line")
    assert ended.status == 0
    assert all(event["steps/per_output"] == 1 for event in events(at / "run"))


def test_a_segmenter_that_never_finds_anything(at: Path) -> None:
    """The model's alphabet has no `Z`."""
    (at / "mine.py").write_text(ONE_EACH)
    segmenter = {"process__segmenter": "pattern", "process__pattern": "Z", "train__steps": 20}
    ended = train("--step-reward", "mine.py:score", **segmenter)
    refused(ended, "For 10 steps in a row the segmenter found no boundary in any output", "`process.segmenter`")
    assert ended.err.count("warning: the segmenter found no boundary") == 1
    assert "output " in ended.err.split("groupwise: ")[0], "the warning shows one"
    assert len(events(at / "run")) == 9


def test_a_step_function_that_hangs_costs_only_the_scores_of_what_it_hangs_on(at: Path) -> None:
    body = "    if 'a' in completion[:1]:\n        __import__('time').sleep(60)\n    return [1.0] * len(steps)\n"
    (at / "mine.py").write_text("def score(completion, steps):\n" + body)
    knobs = {"reward__timeout": 2.0, "reward__output_timeout": 2.0, "train__steps": 1}
    ended = train("--step-reward", "mine.py:score", sampling__num_generations=8, train__prompts_per_step=4, **knobs)
    assert ended.status == 0, ended
    assert "step reward function `score` failed on an output" in ended.err
    assert "it took longer than 2 s" in ended.err
    event = events(at / "run")[-1]
    assert 0 < event["steps/unscored"] == event["step_rewards/score/failed"] < 32
    assert event["step_reward"] == 1.0, "not scored is not a reward of 0"


def test_a_run_that_exists_is_not_written_over(at: Path) -> None:
    assert train().status == 0
    before = (at / "run/events.jsonl").read_bytes()
    refused(train(), "run holds a run already", "groupwise resume run")
    assert (at / "run/events.jsonl").read_bytes() == before
    (at / "other").mkdir()
    (at / "other/thesis.tex").write_text("all of it")
    refused(train("--run", "other"), "is not empty and holds no run")


def test_a_run_that_does_not_exist(at: Path) -> None:
    for command in ("resume", "eval", "export"):
        arguments = ["target"] if command == "export" else []
        refused(call(command, "runs/none", *arguments), "runs/none")
    (at / "empty").mkdir()
    refused(call("eval", "empty"), "empty is not a run: it has no job.toml")
    refused(call("resume", "empty"), "empty is not a run: it has no job.toml")


def test_what_cannot_be_asked_of_a_run(at: Path) -> None:
    assert train().status == 0
    refused(call("export", "run", "target", "--which", "newest"), "no weights called 'newest'", "latest, best, base")
    refused(call("export", "run", "target", "--which", "best"), "checkpoints/best cannot be used", "missing")
    refused(call("export", "run", "model"), "model is not empty")
    refused(call("eval", "run"), "nothing to evaluate on")
    refused(call("sample", "run", "aXb"), "'X'")
    refused(call("sample", "run", "a" * CONTEXT), f"The prompt has {CONTEXT} tokens")
    refused(call("sample", "run", "a", "-n", "2"), "At temperature 0 all 2 outputs would be the same")
    refused(call("sample", "run", ""), "prompt")
    refused(call("resume", "run", "--set", "seed=4"), "seed: 0 -> 4", "--fork")
    shutil.rmtree(at / "run/checkpoints")
    refused(call("sample", "run", "a"), "run has no checkpoint yet", "--which base")
    assert call("sample", "run", "a", "--which", "base").status == 0


def test_every_checkpoint_damaged(at: Path) -> None:
    assert train(checkpoint__every=1).status == 0
    for file in (at / "run/checkpoints").glob("*/state.json"):
        file.write_text("{}")
    before = (at / "run/events.jsonl").read_bytes()
    ended = call("resume", "run", "--set", "train.steps=3")
    refused(ended, "run/checkpoints is whole", "state.json has 2 bytes instead of")
    assert (at / "run/events.jsonl").read_bytes() == before


def test_a_full_disk_leaves_the_checkpoint_before_it(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save_file

    def fail_at_the_second(tensors: Any, path: Path) -> None:
        if "step-00000002" in str(path):
            path.write_bytes(b"as much as fitted")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", fail_at_the_second)
    ended = train(checkpoint__every=1, train__steps=3)
    refused(ended, "run/checkpoints/step-00000002: no space left on device", "needed", "free")
    assert "The run is saved up to step 1: mend this and go on with `groupwise resume run`." in ended.err
    assert [path.name for path in (at / "run/checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.setattr(checkpoint, "save_file", save)
    assert call("resume", "run").status == 0
    assert [event["step"] for event in events(at / "run")][-3:] == [1, 2, 3]


def test_a_full_disk_while_exporting(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train().status == 0

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    refused(call("export", "run", "target"), "Cannot write target: no space left on device")


def test_a_policy_that_diverges(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are no numbers: the last checkpoint is from before them."""
    from groupwise.learn.learner import PolicyLearner

    update = PolicyLearner.update

    def spoil(self: PolicyLearner, *arguments: Any) -> dict[str, float]:
        found = update(self, *arguments)
        if self.version == 2:
            with torch.no_grad():
                next(self.policy.parameters()).fill_(torch.nan)
        return found

    monkeypatch.setattr(PolicyLearner, "update", spoil)
    ended = train(checkpoint__every=1, train__steps=4)
    refused(ended, "logits are not finite", "Lower train.learning_rate")


def test_python_gets_the_same_errors(at: Path) -> None:
    with pytest.raises(GroupwiseError, match=r"Did you mean `train\.learning_rate`"):
        groupwise.train(model="model", data="rows.jsonl", reward="rewards.py:share", run="run", learning_rat=1)
    with pytest.raises(GroupwiseError, match="returned 'x', which is of type str"):
        groupwise.train(
            model="model", data="rows.jsonl", reward=lambda prompt, completion: "x", run="run", show="quiet",
            max_completion_length=8,
        )  # fmt: skip


def test_the_real_command_refuses_a_job_before_it_imports_what_is_slow(at: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "groupwise", "train", "--set", "train.stepps=3"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    *imports, said = ended.stderr.splitlines()
    assert said == "groupwise: --set: there is no key `train.stepps`. Did you mean `train.steps`?"
    assert {line.split()[-1] for line in imports}.isdisjoint({"torch", "transformers"})
