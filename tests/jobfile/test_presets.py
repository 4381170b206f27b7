"""A job shows and keeps what its preset says."""

import re

import pytest

from groupwise.config import PRESET_NAMES
from groupwise.errors import ConfigError
from groupwise.jobfile import differences, load_job, show, to_toml
from groupwise.jobfile.presets import STEPS, VALUES
from groupwise.objective import PRESETS, Objective
from groupwise.wiring.settings import objective_of

OWN = {"model": "m", "data": "d.jsonl", "reward": "r.py:f"}
CHANGES = [
    (),
    ("objective.epsilon=0.1",),
    ("objective.beta=0.02",),
    ("objective.beta=0.0",),
    ("objective.epsilon_high=inf",),
    ("objective.scale_rewards=batch",),
    ("objective.baseline=leave_one_out", "objective.ratio=sequence_mean", "objective.weights=token_mean"),
    ("objective.surrogate=sapo", "objective.sapo_temperature_pos=2.0"),
    ("reward.step_functions=['r.py:g']",),
    ("reward.step_functions=['r.py:g']", "objective.process_weight=0.0"),
]


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_the_values_are_those_of_the_objective(preset):
    """All that it reads of the section, and nothing that it does not."""
    found, named = VALUES[preset], {"scale_rewards": "scale"}
    objective = PRESETS[preset]
    for key, value in found.items():
        assert getattr(objective, named.get(key, key)) == value
    unread = objective.ignored_fields - {"kl"}
    every = {"beta", "kl", "epsilon", "epsilon_high", "scale_rewards", "sapo_temperature_pos", "sapo_temperature_neg"}
    assert set(found) == (every | {"baseline", "ratio", "surrogate", "weights"}) - unread
    assert {key: getattr(Objective(), key) for key in STEPS} == STEPS


@pytest.mark.parametrize(
    "preset, changes",
    [
        (preset, changes)
        for preset in PRESET_NAMES
        for changes in CHANGES
        # These two do not clip, and a bound that has no effect is refused.
        if preset not in ("cispo", "sapo") or not any("epsilon" in one for one in changes)
    ],
)
def test_the_job_of_a_run_folder_reads_as_the_same_job(tmp_path, preset, changes):
    job = load_job(overrides=[f"objective.preset={preset}", *changes], options=OWN).job
    (tmp_path / "job.toml").write_text(to_toml(job))
    again = load_job(tmp_path / "job.toml").job
    assert again == job
    assert differences(job, again) == []
    left_to_the_preset = job.model_copy(update={"objective": job.objective.model_copy(update=dict.fromkeys(STEPS))})
    assert objective_of(job) == objective_of(left_to_the_preset)
    preset_with_changes = load_job(overrides=[f"objective.preset={preset}", *changes], options=OWN)
    assert objective_of(preset_with_changes.job) == objective_of(again)


def test_show_names_the_presets_values_and_where_they_are_from():
    text = show(load_job(overrides=["objective.preset=dapo"], options=OWN))
    assert re.search(r"^epsilon_high = 0.28 +# preset dapo$", text, re.MULTILINE)
    assert re.search(r"^epsilon = 0.2 +# preset dapo$", text, re.MULTILINE)
    assert re.search(r"^beta = 0.0 +# preset dapo$", text, re.MULTILINE)
    assert re.search(r"^# kl: not used +# default$", text, re.MULTILINE)
    assert "as the preset says" not in text


def test_one_epsilon_is_both_bounds_and_says_so():
    resolved = load_job(overrides=["objective.epsilon=0.1"], options=OWN)
    assert resolved.job.objective.epsilon_high == 0.1
    assert resolved.origins["objective.epsilon_high"] == "--set"


def test_a_fork_may_exchange_the_preset(tmp_path):
    """What the old preset said goes with it, what somebody said stays."""
    old = load_job(overrides=["objective.preset=dapo", "objective.beta=0.01"], options=OWN).job
    (tmp_path / "job.toml").write_text(to_toml(old))
    new = load_job(tmp_path / "job.toml", ["objective.preset=gspo"]).job.objective
    assert (new.preset, new.epsilon, new.epsilon_high, new.beta) == ("gspo", 3e-4, 4e-4, 0.01)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            ["baseline=leave_one_out", "ratio=sequence_product"],
            {"baseline": "leave_one_out", "ratio": "sequence_product"},
        ),
        (["surrogate=cispo", "epsilon_high=4.0"], {"surrogate": "cispo", "epsilon_high": 4.0}),
        (["surrogate=sapo", "sapo_temperature_neg=2.0"], {"surrogate": "sapo", "sapo_temperature_neg": 2.0}),
        (["weights=constant_length"], {"weights": "constant_length", "max_completion_length": 256}),
        (["baseline=batch_mean", "scale_rewards=batch"], {"baseline": "batch_mean", "scale": "batch"}),
    ],
)
def test_every_choice_of_the_objective_is_a_key_of_the_job(changes, expected):
    job = load_job(overrides=[f"objective.{one}" for one in changes], options=OWN).job
    objective = objective_of(job)
    assert {name: getattr(objective, name) for name in expected} == expected


@pytest.mark.parametrize(
    "changes, said",
    [
        (["surrogate=sapo", "epsilon=0.1"], "`objective.epsilon` has no effect with the surrogate `sapo`"),
        (["sapo_temperature_pos=2.0"], "`objective.sapo_temperature_pos` has no effect with the preset `grpo`"),
        (["surrogate=cispo"], "`objective.epsilon_high` = 0.2: with `cispo` this is the cap of the ratio"),
        (["baseline=batch_mean"], '"batch_mean" cannot go with `objective.scale_rewards` = "group"'),
    ],
)
def test_choices_that_cannot_go_together_are_refused_with_the_reason(changes, said):
    with pytest.raises(ConfigError) as raised:
        load_job(overrides=[f"objective.{one}" for one in changes], options=OWN)
    assert said in str(raised.value)


def test_weights_of_rewards_keep_their_short_name():
    job = load_job(options=OWN | {"reward": ["r.py:f", "r.py:g"], "weights": [1.0, 2.0]}).job
    assert (job.reward.weights, job.objective.weights) == ([1.0, 2.0], "sequence_mean")
