"""Names that users of TRL, verl and OpenRLHF know are answered with the right key, or with why there is none."""

import re

import pytest

from groupwise.config import knobs
from groupwise.errors import ConfigError
from groupwise.jobfile import load_job
from groupwise.jobfile.elsewhere import ELSEWHERE, OF_REWARD_MODELS
from groupwise.jobfile.reward_model import RewardModelJob, load_reward_job


def refusal(**given):
    with pytest.raises(ConfigError) as caught:
        load_job(**given)
    return str(caught.value)


@pytest.mark.parametrize("name, answer", ELSEWHERE.items())
def test_every_answer_names_keys_that_exist(name, answer):
    """A sentence names its keys in backticks, with their section."""
    named = [answer] if answer in knobs() else re.findall(r"`([a-z_]+\.[a-z0-9_]+)`", answer)
    assert {key for key in named if key != "events.jsonl"} <= set(knobs())
    assert answer in knobs() or answer.endswith("."), "a sentence"


def test_no_name_of_our_own_is_answered_as_if_it_were_foreign():
    ours = {key.rpartition(".")[2] for key in knobs() if not key.startswith("reward_model.")}
    assert ours.isdisjoint(ELSEWHERE)
    assert set(RewardModelJob.model_fields).isdisjoint(OF_REWARD_MODELS)


@pytest.mark.parametrize(
    "name, said",
    [
        ("num_train_epochs", "`train.steps`"),
        ("save_steps", "Did you mean `checkpoint.every`?"),
        ("log_completions", "Did you mean `watch.rollouts`?"),
        ("eval_steps", "Did you mean `eval.every`?"),
        ("per_device_train_batch_size", "`train.prompts_per_step`"),
        ("max_new_tokens", "Did you mean `sampling.max_completion_length`?"),
        ("kl_coef", "Did you mean `objective.beta`?"),
        ("ppo_epochs", "Did you mean `train.num_iterations`?"),
        ("actor_rollout_ref.rollout.n", "Did you mean `sampling.num_generations`?"),
        ("logging_steps", "`events.jsonl`"),
        ("report_to", "`watch.tensorboard`"),
        ("warmup_ratio", "`train.warmup_steps`"),
        ("bf16", "Did you mean `model.dtype`?"),
        ("output_dir", "Did you mean `run`?"),
        ("max_prompt_length", "Did you mean `data.max_prompt_length`?"),
        ("rollout.num_generations", "Did you mean `sampling.num_generations` or `eval.num_generations`?"),
        ("temperature", "Did you mean `sampling.temperature` or `eval.temperature`?"),
        ("lr_scheduler_type", "Did you mean `train.lr_scheduler_type`?"),
    ],
)
def test_what_people_bring_from_other_trainers(tmp_path, name, said):
    """In a job file, by `--set`, and as an argument in Python."""
    (tmp_path / "job.toml").write_text(f"{name} = 1\n")
    given = [{"source": tmp_path / "job.toml"}, {"overrides": [f"{name}=1"]}]
    ours = {key.rpartition(".")[2] for key in knobs()}
    # An argument in Python goes by a knob's own name, so that one is no mistake.
    given += [] if name.rpartition(".")[2] in ours else [{"options": {name: 1}}]
    for one in given:
        message = refusal(**one)
        assert said in message
        assert f"there is no key `{name}`" in message


def test_the_argument_of_a_foreign_section_is_found_in_a_job_file(tmp_path):
    (tmp_path / "job.toml").write_text("[actor_rollout_ref.rollout]\nname = 'vllm'\nn = 8\n")
    assert "there is no key `actor_rollout_ref.rollout.n`. Did you mean `sampling.num" in refusal(
        source=tmp_path / "job.toml"
    )


@pytest.mark.parametrize("name", ["hidden_size", "max_turns", "motor.foo", "steps_per_update"])
def test_what_resembles_nothing_is_answered_with_no_guess(name):
    assert refusal(overrides=[f"{name}=1"]).endswith(f"there is no key `{name.partition('.')[0]}`.")


@pytest.mark.parametrize("name, key", OF_REWARD_MODELS.items())
def test_a_reward_models_job_has_answers_of_its_own(name, key):
    assert key in RewardModelJob.model_fields
    with pytest.raises(ConfigError, match=f"Did you mean `{key}`"):
        load_reward_job({"kind": "outcome", "model": "m", "data": "d", name: 1})
