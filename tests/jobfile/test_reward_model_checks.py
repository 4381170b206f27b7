"""Jobs that train a reward model and cannot work, or in which a key would do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from groupwise.errors import ConfigError
from groupwise.jobfile import load_job

OUTCOME: dict[str, Any] = {
    "model": "m", "data": "d.jsonl", "reward": "reward_model", "verifier": "verify.py:right", "labels": "verifier",
}  # fmt: skip
PROCESS = {**OUTCOME, "reward": None, "step_reward": "reward_model", "labels": "monte_carlo"}


def load(options: dict[str, Any], *overrides: str) -> Any:
    return load_job(None, overrides, options).job


@pytest.mark.parametrize("options", [OUTCOME, PROCESS, {**OUTCOME, "verifier": None, "labels": "graded.jsonl"}])
def test_what_works(options: dict[str, Any]) -> None:
    job = load(options)
    assert "reward_model" in (*job.reward.functions, *job.reward.step_functions)


def test_the_default_share_of_replay_is_the_papers() -> None:
    assert load(OUTCOME).reward_model.replay == 0.1


@pytest.mark.parametrize(
    "options, overrides, said",
    [
        ({**OUTCOME, "labels": None}, (), "`reward_model.labels` is not set: nothing says what is right"),
        ({**OUTCOME, "labels": "reward_model"}, (), '"reward_model" is the reward model that is being trained'),
        ({**OUTCOME, "verifier": "reward_model"}, (), "`reward.verifier` is the reward model that is being trained"),
        (
            {**OUTCOME, "verifier": "model:judge"}, ("reward_model.path=judge",),
            "`reward.verifier` is the reward model that is being trained",
        ),
        ({**OUTCOME, "verifier": None}, (), '"verifier" needs `reward.verifier`'),
        ({**PROCESS, "verifier": None}, (), '"monte_carlo" needs `reward.verifier`'),
        ({**OUTCOME, "labels": "monte_carlo"}, (), 'this reward model scores outputs. Take "verifier" or "pairs",'),
        ({**PROCESS, "labels": "pairs"}, (), '"pairs" labels outputs, and this reward model scores steps. Take "monte'),
        ({**OUTCOME, "labels": "pairs", "verifier": None}, (), '"pairs" needs `reward.verifier`'),
        ({**PROCESS, "labels": "verifier"}, (), 'this reward model scores steps. Take "monte_carlo"'),
        ({**OUTCOME, "labels": "verifer"}, (), "come from `verifier`, `pairs`, `monte_carlo` or a file. Did you"),
        ({**OUTCOME, "reward": ["reward_model", "reward_model"]}, (), "is named 2 times"),
        ({**OUTCOME, "step_reward": "reward_model"}, (), "is named 2 times"),
        (
            {**OUTCOME, "verifier": None, "labels": "graded.jsonl", "eval_data": "e.jsonl"}, (),
            "not judged by a model in training",
        ),
        (OUTCOME, ("reward_model.continuations=4",), "`reward_model.continuations` has no effect unless"),
        (OUTCOME, ("reward_model.soft_labels=true",), "`reward_model.soft_labels` has no effect unless"),
        (OUTCOME, ("reward_model.completer=big",), "`reward_model.completer` has no effect unless"),
        (OUTCOME, ("reward_model.first_prompts=0",), "without a reward model: name one that is trained"),
        (OUTCOME, ("reward_model.revision=main",), "`reward_model.revision` has no effect without"),
        (
            OUTCOME, ("reward_model.first_prompts=0", "reward_model.path=orm", "reward_model.first_epochs=3"),
            "`reward_model.first_epochs` has no effect where",
        ),
        ({**OUTCOME, "reward": "r.py:f"}, (), "`reward_model.labels` has no effect: no reward model is trained"),
        ({**OUTCOME, "verifier": "verify"}, (), '`reward.verifier` has "verify", which does not say where and what'),
        (OUTCOME, ("reward_model.replay=1.0",), "`reward_model.replay` takes a number, at least 0, less than 1"),
        (OUTCOME, ("reward_model.replay=-0.1",), "`reward_model.replay` takes a number, at least 0, less than 1"),
        (OUTCOME, ("reward_model.held_out_share=0.0",), "`reward_model.held_out_share` takes a number, more than 0"),
    ],
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(options, *overrides)
    assert said in str(caught.value)


def test_names_of_training_stay_those_of_the_policy() -> None:
    """`learning_rate` and `device` are keys of the reward model, too: there they are named in full."""
    job = load(OUTCOME | {"learning_rate": 0.5, "device": "cpu", "warmup_steps": 3})
    assert (job.train.learning_rate, job.model.device, job.train.warmup_steps) == (0.5, "cpu", 3)
    assert job.reward_model.learning_rate != 0.5


def test_a_reward_model_of_ones_own_may_have_a_device() -> None:
    assert load(OUTCOME, "reward.device=cpu").reward.device == "cpu"
    with pytest.raises(ConfigError, match=r"reward.step_tags` has no effect"):
        load(PROCESS, 'reward.step_tags=["a", "b", "c"]')
