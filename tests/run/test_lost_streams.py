"""A run whose standard streams are lost goes on, writes its files and says so; a command that only prints ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from groupwise.streams import OUT
from tests.run.command import Command
from tests.run.streams import LEFT, Losing, Loss
from tests.run.tiny import events, save_model, save_rewards, save_rows

STEPS = 4
PATIENT = """
import pathlib, time

calls = 0


def share(prompt, completion):
    "Waits in the second step until the stream is lost."
    global calls
    calls += 1
    until = time.monotonic() + 600
    while calls > 8 and not pathlib.Path("left").exists() and time.monotonic() < until:
        time.sleep(0.01)
    return completion.count("a") / max(1, len(completion))
"""
SMALL = [
    "--model", "model", "--data", "rows.jsonl", "--reward", "rewards.py:share",
    *("--set", "sampling.num_generations=4"), *("--set", "sampling.max_completion_length=8"),
    *("--set", "train.prompts_per_step=2"), *("--set", f"train.steps={STEPS}"),
]  # fmt: skip
BROKEN, GONE = "broken pipe", "input/output error"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, a reward, and a run of it."""
    at = tmp_path_factory.mktemp("streams")
    save_model(at / "model")
    save_rows(at / "rows.jsonl")
    save_rewards(at / "rewards.py", PATIENT)
    (at / LEFT).touch()
    Command(at, "train", *SMALL, "--run", "whole").end()
    return at


def train(bench: Path, run: str, *more: str, losing: Losing, status: int = 0) -> Command:
    command = Command(bench, "train", *SMALL, "--run", run, *more, before=losing)
    command.end(status)
    return command


def assert_whole(run: Path, *lost: str) -> None:
    """The run has all its files, and they say what was lost."""
    assert [event["step"] for event in events(run)] == list(range(1, STEPS + 1))
    assert (run / f"checkpoints/step-{STEPS:08d}").is_dir()
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == STEPS
    assert result["lost_output"] == [*lost]


@pytest.mark.parametrize(
    "mode, loss, until, reason, status",
    [
        ("", "reader", "step 1/", BROKEN, 0), ("", "window", "1/4", GONE, 0), ("", "full", "", "no space left", 1),
        ("", "closed", "", "it is closed", 1), ("--json", "reader", '"step": 1', BROKEN, 0),
        ("--json", "full", "", "no space left", 1), ("--json", "closed", "", "it is closed", 1),
        ("--quiet", "reader", "", BROKEN, 0), ("--quiet", "full", "", "no space left", 1),
        ("--quiet", "closed", "", "it is closed", 1),
    ],
)  # fmt: skip
def test_a_run_without_standard_output_goes_on_and_says_so_once(
    bench: Path, mode: str, loss: Loss, until: str, reason: str, status: int
) -> None:
    run = f"out{mode}-{loss}"
    command = train(bench, run, *mode.split(), losing=Losing(loss, until=until), status=status)
    [said] = [line for line in command.error.splitlines() if "was lost" in line]
    assert said.startswith(f"warning: {OUT} was lost ({reason}")
    assert "Traceback" not in command.error
    assert "Exception ignored" not in command.error
    [lost] = json.loads((bench / run / "result.json").read_text())["lost_output"]
    assert lost.startswith(f"{OUT}: {reason}")
    assert_whole(bench / run, lost)
    counted = [event.get("terminal/lost", 0) for event in events(bench / run)]
    assert counted[-1] == (1 if mode != "--quiet" or loss == "closed" else 0), "a quiet run writes at its end only"
    assert mode == "--json" or "done in" in command.error, "the last line has one other place"


@pytest.mark.parametrize("mode", ["", "--json", "--quiet"])
@pytest.mark.parametrize("loss, until", [("reader", ""), ("window", "{"), ("full", ""), ("closed", "")])
def test_a_run_without_both_goes_on_and_its_result_says_so(bench: Path, mode: str, loss: Loss, until: str) -> None:
    """Whatever there is to say has no other place."""
    run = f"both{mode}-{loss}"
    losing = Losing(loss, (1, 2), until if mode == "--json" else "1/4" if until and not mode else "")
    train(bench, run, *mode.split(), losing=losing, status=0 if loss in ("reader", "window") else 1)
    result = json.loads((bench / run / "result.json").read_text())
    assert result["steps"] == STEPS
    assert OUT in {line.split(":")[0] for line in result["lost_output"]}
    assert_whole(bench / run, *result["lost_output"])


