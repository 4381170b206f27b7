"""The files of lines: what they hold, how they rotate, and how they are cut back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupwise.errors import RunFolderError
from groupwise.store.events import EventsFile, RolloutsFile, encode, older, read, truncate_rollouts, truncate_to
from groupwise.types import Completion, Group, GroupKey, Prompt, Score, ScoredGroup, Step


def scored(step: int, slot: int = 0, text: str = "four", score: Score | None = None, outputs: int = 2) -> ScoredGroup:
    prompt = Prompt("17", "two plus two", (5, 6), {"answer": "secret column"})
    completion = Completion((1, 2, 3), text, (-0.1, -0.2, -0.3), "stop")
    group = Group(GroupKey(step, slot, "17"), prompt, (completion,) * outputs)
    return ScoredGroup(group, (score or Score(1.0, parts={"score": 1.0}),) * outputs)


def steps_of(path: Path) -> list[int]:
    return [event["step"] for event in read(path)]


def write_events(path: Path, steps: range) -> None:
    sink = EventsFile(path)
    for step in steps:
        sink.write({"step": step, "reward": step / 10})
    sink.close()


def test_numbers_that_json_lacks_become_null_at_any_depth() -> None:
    event = {"step": 1, "loss": math.nan, "deep": {"list": [math.inf, 0.5]}, "numpy": np.float32(0.5), "flag": True}
    event |= {"count": np.int64(3)}
    expected = {"step": 1, "loss": None, "deep": {"list": [None, 0.5]}, "numpy": 0.5, "flag": True, "count": 3}
    assert json.loads(encode(event)) == expected


def test_a_value_that_is_no_number_is_refused_in_an_event() -> None:
    with pytest.raises(TypeError):
        encode({"step": 1, "loss": object()})


def test_events_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    sink = EventsFile(tmp_path / "events.jsonl")
    sink.write({"step": 1, "reward": 0.5})
    assert (tmp_path / "events.jsonl").read_text() == '{"step": 1, "reward": 0.5}\n'
    sink.close()
    sink.close()


def test_cutting_back_and_going_on_gives_the_bytes_of_a_run_without_interruption(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write_events(whole, range(7))
    write_events(cut, range(6))
    with cut.open("a") as file:
        file.write('{"step": 6, "rew')  # killed here
    assert steps_of(cut) == [0, 1, 2, 3, 4, 5]
    truncate_to(cut, 3)
    write_events(cut, range(4, 7))
    assert cut.read_bytes() == whole.read_bytes()


def test_a_half_written_line_goes_even_where_no_step_is_too_late(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    truncate_to(path, 9)
    assert path.read_text() == '{"step": 1}\n'


def test_cutting_back_a_file_that_was_never_written_is_fine(tmp_path: Path) -> None:
    truncate_to(tmp_path / "events.jsonl", 3)
    truncate_rollouts(tmp_path / "rollouts.jsonl", 3)
    assert list(read(tmp_path / "events.jsonl")) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["not JSON at all", '{"reward": 1.0}', "[1, 2]"])
def test_a_bad_line_before_the_end_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(RunFolderError, match=r"events\.jsonl, line 2: not a JSON object with a `step`"):
        truncate_to(path, 5)
    assert path.read_text().endswith('{"step": 2}\n'), "nothing is lost"


def test_a_full_disk_is_an_error_that_names_the_file() -> None:
    sink = EventsFile(Path("/dev/full"))
    with pytest.raises(RunFolderError, match=r"/dev/full: no space left on device .*Make room and resume"):
        sink.write({"step": 1})
    sink.close()


@pytest.mark.parametrize("gone", ["deleted", "moved", "replaced"])
def test_a_file_that_is_taken_away_is_an_error(tmp_path: Path, gone: str) -> None:
    """Its handle would take all that comes, and keep nothing of it."""
    folder = tmp_path / "run"
    folder.mkdir()
    sink = EventsFile(folder / "events.jsonl")
    sink.write({"step": 1})
    if gone == "deleted":
        (folder / "events.jsonl").unlink()
    else:
        folder.rename(tmp_path / "elsewhere")
    if gone == "replaced":
        folder.mkdir()
        (folder / "events.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"events\.jsonl was deleted, moved or replaced"):
        sink.write({"step": 2})
    sink.close()


def test_a_file_that_may_not_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="Cannot write"):
        EventsFile(tmp_path / "missing" / "events.jsonl")


def test_a_group_is_one_line_without_its_row(tmp_path: Path) -> None:
    score = Score(0.5, steps=(Step(2, 1.0, "fo"), Step(3, None, "ur")), parts={"score": 0.5, "format": None})
    file = RolloutsFile(tmp_path / "rollouts.jsonl", 10_000)
    file.write(4, [scored(4, slot=3, score=score)], [[[0.5, 0.5, 0.5], [1.0, 1.0, -0.5]]])
    file.close()
    output = {
        "text": "four",
        "tokens": 3,
        "finish": "stop",
        "reward": 0.5,
        "parts": {"score": 0.5, "format": None},
        "advantage": 0.5,
        "steps": [
            {"end": 2, "text": "fo", "reward": 1.0, "advantage": 0.5},
            {"end": 3, "text": "ur", "reward": None, "advantage": 0.5},
        ],
    }
    differing = [step | {"advantage": own} for step, own in zip(output["steps"], [1.0, -0.5], strict=True)]
    outputs = [output, output | {"advantage": [1.0, 1.0, -0.5], "steps": differing}]
    expected = {"step": 4, "slot": 3, "prompt_id": "17", "prompt": "two plus two", "outputs": outputs}
    assert list(read(tmp_path / "rollouts.jsonl")) == [expected]


def test_extras_are_given_to_their_outputs_across_groups_and_may_be_anything(tmp_path: Path) -> None:
    file = RolloutsFile(tmp_path / "rollouts.jsonl", 10_000)
    extras: dict[str, list[Any]] = {"found": ["a", {"b"}, 3, None]}
    file.write(1, [scored(1, 0), scored(1, 1)], [[0.0, 0.0], [0.0, 0.0]], extras)
    file.close()
    found = [output["extras"]["found"] for group in read(file._lines.path) for output in group["outputs"]]
    assert found == ["a", "{'b'}", 3, None]


def test_a_lone_half_of_a_surrogate_pair_survives(tmp_path: Path) -> None:
    file = RolloutsFile(tmp_path / "rollouts.jsonl", 10_000)
    file.write(1, [scored(1, text="\ud83d and \u2028")], [[0.0, 0.0]])
    file.close()
    assert next(read(tmp_path / "rollouts.jsonl"))["outputs"][0]["text"] == "\ud83d and \u2028"


def write_rollouts(path: Path, steps: range, max_bytes: int) -> None:
    file = RolloutsFile(path, max_bytes)
    for step in steps:
        file.write(step, [scored(step, 0), scored(step, 1)], [[0.0, 0.0], [0.0, 0.0]])
    file.close()


def both(path: Path) -> tuple[bytes, ...]:
    return tuple(file.read_bytes() if file.exists() else b"" for file in (older(path), path))


def test_rotation_keeps_the_last_full_file_and_the_current_one_within_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, range(1, 10), 1500)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rollouts.1.jsonl", "rollouts.jsonl"]
    assert all(0 < file.stat().st_size <= 1500 for file in tmp_path.iterdir())
    steps = steps_of(older(path)) + steps_of(path)
    assert steps == sorted(steps)
    assert steps[-2:] == [9, 9]


@pytest.mark.parametrize("max_bytes", [1300, 2000, 2500, 100_000])
@pytest.mark.parametrize("at", [3, 4, 5, 6, 7])
def test_cutting_rollouts_back_is_exact_across_one_rotation(tmp_path: Path, max_bytes: int, at: int) -> None:
    """Killed up to two steps after the checkpoint, resumed: the same files as without interruption."""
    whole, stopped, cut = (tmp_path / name / "rollouts.jsonl" for name in ("whole", "stopped", "cut"))
    for path in (whole, stopped, cut):
        path.parent.mkdir()
    write_rollouts(whole, range(1, 11), max_bytes)
    write_rollouts(stopped, range(1, at + 1), max_bytes)
    write_rollouts(cut, range(1, at + 3), max_bytes)
    truncate_rollouts(cut, at)
    assert cut.read_bytes() == stopped.read_bytes()
    write_rollouts(cut, range(at + 1, 11), max_bytes)
    assert both(cut) == both(whole)


def test_a_line_longer_than_the_limit_is_written_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, range(1, 3), 10)
    assert steps_of(older(path)) == [2]
    assert steps_of(path) == [2]
