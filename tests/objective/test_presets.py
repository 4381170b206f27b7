"""The table of named algorithms, and what an Objective refuses."""

from dataclasses import FrozenInstanceError, fields, replace
from math import inf, nan

import pytest

from groupwise.errors import ConfigError
from groupwise.objective import CHOICES, PRESETS, Objective, objective_named
from groupwise.objective.credit import _CENTRED, _DIVISOR
from groupwise.objective.kl import KLS
from groupwise.objective.ratio import RATIOS
from groupwise.objective.surrogate import SURROGATES
from groupwise.objective.weights import WEIGHTS

GRPO = ("group_mean", "group", "token", "clip", "sequence_mean")
TABLE = {  # None: the objective does not read it
    "grpo": (*GRPO, 0.2, 0.2, "k3", 0.04),
    "deepseekmath": (*GRPO, 0.2, 0.2, "k3", 0.04),
    "dr_grpo": ("group_mean", "none", "token", "clip", "constant_length", 0.2, 0.2, None, 0),
    "dapo": ("group_mean", "group", "token", "clip", "token_mean", 0.2, 0.28, None, 0),
    "gspo": ("group_mean", "group", "sequence_mean", "clip", "sequence_mean", 3e-4, 4e-4, None, 0),
    "cispo": ("group_mean", "group", "token", "cispo", "token_mean", None, 5.0, None, 0),
    "sapo": ("group_mean", "group", "token", "sapo", "sequence_mean", None, None, None, 0),
    "rloo": ("leave_one_out", "none", "sequence_product", "clip", "sequence_sum", 0.2, 0.2, "k1_in_reward", 0.05),
}
COLUMNS = ("baseline", "scale", "ratio", "surrogate", "weights", "epsilon", "epsilon_high", "kl", "beta")


@pytest.mark.parametrize("name", TABLE)
def test_preset(name: str) -> None:
    objective = PRESETS[name]
    for column, expected in zip(COLUMNS, TABLE[name], strict=True):
        if expected is None:
            assert column in objective.ignored_fields
        else:
            assert getattr(objective, column) == expected
            assert column not in objective.ignored_fields


def test_nothing_but_the_table_is_a_preset() -> None:
    assert set(PRESETS) == set(TABLE)
    with pytest.raises(TypeError):
        PRESETS["mine"] = Objective()  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        PRESETS["grpo"].beta = 1.0  # type: ignore[misc]


def test_every_choice_has_a_function_and_every_function_a_choice() -> None:
    tables = {"baseline": _CENTRED, "scale": _DIVISOR, "ratio": RATIOS, "surrogate": SURROGATES, "weights": WEIGHTS}
    for column, table in tables.items():
        assert set(table) == set(CHOICES[column]), column
    assert {"k1_in_reward", *KLS} == set(CHOICES["kl"])


@pytest.mark.parametrize(
    ("change", "reference", "in_loss", "in_reward"),
    [
        ({}, True, True, False),
        ({"kl": "k1_in_reward"}, True, False, True),
        ({"beta": 0.0}, False, False, False),
        ({"beta": 0.0, "kl": "k1_in_reward"}, False, False, False),
    ],
)
def test_what_needs_a_reference(change: dict[str, object], reference: bool, in_loss: bool, in_reward: bool) -> None:
    objective = replace(PRESETS["grpo"], **change)
    assert objective.needs_reference == reference
    assert objective.kl_in_loss == in_loss
    assert objective.kl_in_reward == in_reward
    assert objective.may_skip_zero_advantages != in_loss


def test_ignored_fields() -> None:
    never = {"sapo_temperature_pos", "sapo_temperature_neg", "step_return", "step_normalization"}
    assert Objective(beta=0.1).ignored_fields == never | {"max_completion_length"}
    assert Objective(scale="none", weights="constant_length", kl="k2").ignored_fields == never | {"scale_eps", "kl"}
    steps = Objective(beta=0.1, process_weight=0.5, outcome_weight=0.0).ignored_fields
    assert steps == {"sapo_temperature_pos", "sapo_temperature_neg", "max_completion_length"}
    assert PRESETS["sapo"].ignored_fields >= {"epsilon", "epsilon_high", "dual_clip"}
    known = {field.name for field in fields(Objective)}
    assert all(objective.ignored_fields < known for objective in PRESETS.values())


def test_named() -> None:
    assert objective_named("dapo") == PRESETS["dapo"]
    assert objective_named(PRESETS["dapo"]) == PRESETS["dapo"]
    assert objective_named("dr_grpo", max_completion_length=5).max_completion_length == 5


@pytest.mark.parametrize(
    ("given", "nearest"), [("grop", "grpo"), ("dr-grpo", "dr_grpo"), ("deepseek_math", "deepseekmath")]
)
def test_an_unknown_preset_names_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"preset '{given}' is not known: did you mean '{nearest}'\?"):
        objective_named(given)


def test_an_unknown_preset_far_from_all_lists_them() -> None:
    with pytest.raises(ConfigError, match="is not known: Choose one of cispo, dapo"):
        objective_named("xyz")


def test_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'epsilon_high'"):
        objective_named("grpo", epsilon_hi=0.3)


def test_k1_as_a_loss_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"expected gradient is zero.*'k1_in_reward'"):
        Objective(kl="k1")


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} 'nonsense' is not known"):
        Objective(**{name: "nonsense"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0, found -0.1"),
        ({"epsilon_high": -0.1}, "epsilon_high must be at least 0"),
        ({"beta": nan}, "beta must be at least 0, found nan"),
        ({"scale_eps": -1e-4}, "scale_eps must be at least 0"),
        ({"outcome_weight": -1.0}, "outcome_weight must be at least 0"),
        ({"process_weight": nan}, "process_weight must be at least 0"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, found 1.0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, found 0"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be above 0"),
        ({"importance_sampling_cap": 0.0}, "importance_sampling_cap must be above 0"),
        ({"surrogate": "cispo"}, "epsilon_high of 'cispo' caps the ratio itself and must be at least 1, found 0.2"),
        ({"baseline": "batch_mean"}, "baseline 'batch_mean' cannot go with scale 'group'"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**change)


def test_infinity_turns_a_clip_off() -> None:
    assert Objective(epsilon=inf, epsilon_high=inf).epsilon == inf