def test_warnings_go_to_standard_output_where_standard_error_is_lost(bench: Path) -> None:
    ragged = [{"prompt": "a" * 9, "want": "a"}, *({"prompt": p, "want": "a"} for p in ("ab", "ba", "aa", "bb"))]
    save_rows(bench / "ragged.jsonl", ragged)
    command = train(
        bench, "err", "--data", "ragged.jsonl", "--set", "data.max_prompt_length=4", losing=Losing("full", (2,))
    )
    assert "warning: 1 prompts are too long and were left out" in command.output
    assert "warning: standard error was lost (no space left on device)" in command.output


def test_a_closed_terminal_saves_the_run(bench: Path) -> None:
    """As a closed ssh does it: SIGHUP, more than once, and nothing can be written any more."""
    losing = Losing("window", (1, 2), "1/4")
    (bench / "hanging.py").write_text(PATIENT.replace('"left"', '"on"').replace("calls > 8", "calls > 16"))
    options = ["--reward", "hanging.py:share", "--set", "checkpoint.every=0"]
    (bench / LEFT).unlink()
    command = Command(bench, "train", *SMALL, "--run", "ssh", *options, before=losing)
    command.wait_for((bench / LEFT).exists)
    command.signal(signal.SIGHUP)
    command.signal(signal.SIGHUP)
    (bench / "on").touch()
    command.end(128 + signal.SIGHUP)
    step = events(bench / "ssh")[-1]["step"]
    assert (bench / f"ssh/checkpoints/step-{step:08d}").is_dir()
    assert not (bench / "ssh/result.json").exists()
    assert f"resumed after step {step} of {STEPS}" in Command(bench, "resume", "ssh").end()


@pytest.mark.parametrize(
    "arguments",
    [("show", "whole"), ("sample", "whole", "ab"), ("--help",)],
    ids=" ".join,
)
@pytest.mark.parametrize("loss, status", [("reader", 128 + signal.SIGPIPE), ("full", 2), ("closed", 2)])
def test_a_command_that_only_prints_ends_without_a_traceback(
    bench: Path, arguments: tuple[str, ...], loss: Loss, status: int
) -> None:
    command = Command(bench, *arguments, before=Losing(loss))
    command.end(status)
    said = [line for line in command.error.splitlines() if line.startswith("groupwise:")]
    assert len(said) == (0 if loss == "reader" else 1)
    assert "Traceback" not in command.error
    assert "Exception ignored" not in command.error


def test_an_error_is_an_error_whatever_became_of_the_streams(bench: Path) -> None:
    for loss in ("reader", "full", "closed"):
        Command(bench, "show", "nothing", before=Losing(loss, (1, 2))).end(2)  # type: ignore[arg-type]


def test_a_prompt_from_a_closed_standard_input_is_refused(bench: Path) -> None:
    command = Command(bench, "sample", "whole", "-", before=Losing("closed", (0,)))
    command.end(2)
    assert "standard input, which is closed" in command.error


def test_a_reward_models_run_goes_on_too(bench: Path) -> None:
    save_model(bench / "backbone")
    rows: list[dict[str, Any]] = [{"prompt": f"{a}{b}", "completion": a, "label": a == b} for a in "abcd" for b in "ab"]
    save_rows(bench / "labelled.jsonl", rows)
    options = ["--kind", "outcome", "--model", "backbone", "--data", "labelled.jsonl", "--set", "batch_size=2"]
    command = Command(bench, "reward-model", "train", *options, "--run", "rm", before=Losing("reader"))
    command.end()
    assert f"warning: {OUT} was lost ({BROKEN})" in command.error
    result = json.loads((bench / "rm/result.json").read_text())
    assert result["lost_output"] == [f"{OUT}: {BROKEN}"]
    assert (bench / "rm/model/config.json").is_file()
