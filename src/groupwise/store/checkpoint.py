"""Checkpoints: folders of safetensors and JSON, whole or not there, never a pickle.

    checkpoints/step-00000012/   model.safetensors  optimizer.safetensors  state.json  manifest.json
                                 and, where a reward model is trained, its own and what it learns from as lines of JSON
    checkpoints/best/            the same, weights only

A checkpoint is written beside its place, its manifest last, and then renamed. So a kill leaves either a whole one or a
`.partial` folder that the next save clears. The manifest holds size and SHA-256 of every file, and its own: damage that
came later is found when a checkpoint is opened, and an older one is taken instead."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from groupwise.disk import REPLACED, cannot_write, free_bytes, os_error, put_in_place, sync, write_atomic
from groupwise.errors import RunFolderError

SCHEMA_VERSION = 3
"""1 had no digest of the manifest itself, 2 no names of the parts in its state."""
Tensors = Mapping[str, torch.Tensor]
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL, _DAMAGED = ".partial", ".damaged"


class _Damaged(Exception):
    """Why a checkpoint cannot be used; never leaves this module."""


class _OtherVersion(_Damaged):
    """It is whole, for all that can be told, and of another format: passing it over would throw steps away."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were all found whole. Tensors are read when asked for."""

    path: Path
    step: int
    state: dict[str, Any]
    aliases: Mapping[str, Mapping[str, str]]

    def tensors(self, stem: str, device: str = "cpu") -> dict[str, torch.Tensor]:
        """The tensors of `{stem}.safetensors` by name; names that shared their memory when saved share it again."""
        tensors = load_file(self.path / f"{stem}.safetensors", device=device)
        return tensors | {alias: tensors[name] for alias, name in self.aliases[stem].items()}

    def text(self, name: str) -> str:
        """The text of the file `name`."""
        return (self.path / name).read_text(encoding="utf-8")


def save(
    folder: Path, step: int, *, tensors: Mapping[str, Tensors], state: Mapping[str, Any],
    texts: Mapping[str, str] = MappingProxyType({}),
) -> Path:  # fmt: skip
    """Write `folder/step-{step}` and return it. `tensors` maps file stems to named tensors, `texts` file names to what
    is in them; `state` must suit JSON.

    On RunFolderError (a full disk, a closed folder) what was there before is untouched and nothing is left behind.
    """
    return _write(
        folder / f"step-{step:08d}", step, tensors, {"state.json": json.dumps(dict(state), indent=1), **texts}
    )


def save_best(folder: Path, step: int, value: float, tensors: Tensors) -> Path:
    """Write or replace `folder/best`: the weights (stem `model`) with the best evaluation so far, and its value."""
    return _write(folder / "best", step, {"model": tensors}, {"state.json": json.dumps({"value": value})})


def load(path: Path) -> Checkpoint:
    """Open one checkpoint. Raises RunFolderError where it is missing or damaged."""
    try:
        return _open(path)
    except _Damaged as damage:
        raise RunFolderError(f"Checkpoint {path} cannot be used: {damage}.") from damage


def latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there is none.

    A damaged one is passed over with a warning that names it and the one taken instead. Raises RunFolderError where
    all of them are damaged, or where one that would be taken has another version's format.
    """
    damages = []
    for path in reversed(_steps(folder)):
        try:
            found = _open(path)
        except _OtherVersion as other:
            advice = "Go on with the groupwise that wrote it, or start again with another --run."
            raise RunFolderError(f"Checkpoint {path} cannot be used: {other}. {advice}") from other
        except _Damaged as damage:
            damages.append(f"checkpoint {path} cannot be used: {damage}")
            continue
        for message in damages:
            warn(f"{message}; {found.path.name} is used instead")
        return found
    if damages:
        advice = "Start again with another --run."
        raise RunFolderError(f"No checkpoint in {folder} is whole: {'; '.join(damages)}. {advice}")
    return None


def any_in(folder: Path) -> bool:
    """Whether there is any checkpoint, whole or not."""
    return bool(_steps(folder))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; `best` stays."""
    for path in _steps(folder)[:-keep]:
        # Renamed first: a kill half-way leaves something to clear, not a damaged checkpoint.
        os.replace(path, path.with_name(path.name + _PARTIAL))
    clear(folder)


