"""Numbers and verdicts in words."""

from __future__ import annotations

import math

import pytest

from groupwise.readable import duration, number, one_line, percent, sparkline, why


@pytest.mark.parametrize(
    "value, shown",
    [
        (None, "-"),
        (0.0, "0"),
        (1.0, "1.00"),
        (0.01234, "0.0123"),
        (1.2e-5, "1.20e-05"),
        (346.2, "346"),
        (999.7, "1,000"),
        (-12345.6, "-12,346"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    "share, shown", [(None, "-"), (0.0, "0%"), (1.0, "100%"), (0.004, "0.4%"), (0.346, "35%"), (math.nan, "nan")]
)
def test_shares(share: float | None, shown: str) -> None:
    assert percent(share) == shown


@pytest.mark.parametrize(
    "seconds, shown",
    [(None, "-"), (3.42, "3.4 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (130, "2 min 10 s"), (3840, "1 h 4 min")],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_sparkline_runs_from_the_smallest_to_the_largest() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3, 0.3]) == "▄▄"
    assert sparkline([0.0, math.nan, 1.0]) == "▁ █"
    assert sparkline([math.nan]) == " "
    assert sparkline([]) == ""


def test_text_cannot_move_the_cursor() -> None:
    assert one_line("a\nb\x1b[2Jc\rd\te") == "a ↵ b·[2Jc·d·e"


def test_a_step_that_teaches_is_left_without_comment() -> None:
    assert why({"step": 1, "reward": 0.5, "frac_reward_zero_std": 0.9, "loss": 0.0}) is None
    assert why({"step": 1}) is None


def test_a_step_that_teaches_nothing_says_why() -> None:
    silent = {"step": 1, "reward": 1.0, "frac_reward_zero_std": 1.0, "loss": 0.0}
    assert "Nothing is learned in this step: in every group all outputs earned the same reward" in str(why(silent))
    assert "What is left of the loss is not theirs" in str(why(silent | {"loss": 0.01}))
    unscored = {"step": 1, "reward": None, "rewards/unscored": 16, "frac_reward_zero_std": 1.0, "loss": 0.0}
    assert "No output of this step was scored" in str(why(unscored))
    assert "No output of this step was scored" in str(why(unscored | {"reward": math.nan}))


def test_steps_may_teach_where_outputs_do_not() -> None:
    alike = {"step": 1, "reward": 1.0, "frac_reward_zero_std": 1.0, "loss": 0.0}
    assert why(alike | {"frac_advantage_zero": 0.0, "step_reward": 0.5}) is None
    assert why(alike | {"reward": math.nan, "frac_advantage_zero": 0.5, "step_reward": 0.5}) is None
    both = alike | {"frac_advantage_zero": 1.0, "step_reward": 1.0}
    assert "all outputs, or all steps, earned the same" in str(why(both))
    unlike = alike | {"frac_reward_zero_std": 0.0, "frac_advantage_zero": 1.0, "step_reward": 1.0}
    assert "all outputs, or all steps, earned the same" in str(why(unlike)), "rewards that do not count teach nothing"


def test_that_nothing_is_a_fault_is_said_only_where_there_was_none() -> None:
    alike = {"step": 1, "reward": 1.0, "frac_reward_zero_std": 1.0, "loss": 0.0, "rewards/score/std": 0.5}
    assert "This is not a fault." in str(why(alike | {"rewards/score/failed": 0.0, "rewards/unscored": 0.0}))
    for name in (
        "rewards/score/failed", "rewards/score/timeouts", "rewards/unscored", "step_rewards/score/failed",
        "rewards/judge/unread", "segmenter/cut/failed", "steps/unscored", "updates/refused",
    ):  # fmt: skip
        said = str(why(alike | {name: 3.0}))
        assert "fault" not in said, name
        assert "3 outputs or calls of it failed or were not scored" in said
    same = str(why(alike | {"reward": 0.0, "rewards/score/std": 0.0}))
    assert "fault" not in same, "a reward that is the same for every output may not read them"
    assert "All outputs of the step earned the same (0)" in same


def test_numbers_beyond_all_measure_stay_short() -> None:
    assert number(1.7e308) == "1.70e+308"
    assert number(-(10.0**15)) == "-1.00e+15"
    assert sparkline([-1.7e308, 0.0, 1.7e308]) == "▁▅█"
