"""Runs that cannot learn from their rewards end with an error, say the first failure, and can be taken up again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import groupwise
from groupwise.commands.session import Result
from groupwise.errors import RewardError
from tests.commandline import call
from tests.run import tiny

Score = Callable[..., list[float | None]]


def share(completions: list[str], want: list[str], **kwargs: Any) -> list[float | None]:
    return [text.count(letter) / max(1, len(text)) for text, letter in zip(completions, want, strict=True)]


def failing(completions: list[str], **kwargs: Any) -> list[float | None]:
    raise OSError("the judge is away")


def silent(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [None] * len(completions)


def train(folder: Path, reward: Any, steps: int = 20, **options: Any) -> Result:
    return groupwise.train(
        model=tiny.save_model(folder / "model"), data=tiny.save_rows(folder / "rows.jsonl"), reward=reward,
        run=folder / "run", steps=steps, num_generations=4, prompts_per_step=2, max_completion_length=8,
        **{"show": "quiet", **options},
    )  # fmt: skip


def held_out(folder: Path) -> str:
    return str(tiny.save_rows(folder / "held-out.jsonl", [{"prompt": "hh", "want": "a"}]))


@pytest.mark.parametrize("rewards, who, why", [
    ([failing], "failing", "OSError: the judge is away"),
    ([share, failing], "failing", "OSError: the judge is away"),
    ([silent], "silent", "gave no value"),
    ([share, silent], "silent", "gave no value"),
])  # fmt: skip
def test_a_reward_that_gives_nothing_for_five_steps_ends_the_run(
    tmp_path: Path, rewards: list[Score], who: str, why: str
) -> None:
    with pytest.raises(RewardError, match=f"Reward `{who}` .*5 steps in a row") as error:
        train(tmp_path, rewards)
    assert why in str(error.value)
    assert "saved up to step 4" in "".join(error.value.__notes__)
    assert len(tiny.events(tmp_path / "run")) == 4
    assert not (tmp_path / "run" / "result.json").exists()


def test_so_does_every_step_of_a_shorter_run_and_how_many_may_be_is_set(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="2 steps in a row"):
        train(tmp_path, failing, steps=2)
    (tmp_path / "other").mkdir()
    with pytest.raises(RewardError, match="7 steps in a row"):
        train(tmp_path / "other", failing, overrides=["reward.patience=7"])


def test_a_reward_of_other_prompts_may_pass_for_long_once_it_scored(tmp_path: Path) -> None:
    first = iter([True])

    def sometimes(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [1.0 if next(first, False) else None for _ in completions]

    assert train(tmp_path, [share, sometimes], steps=8).steps == 8


def test_a_resumed_run_ends_where_the_undisturbed_one_does(tmp_path: Path) -> None:
    with pytest.raises(RewardError):
        train(tmp_path, [share, failing])
    with pytest.raises(RewardError, match="5 steps in a row"):
        groupwise.resume(tmp_path / "run", reward=[share, failing], show="quiet")
    assert len(tiny.events(tmp_path / "run")) == 4


def test_a_run_that_is_mended_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """To the bit: what the error left is the state of a whole step."""
    calls = 0

    def breaks(completions: list[str], want: list[str], **kwargs: Any) -> list[float | None]:
        nonlocal calls
        calls += 1
        return [float("nan") if calls == 4 else value or 0.0 for value in share(completions, want)]

    with pytest.raises(RewardError, match="nan, which is not finite") as error:
        train(tmp_path, breaks, steps=6)
    assert "saved up to step 3" in "".join(error.value.__notes__)
    groupwise.resume(tmp_path / "run", reward=share, show="quiet")
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", share, steps=6)
    for name in ("loss", "reward", "grad_norm", "epoch"):
        found, whole = ([e[name] for e in tiny.events(at / "run")] for at in (tmp_path, tmp_path / "whole"))
        assert found == whole, name


def test_rewards_that_fail_on_all_held_out_outputs_end_the_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"(?s)`failing` failed on every held-out output.*the judge is away"):
        train(tmp_path, failing, eval_data=held_out(tmp_path))
    assert not (tmp_path / "run" / "events.jsonl").exists() or tiny.events(tmp_path / "run") == []


def test_a_verifier_that_fails_at_the_last_evaluation_is_an_error_with_the_last_step_saved(tmp_path: Path) -> None:
    first = iter([True])

    def verify(completions: list[str], **kwargs: Any) -> list[float | None]:
        if not next(first, False):
            raise OSError("the judge is away")
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"(?s)`verify` failed on every held-out output.*the judge is away") as error:
        train(tmp_path, share, steps=3, verifier=verify, eval_data=held_out(tmp_path))
    assert "saved up to step 3" in "".join(error.value.__notes__)
    assert "eval/accuracy" not in tiny.events(tmp_path / "run")[-1]


def test_the_command_line_ends_with_status_2_and_the_first_traceback_also_when_quiet(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model")
    tiny.save_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rewards.py").write_text("def score(completions, **kwargs):\n    return [1 / 0]\n")
    done = call(
        "train", "--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--run", tmp_path / "run",
        "--reward", f"{tmp_path}/rewards.py:score", "--quiet", "--set", "train.steps=9",
        "--set", "sampling.num_generations=2", "--set", "sampling.max_completion_length=4",
        "--set", "train.prompts_per_step=2",
    )  # fmt: skip
    assert done.status == 2
    assert "line 2, in score" in done.err
    assert "ZeroDivisionError" in done.err
    assert "failed on every output of 5 steps in a row" in done.err


def test_what_a_trainer_state_says_is_what_the_events_say(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float, int]] = []

    def score(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
        state = trainer_state
        seen.append((state.global_step, state.max_steps, state.epoch, state.num_train_epochs))
        return [0.0] * len(completions)

    rows = [{"prompt": c} for c in "abcd"]
    groupwise.train(
        model=tiny.save_model(tmp_path / "model"), data=rows, reward=score, eval_data=rows[:1], run=tmp_path / "run",
        steps=5, num_generations=2, prompts_per_step=2, max_completion_length=4, show="quiet",
    )  # fmt: skip
    training = [(step, 5, step / 2, 3) for step in range(5)]
    assert seen == [(0, 5, 0.0, 3), *training, (5, 5, 2.5, 3)]


def test_a_run_in_another_thread_says_that_functions_cannot_set_signals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thread = threading.Thread(target=train, args=(tmp_path, share, 1), name="worker-7")
    thread.start()
    thread.join()
    assert capsys.readouterr().err.count("this runs in the thread 'worker-7'") == 1


@pytest.mark.parametrize("size", [1e200, 1.7e308])
def test_rewards_of_extreme_size_have_right_advantages(tmp_path: Path, size: float) -> None:
    def score(completions: list[str], **kwargs: Any) -> list[float]:
        return [size * (-1) ** i for i, _ in enumerate(completions)]

    train(tmp_path, score, steps=1)
    advantages = [output["advantage"] for row in tiny.rollouts(tmp_path / "run") for output in row["outputs"]]
    assert advantages == pytest.approx([3**0.5 / 2 * (-1) ** i for i in range(8)])
    [event] = tiny.events(tmp_path / "run")
    assert event["reward"] == pytest.approx(0.0, abs=1e290)
    assert event["updates/refused"] == 0


def test_two_rewards_make_no_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def accuracy(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)

    def well_formed(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    result = train(tmp_path, [accuracy, well_formed], steps=1, eval_data=held_out(tmp_path))
    assert (result.eval_before, result.eval_after) == (None, None)
    assert (result.eval_reward_before, result.eval_reward_after) == (1.0, 1.0)
    said = capsys.readouterr().out
    assert "held-out reward 1.00 -> 1.00" in said
    assert "held-out accuracy" not in said
    assert tiny.events(tmp_path / "run")[-1]["eval/rewards/accuracy"] == 0.0
