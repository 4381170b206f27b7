"""Jobs and data that come through a pipe: a job is read exactly once, and data, which is read again, is refused."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import groupwise
from groupwise.errors import ConfigError, DataError
from tests.commandline import call
from tests.run.tiny import events, save_model, save_rewards, save_rows

JOB = """
run = "piped"
[model]
path = "model"
[data]
path = "rows.jsonl"
[reward]
functions = ["rewards.py:share"]
[sampling]
num_generations = 2
max_completion_length = 4
[train]
steps = 1
prompts_per_step = 2
[eval]
data = "rows.jsonl"
limit = 2
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("pipes")
    save_model(at / "model")
    save_rows(at / "rows.jsonl")
    save_rewards(at / "rewards.py")
    return at


@pytest.fixture
def at(bench: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(bench)
    return bench


@contextmanager
def piped(text: str) -> Iterator[str]:
    """The name of a pipe with this text in it, as `<(command)` gives one: read a second time, it is empty."""
    reading, writing = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(writing, text.encode()), os.close(writing)))
    writer.start()
    try:
        yield f"/dev/fd/{reading}"
    finally:
        writer.join()
        os.close(reading)


def test_a_job_from_a_pipe_is_the_one_that_is_trained(at: Path) -> None:
    with piped(JOB) as job:
        ended = call("train", job, "--quiet")
    assert ended.status == 0, ended.err
    assert len(events(at / "piped")) == 2
    assert 'path = "rows.jsonl"' in (at / "piped/job.toml").read_text()


@pytest.mark.parametrize("command", [["show"], ["plan", "--json"], ["eval", "--json", "--which", "base"]])
def test_each_command_reads_it_once(at: Path, command: list[str]) -> None:
    said = []
    for job in (JOB, JOB.replace("num_generations = 2", "num_generations = 3")):
        with piped(job) as pipe:
            ended = call(command[0], pipe, *command[1:])
        assert ended.status == 0, ended.err
        said.append(ended.out)
    assert "rewards.py:share" in said[0] or json.loads(said[0])
    (at / "job.toml").write_text(JOB)
    plain = call(command[0], "job.toml", *command[1:])
    if command[0] == "show":
        assert [line.split("#")[0] for line in said[0].splitlines()] == [
            line.split("#")[0] for line in plain.out.splitlines()
        ]
    if command[0] == "eval":
        assert json.loads(said[0]).keys() == json.loads(plain.out).keys()
        assert json.loads(said[0])["reward"] == json.loads(plain.out)["reward"]


def test_a_sample_and_labels_too(at: Path) -> None:
    with piped(JOB) as job:
        assert call("sample", job, "ab", "--which", "base").status == 0
    with piped(JOB.replace("[reward]", "[reward]\nverifier = ['rewards.py:share']")) as job:
        ended = call("label", job, "--output", "labels.jsonl", "-n", "1", "--limit", "2")
    assert ended.status == 0, ended.err
    assert (at / "labels.jsonl").stat().st_size


def test_nothing_through_a_pipe_is_no_embedded_job(at: Path) -> None:
    for command in ("train", "show", "doctor", "plan", "eval"):
        with piped("") as job:
            ended = call(command, job)
        assert ended.status == 2
        assert f"through `{job}` is empty" in ended.err
    with piped(" \n") as job, pytest.raises(ConfigError, match="is empty"):
        groupwise.train(job)
    assert call("train", "/dev/null").status == 2


ROW = '{"prompt": "a", "want": "a", "completion": "b", "label": 1}\n'


@pytest.mark.parametrize(
    "arguments",
    [
        lambda data: ["train", "--model", "model", "--data", data, "--reward", "rewards.py:share"],
        lambda data: [
            "train",
            "--model",
            "model",
            "--data",
            "rows.jsonl",
            "--eval-data",
            data,
            "--reward",
            "rewards.py:share",
        ],
        lambda data: ["plan", "--model", "model", "--data", data, "--reward", "rewards.py:share"],
        lambda data: ["doctor", "--model", "model", "--data", data, "--reward", "rewards.py:share"],
        lambda data: [
            "label",
            "--model",
            "model",
            "--data",
            data,
            "--reward",
            "rewards.py:share",
            "--output",
            "l.jsonl",
        ],
        lambda data: ["reward-model", "train", "--kind", "outcome", "--model", "model", "--data", data],
    ],
)
def test_data_from_a_pipe_are_refused_in_a_sentence(at: Path, arguments: Callable[[str], list[str]]) -> None:
    with piped(ROW) as data:
        ended = call(*arguments(data))
    assert ended.status == 2
    assert f"{data} is a pipe or a device, which can be read only once" in ended.err
    assert not (at / "runs").exists()


def test_rows_through_a_pipe_are_refused_in_python_too(at: Path) -> None:
    with piped(ROW) as data, pytest.raises(DataError, match="is a pipe or a device"):
        groupwise.train(model="model", data=data, reward="rewards.py:share", run="never")
    assert not (at / "never").exists()
