"""A key that training would not read is refused, with the reason; the same key where it is read is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from groupwise.errors import ConfigError
from groupwise.jobfile import load_job, recipe_names
from groupwise.jobfile.reward_model import load_reward_job

OWN = {"model": "org/model", "data": "prompts.jsonl", "reward": "rewards.py:score"}
HUB = ["data.path=org/set"]
HELD_OUT = ["eval.data=held.jsonl"]
TRAINED_REWARD_MODEL = ["reward.functions=['reward_model']", "reward_model.labels=labels.jsonl"]


def load(*overrides: str, **options: str) -> None:
    load_job(overrides=overrides, options=OWN | options)


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["data.split=test"], "beside the file prompts.jsonl"),
        (["data.subset=main"], "beside the file prompts.jsonl"),
        (["data.revision=v1"], "beside the file prompts.jsonl"),
        (["data.path=prompts.csv", "data.split=test"], "beside the file prompts.csv"),
        (["data.path='python:rows'", "data.split=test"], "beside rows from Python"),
        ([*HELD_OUT, "eval.split=test"], "beside the file held.jsonl"),
        (["eval.split=test"], "no held-out prompts"),
        (["eval.limit=5"], "no held-out prompts"),
        (["eval.num_generations=4", "eval.temperature=1"], "no held-out prompts"),
        (["eval.temperature=0.5"], "no held-out prompts"),
        (["eval.temperature=0.5", "eval.top_p=0.9"], "no held-out prompts"),
        (["eval.max_completion_length=9"], "no held-out prompts"),
        ([*HELD_OUT, "eval.top_p=0.9"], "takes the likeliest token"),
        ([*HELD_OUT, "eval.top_k=5"], "takes the likeliest token"),
        (["reward.verifier=['v.py:right']"], "it judges held-out prompts"),
        (["objective.beta=0", "objective.kl=k2"], "there is no KL penalty"),
        (["objective.preset=dapo", "objective.beta=0", "objective.kl=k3"], "there is no KL penalty"),
        (["objective.process_weight=0"], "nothing scores steps"),
        (["watch.rollouts=false", "watch.rollouts_max_bytes=5000"], "no rollouts are written"),
        (["reward.functions=['model:org/m']", "reward.timeout=5"], "only models are named"),
        (["reward.functions=['model:org/m']", "reward.output_timeout=5"], "only models are named"),
        ([*TRAINED_REWARD_MODEL, "reward_model.prompts_per_round=8"], "labels come from the file"),
        ([*TRAINED_REWARD_MODEL, "reward_model.first_prompts=8"], "labels come from the file"),
        ([*TRAINED_REWARD_MODEL, "reward_model.replay=0", "reward_model.replay_size=5"], "`reward_model.replay` = 0"),
    ],
)
def test_a_key_without_effect_is_refused_with_its_reason(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        load(*overrides)
    named = [one.partition("=")[0] for one in overrides]
    assert any(f"`{key}`" in str(caught.value) for key in named)


@pytest.mark.parametrize(
    "overrides",
    [
        [*HUB, "data.split=test", "data.subset=main", "data.revision=v1"],
        ["data.split=train"],
        [*HELD_OUT, "eval.limit=5", "eval.every=5", "eval.temperature=0.5", "eval.top_p=0.9", "eval.top_k=5"],
        ["eval.threshold=0.5"],
        [*HUB, "eval.data=org/set", "eval.split=test"],
        [*HELD_OUT, "reward.verifier=['v.py:right']"],
        [
            *TRAINED_REWARD_MODEL,
            "reward.verifier=['v.py:right']",
            "reward_model.first_prompts=0",
            "reward_model.path=org/m",
        ],
        ["objective.beta=0.01", "objective.kl=k2"],
        ["watch.rollouts_max_bytes=5000"],
        ["reward.functions=['model:org/m', 'r.py:f']", "reward.timeout=5"],
    ],
)
def test_the_same_key_where_it_is_read_is_allowed(overrides: list[str]) -> None:
    load(*overrides)


def test_what_a_folder_holds_decides_what_names_a_part_of_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "state.json").write_text("{}")
    (tmp_path / "two" / "dataset_dict.json").write_text("{}")
    one, two = f"data.path='{tmp_path}/one'", f"data.path='{tmp_path}/two'"
    load(two, "data.split=test")
    for refused in ([one, "data.split=test"], [one, "data.subset=a"], [two, "data.subset=a"], [two, "data.revision=a"]):
        with pytest.raises(ConfigError, match=r"no effect beside the (saved data set|folder)"):
            load(*refused)
    with pytest.raises(ConfigError, match=r"`model\.revision` = \"v1\" has no effect beside the folder"):
        load(f"model.path='{tmp_path}'", "model.revision=v1")


def test_other_uses_of_a_job_read_other_keys() -> None:
    keys = ["eval.temperature=0.7", "reward.verifier=['v.py:right']", "eval.max_completion_length=9"]
    load_job(overrides=keys, options=OWN, training=False)


def test_a_training_of_a_reward_model_refuses_them_too(tmp_path: Path) -> None:
    own = {"kind": "outcome", "model": str(tmp_path), "data": "rows.jsonl"}
    for overrides, reason in {
        "revision='v1'": "beside the folder", "split='test'": "beside the file rows.jsonl",
        "eval_share=0 eval_every=5": "nothing is held out", "eval_data='h.jsonl' eval_share=0.2": "beside `eval_data`",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            load_reward_job(own, overrides.split())
    load_reward_job(own | {"data": "org/set"}, ["split='test'", "eval_share=0.2", "eval_every=5"])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_reads_all_that_it_says(name: str) -> None:
    load_job(name)


def test_a_recipe_with_other_data_leaves_its_own_splits_and_what_it_holds_out() -> None:
    found = load_job("gsm8k", options={"data": "train.jsonl"})
    assert (found.job.data.subset, found.job.eval.data, found.job.eval.limit) == (None, None, None)
    assert (found.job.data.prompt_column, found.job.reward.functions) == ("question", ["builtin:gsm8k"])
    both = load_job("gsm8k", options={"data": "train.jsonl", "eval_data": "test.jsonl"}).job.eval
    assert (both.data, both.split, both.limit, both.every) == ("test.jsonl", "train", 100, 50)
    assert load_job("gsm8k", options={"eval_data": "test.jsonl"}).job.data.subset == "main"
    with pytest.raises(ConfigError, match=r"`data\.subset`"):
        load_job("gsm8k", ["data.subset=main"], {"data": "train.jsonl"})
