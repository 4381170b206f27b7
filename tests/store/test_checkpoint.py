"""Checkpoints are whole or not there: round trips, kills at every point, damage, full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError

from groupwise.errors import RunFolderError
from groupwise.store import checkpoint

STATE = {"step": 12, "rng": [1, 2**63], "lr": 0.1 + 0.2, "name": "ü", "none": None, "best": float("-inf")}


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"weight": torch.randn(4, 3, generator=generator), "bias": torch.randn(3, generator=generator)},
        "optimizer": {"step": torch.tensor(7.0), "exp_avg": torch.randn(4, 3, generator=generator)},
    }


def save(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, tensors=tensors(step), state={"step": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def never(message: str) -> None:
    raise AssertionError(message)


def found(folder: Path) -> int | None:
    """The step of the newest whole checkpoint, after checking that it holds what was saved."""
    newest = checkpoint.latest(folder, never)
    if newest is None:
        return None
    expected = tensors(newest.step)
    assert newest.state == {"step": newest.step}
    for stem, named in expected.items():
        assert_same(newest.tensors(stem), named)
    return newest.step


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def test_texts_are_kept_with_the_tensors_and_their_damage_is_found(tmp_path: Path) -> None:
    texts = {"replay.jsonl": '["a\\u2028", "ü"]\n', "empty.jsonl": ""}
    path = checkpoint.save(tmp_path, 3, tensors=tensors(3), state={}, texts=texts)
    assert {name: checkpoint.load(path).text(name) for name in texts} == texts
    (path / "replay.jsonl").write_text("[]\n")
    with pytest.raises(RunFolderError, match=r"replay\.jsonl has 3 bytes instead of"):
        checkpoint.load(path)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator_state = torch.Generator().manual_seed(3).get_state()
    saved = tensors() | {"rng": {"cpu": generator_state, "empty": torch.zeros(0), "half": torch.ones(2).bfloat16()}}
    path = checkpoint.save(tmp_path / "checkpoints", 12, tensors=saved, state=STATE)
    assert path == tmp_path / "checkpoints" / "step-00000012"
    assert names(path) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    ]
    loaded = checkpoint.load(path)
    assert loaded.step == 12
    assert loaded.state == STATE
    for stem, named in saved.items():
        assert_same(loaded.tensors(stem), named)


def test_tied_tensors_are_written_once_and_tied_again(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(50, 10))
    base = torch.arange(6.0)
    model = {"embed": weight, "head": weight, "row": base[:3], "overlap": base[1:4], "turned": torch.ones(2, 3).T}
    path = checkpoint.save(tmp_path, 1, tensors={"model": model}, state={})
    loaded = checkpoint.load(path).tensors("model")
    assert_same(loaded, {name: tensor.detach() for name, tensor in model.items()})
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr()
    assert (path / "model.safetensors").stat().st_size < 2 * weight.nbytes


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing", never) is None
    assert checkpoint.latest(tmp_path, never) is None
    checkpoint.save_best(tmp_path, 3, 0.5, tensors()["model"])
    assert checkpoint.latest(tmp_path, never) is None, "the best has no optimizer: nothing resumes from it"


def test_the_newest_is_by_number_and_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000, 99_999_999):
        save(tmp_path, step)
    checkpoint.save_best(tmp_path, 9, 0.5, tensors()["model"])
    assert found(tmp_path) == 100_000_000
    checkpoint.prune(tmp_path, 2)
    assert names(tmp_path) == ["best", "step-100000000", "step-99999999"]


def test_the_best_is_replaced_whole(tmp_path: Path) -> None:
    checkpoint.save_best(tmp_path, 3, 0.5, tensors(3)["model"])
    checkpoint.save_best(tmp_path, 6, 0.75, tensors(6)["model"])
    best = checkpoint.load(tmp_path / "best")
    assert (best.step, best.state) == (6, {"value": 0.75})
    assert_same(best.tensors("model"), tensors(6)["model"])
    assert names(tmp_path) == ["best"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint.save(tmp_path, 1, tensors=tensors(5), state={"again": True})
    assert checkpoint.load(tmp_path / "step-00000001").state == {"again": True}
    assert names(tmp_path) == ["step-00000001"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class Fault(NamedTuple):
    file: str
    harm: Callable[[Path], Any]
    said: str


FAULTS = [
    Fault("manifest.json", Path.unlink, "manifest.json is missing"),
    Fault("manifest.json", cut, "manifest.json cannot be read"),
    Fault("manifest.json", lambda path: path.write_text("[1]"), "manifest.json cannot be read"),
    Fault("manifest.json", lambda path: path.write_text('{"schema_version": 3}'), "its own SHA-256 differs"),
    Fault("model.safetensors", Path.unlink, "model.safetensors cannot be read: no such file"),
    Fault("model.safetensors", cut, "bytes instead of"),
    Fault("optimizer.safetensors", flip, "optimizer.safetensors is not what was saved"),
    Fault("state.json", flip, "state.json is not what was saved"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.said)
def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path: Path, fault: Fault) -> None:
    for step in (3, 6):
        save(tmp_path, step)
    fault.harm(tmp_path / "step-00000006" / fault.file)
    warnings: list[str] = []
    newest = checkpoint.latest(tmp_path, warnings.append)
    assert newest is not None
    assert newest.step == 3
    assert len(warnings) == 1
    assert fault.said in warnings[0]
    assert "step-00000006" in warnings[0]
    assert warnings[0].endswith("step-00000003 is used instead")
    with pytest.raises(RunFolderError, match="step-00000006 cannot be used"):
        checkpoint.load(tmp_path / "step-00000006")


def test_only_damaged_checkpoints_are_an_error_that_names_them(tmp_path: Path) -> None:
    for step in (3, 6):
        cut(save(tmp_path, step) / "model.safetensors")
    with pytest.raises(RunFolderError, match=r"No checkpoint .* is whole.*step-00000006.*step-00000003"):
        checkpoint.latest(tmp_path, never)


def test_later_checkpoints_are_set_aside_so_that_pruning_cannot_prefer_them(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        save(tmp_path, step)
    assert checkpoint.set_aside(tmp_path, 3) == [tmp_path / f"step-0000000{step}.damaged" for step in (6, 9)]
    save(tmp_path, 6)
    checkpoint.set_aside(tmp_path, 3)
    save(tmp_path, 4)
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["step-00000004", "step-00000006.damaged", "step-00000009.damaged"]


class Killed(BaseException):
    """Stands in for `kill -9`."""


class Death:
    """Lets `calls` of the system's functions through, then ends the process: nothing after it has any effect."""

    def __init__(self, patch: pytest.MonkeyPatch, calls: int) -> None:
        self.left = calls
        for module, name in (
            (checkpoint, "save_file"),
            (checkpoint, "write_atomic"),
            (checkpoint, "sync"),
            (os, "replace"),
            (os, "mkdir"),
            (os, "rmdir"),
            (os, "unlink"),
            (os, "rename"),
        ):
            patch.setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                raise Killed
            self.left -= 1
            return function(*arguments, **options)

        return call