def set_aside(folder: Path, after_step: int) -> list[Path]:
    """Rename the checkpoints after `after_step` to `.damaged`: they count no more, and nothing is deleted."""
    moved = []
    for path in _steps(folder):
        if _number(path) > after_step:
            aside = path.with_name(path.name + _DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def clear(folder: Path) -> None:
    """Remove what a kill left half-written. Only for the process that holds the run's lock."""
    for path in folder.glob(f"*{_PARTIAL}"):
        shutil.rmtree(path)
    for path in folder.glob(f"*{REPLACED}"):
        # Killed between the two renames of a replacement: the old one goes back to its place.
        if path.with_suffix("").exists():
            shutil.rmtree(path)
        else:
            path.rename(path.with_suffix(""))


def _steps(folder: Path) -> list[Path]:
    """Checkpoints by step, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _write(target: Path, step: int, tensors: Mapping[str, Tensors], texts: Mapping[str, str]) -> Path:
    own, aliases = {}, {}
    for stem, named in tensors.items():
        own[stem], aliases[stem] = _unshare(named)
    needed = sum(map(len, texts.values())) + sum(tensor.nbytes for named in own.values() for tensor in named.values())
    partial = target.with_name(target.name + _PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear(target.parent)
        if free_bytes(target) < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        partial.mkdir()
        files = {}
        for stem, named in own.items():
            files[f"{stem}.safetensors"] = _save_file(named, partial / f"{stem}.safetensors")
        for name, text in texts.items():
            write_atomic(partial / name, text)
            files[name] = _fingerprint(partial / name)
        manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": files, "aliases": aliases}
        write_atomic(partial / "manifest.json", json.dumps(manifest | {"sha256": _own_digest(manifest)}, indent=1))
        put_in_place(partial, target)
    except OSError as error:
        raise cannot_write(target, error, needed) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """Write a file of tensors; its size and SHA-256, of what is in memory: gigabytes are not read back, and what the
    disk made of them is found out when they are."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if (found := os_error(error, path)) is None:
            raise
        raise found from error
    sync(path)
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    digest = hashlib.sha256(length + header)
    places = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name in tensors}
    for name in sorted(places, key=places.__getitem__):
        digest.update(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _unshare(tensors: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors that share no memory, and for each name left out the name of the very same tensor."""
    own: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[Any, str] = {}
    storages: set[tuple[str, int]] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = (str(tensor.device), tensor.untyped_storage().data_ptr())
        view = (*place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in names:
            aliases[name] = names[view]
            continue
        # Two different views of one storage cannot be in one file: the second is copied.
        own[name] = tensor.clone().contiguous() if place in storages else tensor.contiguous()
        names[view] = name
        storages.add(place)
    return own, aliases


def _open(path: Path) -> Checkpoint:
    manifest = _read_manifest(path / "manifest.json")
    try:
        step, files = manifest["step"], manifest["files"]
        for name, expected in files.items():
            _check(path / name, expected["bytes"], expected["sha256"])
        aliases = {stem: dict(manifest["aliases"][stem]) for stem in manifest["aliases"]}
    except (LookupError, TypeError, AttributeError) as error:
        raise _Damaged("manifest.json is not a manifest") from error
    state = _read_json(path / "state.json")
    # A folder that was renamed, or files that were put together from several checkpoints, are whole one by one.
    said = {"its folder's name": _number(path) if _NAME.fullmatch(path.name) else step}
    said["state.json"] = state.get("step", step)
    for where, other in said.items():
        if other != step:
            raise _Damaged(f"manifest.json is of step {step}, and {where} of step {other}")
    return Checkpoint(path, step, state, aliases)


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_json(path)
    version, digest = manifest.get("schema_version"), manifest.pop("sha256", None)
    whole = digest == _own_digest(manifest)
    if isinstance(version, int) and version != SCHEMA_VERSION and (whole or digest is None):
        raise _OtherVersion(f"its format has version {version}, and this groupwise reads version {SCHEMA_VERSION}")
    if not whole:
        raise _Damaged("manifest.json is not what was saved: its own SHA-256 differs")
    return manifest


def _own_digest(manifest: Mapping[str, Any]) -> str:
    """Of what a manifest says, not of how it is laid out."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check(file: Path, size: int, digest: str) -> None:
    try:
        found = _fingerprint(file)
    except OSError as error:
        raise _Damaged(f"{file.name} cannot be read: {os.strerror(error.errno or 0).lower()}") from error
    if found["bytes"] != size:
        raise _Damaged(f"{file.name} has {found['bytes']} bytes instead of {size}")
    if found["sha256"] != digest:
        raise _Damaged(f"{file.name} is not what was saved: its SHA-256 differs")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise _Damaged(f"{path.name} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise _Damaged(f"{path.name} cannot be read: {error}") from error


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
