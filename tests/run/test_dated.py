"""A run whose chat template asks a clock: its prompts are those of the day on which it began."""

from __future__ import annotations

import datetime
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

import groupwise
from groupwise.commands import reward_training, session
from groupwise.errors import ConfigError
from groupwise.tokenizer.codec import Codec
from tests.run.tiny import events, save_model, save_rows

TEMPLATE = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}{{ messages[0].content }}b"
FIRST = datetime.date(2026, 11, 30)


def put_clock(patch: pytest.MonkeyPatch, day: datetime.date) -> None:
    """Have it be `day`, for the library and for chat templates that are asked without a day."""

    class Date(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return day

    class Now(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.combine(day, datetime.time(12))

    patch.setattr(session, "date", Date)
    patch.setattr(reward_training, "date", Date)
    patch.setattr(chat_template_utils, "datetime", Now)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template writes the day, and rows of messages."""
    at = tmp_path_factory.mktemp("dated")
    save_model(at / "model", alphabet="abcdefgh0123456789 \n")
    (at / "model/chat_template.jinja").write_text(TEMPLATE)
    save_rows(at / "rows.jsonl", [{"prompt": [{"role": "user", "content": letter}]} for letter in "abcd"])
    return at


def lengthy(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def train(at: Path, run: Path, steps: int) -> None:
    groupwise.train(
        model=at / "model", data=at / "rows.jsonl", eval_data=at / "rows.jsonl", reward=lengthy, run=run, steps=steps,
        num_generations=2, max_completion_length=4, prompts_per_step=2, learning_rate=1e-3, show="quiet",
    )  # fmt: skip


def numbers(run: Path) -> list[Any]:
    """What the clock of the machine has no part in."""
    return [[event.get(name) for name in ("step", "reward", "loss", "eval/reward")] for event in events(run)]


def test_a_run_goes_on_after_midnight_as_if_it_had_not_been_interrupted(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_clock(monkeypatch, FIRST)
    train(bench, tmp_path / "run", 1)
    train(bench, tmp_path / "whole", 2)
    put_clock(monkeypatch, FIRST + datetime.timedelta(days=1))
    groupwise.resume(tmp_path / "run", overrides=["train.steps=2"], reward=lengthy, show="quiet")
    assert tomllib.loads((tmp_path / "run/job.toml").read_text())["data"]["date"] == "2026-11-30"
    # The first was evaluated after its first step, which was its last then.
    assert [row[:3] for row in numbers(tmp_path / "run")] == [row[:3] for row in numbers(tmp_path / "whole")]
    assert numbers(tmp_path / "run")[-1] == numbers(tmp_path / "whole")[-1]
    forked = tmp_path / "forked"
    groupwise.resume(tmp_path / "run", fork=forked, overrides=["train.steps=3"], reward=lengthy, show="quiet")
    assert events(forked)[0]["eval/reward"] == events(tmp_path / "whole")[-1]["eval/reward"]


def test_whatever_is_asked_of_a_run_later_is_asked_on_its_day(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_clock(monkeypatch, FIRST)
    train(bench, tmp_path / "run", 1)
    put_clock(monkeypatch, FIRST + datetime.timedelta(days=1))
    found = groupwise.evaluate(tmp_path / "run", reward=lengthy)
    assert found["reward"] == events(tmp_path / "run")[-1]["eval/reward"]
    seen: list[str] = []
    encode = Codec.encode_text
    monkeypatch.setattr(Codec, "encode_text", lambda self, text: seen.append(text) or encode(self, text))
    groupwise.sample(tmp_path / "run", [{"role": "user", "content": "c"}])
    assert seen[-1] == "30cb"


def test_a_reward_model_is_trained_on_conversations_of_one_day(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": a}], "completion": b, "label": b == "a"}
        for a in "abcd" for b in "ab"
    ]  # fmt: skip
    save_rows(tmp_path / "labels.jsonl", rows)
    runs = tmp_path / "run", tmp_path / "whole"
    for day, run in enumerate(("run", "whole")):
        put_clock(monkeypatch, FIRST + datetime.timedelta(days=day))
        options = {"kind": "outcome", "model": str(bench / "model"), "data": str(tmp_path / "labels.jsonl")}
        options |= {"run": str(tmp_path / run)} | ({"date": "2026-11-30"} if day else {})
        job = reward_training.load_reward_job(options)
        reward_training.train_reward_model(job, show="quiet")
    first, second = (json.loads((run / "result.json").read_text()) for run in runs)
    assert first["after"] == second["after"]
    assert 'date = "2026-11-30"' in (tmp_path / "run/job.toml").read_text()


def test_a_day_that_is_none_is_refused(tmp_path: Path) -> None:
    for day in ("2026-02-30", "tomorrow"):
        with pytest.raises(ConfigError, match=r"data\.date"):
            groupwise.train("arithmetic", run=tmp_path / "run", date=day)
    assert not (tmp_path / "run").exists()