def deaths(folder: Path, work: Callable[[], Any], again: Callable[[], Any]) -> Iterator[None]:
    """Kill `work` after its first call of the system, after its second and so on, until it survives."""
    for calls in range(200):
        shutil.rmtree(folder, ignore_errors=True)
        again()
        with pytest.MonkeyPatch.context() as patch:
            Death(patch, calls)
            try:
                work()
            except Killed:
                alive = False
            else:
                alive = True
        yield
        if alive:
            return
    raise AssertionError("work never came to its end")


def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    seen = []
    for _ in deaths(folder, lambda: save(folder, 6), again=lambda: save(folder, 3)):
        seen.append(found(folder))
        save(folder, 9)
        assert [name for name in names(folder) if not name.startswith("step-0000000")] == []
        assert not list(folder.glob("*.partial")), "what a kill left is cleared by the next save"
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert set(seen) == {3, 6}


def test_a_kill_at_any_point_of_a_replacement_loses_neither(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    values = []
    for _ in deaths(
        folder,
        lambda: checkpoint.save_best(folder, 6, 0.75, tensors(6)["model"]),
        again=lambda: checkpoint.save_best(folder, 3, 0.5, tensors(3)["model"]),
    ):
        checkpoint.clear(folder)
        best = checkpoint.load(folder / "best")
        assert_same(best.tensors("model"), tensors(best.step)["model"])
        assert names(folder) == ["best"]
        values.append(best.state["value"])
    assert values == sorted(values)
    assert set(values) == {0.5, 0.75}


def test_a_kill_at_any_point_of_pruning_leaves_no_damaged_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def three() -> None:
        for step in (3, 6, 9):
            save(folder, step)

    for _ in deaths(folder, lambda: checkpoint.prune(folder, 1), again=three):
        for path in folder.glob("step-????????"):
            checkpoint.load(path)
        assert found(folder) == 9


def refuse(number: int) -> Callable[..., None]:
    def call(*arguments: Any, **options: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    return call


def test_a_full_disk_is_an_error_and_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "save_file", refuse(errno.ENOSPC))
    with pytest.raises(RunFolderError, match=r"step-00000006: no space left on device \(\d+ bytes needed, .* free\)"):
        save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000003"]
    assert found(tmp_path) == 3


def test_a_file_cut_short_by_a_limit_is_an_error_too(tmp_path: Path) -> None:
    """A real short write: the system refuses what goes beyond 4 kB in the middle of a file."""
    save(tmp_path, 3)
    big = {"model": {"weight": torch.zeros(10_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunFolderError, match="step-00000006: file too large"):
            checkpoint.save(tmp_path, 6, tensors=big, state={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000003"]


def test_too_little_room_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 10)
    monkeypatch.setattr(checkpoint, "save_file", never)
    with pytest.raises(RunFolderError, match=r"no space left on device .* Make room and resume the run"):
        save(tmp_path, 6)
    assert names(tmp_path) == []


def test_another_fault_of_the_library_is_not_taken_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise SafetensorError("header too large")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(SafetensorError, match="header too large"):
        save(tmp_path, 6)
    assert names(tmp_path) == []


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["schema_version"] == checkpoint.SCHEMA_VERSION
    assert manifest["step"] == 1
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_no_flipped_bit_is_believed(tmp_path: Path, file: str) -> None:
    """Each bit of what says what is there: it is the same checkpoint still, or the one before it."""
    for step in (3, 6):
        save(tmp_path, step)
    newest = tmp_path / "step-00000006"
    whole = checkpoint.load(newest)
    original = (newest / file).read_bytes()
    passed_over = 0
    for bit in range(8 * len(original)):
        content = bytearray(original)
        content[bit // 8] ^= 1 << bit % 8
        (newest / file).write_bytes(content)
        warnings: list[str] = []
        found = checkpoint.latest(tmp_path, warnings.append)
        if found != whole:
            assert found is not None
            assert found.step == 3, bit
            assert len(warnings) == 1
            passed_over += 1
    assert passed_over > 7 * len(original), "only blanks between words may change"
    assert names(tmp_path) == ["step-00000003", "step-00000006"]


def test_no_file_that_was_cut_short_is_believed(tmp_path: Path) -> None:
    for step in (3, 6):
        save(tmp_path, step)
    newest = tmp_path / "step-00000006"
    for file in sorted(newest.iterdir()):
        original = file.read_bytes()
        for length in range(len(original)):
            file.write_bytes(original[:length])
            found = checkpoint.latest(tmp_path, lambda message: None)
            assert found is not None
            assert found.step == 3, (file.name, length)
        file.write_bytes(original)
    assert names(tmp_path) == ["step-00000003", "step-00000006"]


def reseal(path: Path, **changes: Any) -> None:
    """A manifest that says something else, with the digest that belongs to it."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}))


def test_a_manifest_agrees_with_its_folder_and_its_state(tmp_path: Path) -> None:
    for step in (3, 6):
        save(tmp_path, step)
    (tmp_path / "step-00000006").rename(tmp_path / "step-00000007")
    warnings: list[str] = []
    newest = checkpoint.latest(tmp_path, warnings.append)
    assert newest is not None
    assert newest.step == 3
    assert "manifest.json is of step 6, and its folder's name of step 7" in warnings[0]
    (tmp_path / "step-00000007").rename(tmp_path / "step-00000009")
    reseal(tmp_path / "step-00000009", step=9)
    with pytest.raises(RunFolderError, match=r"manifest\.json is of step 9, and state\.json of step 6"):
        checkpoint.load(tmp_path / "step-00000009")


@pytest.mark.parametrize("version, sealed", [(1, False), (2, True), (4, True)])
def test_a_whole_checkpoint_of_another_version_is_not_passed_over(tmp_path: Path, version: int, sealed: bool) -> None:
    """Its steps would be thrown away."""
    for step in (3, 6):
        save(tmp_path, step)
    newest = tmp_path / "step-00000006"
    reseal(newest, schema_version=version)
    if not sealed:
        manifest = json.loads((newest / "manifest.json").read_text())
        del manifest["sha256"]
        (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunFolderError, match=f"step-00000006 .*format has version {version}, and this .* version 3"):
        checkpoint.latest(tmp_path, never)


def test_digests_are_those_of_the_files_whatever_the_tensors(tmp_path: Path) -> None:
    """They are computed of what is in memory."""
    made = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "z": made.T, "a": made.to(torch.bfloat16), "m": made[1:3, ::2], "half": made.half(), "wide": made.double(),
        "count": torch.tensor(7), "none": torch.zeros(0, 3), "flags": made > 3, "small": made.to(torch.int8),
    }  # fmt: skip
    at = checkpoint.save(tmp_path, 1, tensors={"model": tensors, "empty": {}}, state={"step": 1})
    manifest = json.loads((at / "manifest.json").read_text())
    for name, said in manifest["files"].items():
        data = (at / name).read_bytes()
        assert (said["bytes"], said["sha256"]) == (len(data), hashlib.sha256(data).hexdigest()), name
    assert manifest["files"].keys() == {"model.safetensors", "empty.safetensors", "state.json"}
    found = checkpoint.load(at).tensors("model")
    assert all(found[name].equal(tensor) for name, tensor in tensors.items())
