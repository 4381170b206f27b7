"""What a run leaves for people and tools to read: one JSON object per line, cut back exactly when a run resumes.

Lines are in the order of their steps, so cutting back shortens the file in place: it takes no room, and a kill
leaves it either cut or whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

from groupwise.disk import cannot_write, sync
from groupwise.errors import RunFolderError
from groupwise.readable import ROUND
from groupwise.types import Completion, Score, ScoredGroup, Step

Advantage = float | Sequence[float]
"""One output's advantage: the same for all its tokens, or one per token."""


class Sink(Protocol):
    """Takes events: `step` and any metrics of `docs/metrics.md`, in the order of their steps."""

    def write(self, event: Mapping[str, Any]) -> None:
        """Take one event."""

    def close(self) -> None:
        """Give back what the sink holds. Calling it twice is fine."""


def encode(event: Mapping[str, Any], default: Callable[[Any], Any] | None = None) -> str:
    """One line of strict JSON: a number that is not finite becomes null, `default` renders what JSON lacks."""
    return json.dumps(_finite(event), ensure_ascii=False, allow_nan=False, default=default)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, str | bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if math.isfinite(value) else None


class LineFile:
    """Appends lines, each handed to the system at once. Raises RunFolderError where they cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise cannot_write(path, error) from error
        self.size, self.lines = self._file.tell(), count_lines(path)

    def append(self, line: str) -> None:
        """Write one line. What a full disk leaves of it is dropped when the file is next cut back."""
        # A model can write half of a surrogate pair, which UTF-8 has no bytes for and JSON an escape.
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        if not self._is_there():
            raise RunFolderError(
                f"{self.path} was deleted, moved or replaced while it was written, so that what comes would be lost. "
                "Leave a run's folder where it is until the run is over."
            )
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise cannot_write(self.path, error, len(data)) from error
        self.size += len(data)
        self.lines += 1

    def _is_there(self) -> bool:
        """Whether the name still leads to the open file: a deleted one takes all that is written without a word."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def close(self) -> None:
        """Close the file. Calling it twice is fine."""
        self._file.close()


class EventsFile:
    """The sink behind `events.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = LineFile(path)
        self._step = 0

    @property
    def lines(self) -> int:
        """How many the file has."""
        return self._lines.lines

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one event. Raises RunFolderError where it cannot be written."""
        assert event["step"] >= self._step, f"step {event['step']} after step {self._step}: the file could not be cut"
        self._step = event["step"]
        self._lines.append(encode(event))

    def close(self) -> None:
        """Close the file. Calling it twice is fine."""
        self._lines.close()


class RolloutsFile:
    """Writes `rollouts.jsonl`: one line per group. At `max_bytes` it becomes `rollouts.1.jsonl`."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._lines = LineFile(path)
        self._max_bytes = max_bytes

    @property
    def lines(self) -> int:
        """How many the newest file has."""
        return self._lines.lines

    def write(
        self,
        step: int,
        scored: Sequence[ScoredGroup],
        advantages: Sequence[Sequence[Advantage]],
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Append a step's groups.

        `advantages[g][i]` belongs to output `i` of group `g`; each column of `extras` has one entry per output, in
        the order of the groups. Raises RunFolderError where they cannot be written.
        """
        first = 0
        for group, values in zip(scored, advantages, strict=True):
            columns = [
                {name: column[first + i] for name, column in (extras or {}).items()} for i in range(len(group.scores))
            ]
            # A reward may log anything as an extra: what JSON has no form for is written as text.
            self._append(encode(_group(step, group, values, columns), default=str))
            first += len(group.scores)

    def _append(self, line: str) -> None:
        if self._lines.size and self._lines.size + len(line) > self._max_bytes:
            path = self._lines.path
            self._lines.close()
            try:
                os.replace(path, older(path))
            except OSError as error:
                raise cannot_write(older(path), error) from error
            self._lines = LineFile(path)
        self._lines.append(line)

    def close(self) -> None:
        """Close the file. Calling it twice is fine."""
        self._lines.close()


def _group(
    step: int, scored: ScoredGroup, advantages: Sequence[Advantage], extras: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    key, prompt = scored.group.key, scored.group.prompt
    rows = zip(scored.group.completions, scored.scores, advantages, extras, strict=True)
    outputs = [_output(*row) for row in rows]
    return {"step": step, "slot": key.slot, "prompt_id": key.prompt_id, "prompt": prompt.content, "outputs": outputs}


def _output(completion: Completion, score: Score, advantage: Advantage, extras: Mapping[str, Any]) -> dict[str, Any]:
    output: dict[str, Any] = {
        "text": completion.text,
        "tokens": len(completion.token_ids),
        "finish": completion.finish,
        "reward": score.reward,
        "parts": score.parts,
        "advantage": _brief(advantage),
    }
    if score.steps:
        output["steps"] = [_step(step, advantage) for step in score.steps]
    if extras:
        output["extras"] = extras
    return output


def _step(step: Step, advantage: Advantage) -> dict[str, Any]:
    """A step with the advantage that all its tokens share."""
    own = advantage[step.end - 1] if isinstance(advantage, Sequence) else advantage
    return {"end": step.end, "text": step.text, "reward": step.reward, "advantage": own}


def _brief(advantage: Advantage) -> Advantage:
    """One number where every token has the same advantage (0.0 for an output without tokens), else one per token."""
    if isinstance(advantage, int | float):
        return advantage
    values = list(advantage)
    return values if len(set(values)) > 1 else (values or [0.0])[0]


def older(path: Path) -> Path:
    """Where the last full rollouts file is kept: `rollouts.1.jsonl` beside `rollouts.jsonl`."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines; none where it does not exist.

    A half-written last line is left out; another bad line is a RunFolderError.
    """
    return (event for event, _ in _lines(path)) if path.exists() else iter(())


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each object, and the offset of the byte after its line."""
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield _parse(line, path, number), end


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
        event["step"] + 0
    except (ValueError, TypeError, KeyError) as error:
        start = line[:60].decode("utf-8", "replace").strip()
        message = f"{path}, line {number}: not a JSON object with a `step` ({start!r}). Remove the line and try again."
        raise RunFolderError(message) from error
    return dict(event)


def count_lines(path: Path) -> int:
    """The whole lines of a file; none where it does not exist, or is a device."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def read_to(path: Path, step: int, rounds: int | None = None) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects up to those of `step`, each with the offset of the byte after its line; of lines about rounds of a
    reward model (numbered from 0) those of the first `rounds`. None where the file does not exist."""
    for event, after in _lines(path) if path.exists() else ():
        if event["step"] > step or (rounds is not None and event.get(ROUND, -1) >= rounds):
            return
        yield event, after


def missing_steps(path: Path, last: int) -> str:
    """The steps between a file's first and `last` of which it has no line: `"steps 4 to 6, 9"`; empty for none."""
    steps = {event["step"] for event in read(path)}
    gone = [step for step in range(min(steps, default=1), last + 1) if step not in steps]
    runs: list[list[int]] = []
    for step in gone:
        if runs and runs[-1][-1] == step - 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    word = "step " if len(gone) == 1 else "steps "
    return word + ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs) if runs else ""


def truncate_to(path: Path, step: int, rounds: int | None = None) -> None:
    """Drop every line after those of `read_to`, and a half-written last line. A file that does not exist is fine."""
    if not path.exists():
        return
    end = max((after for _, after in read_to(path, step, rounds)), default=0)
    if end == path.stat().st_size:
        return
    try:
        os.truncate(path, end)
        sync(path)
    except OSError as error:
        raise cannot_write(path, error) from error


def truncate_rollouts(path: Path, step: int) -> None:
    """Drop the groups after `step`, also across a rotation: the older file serves again where the newer is left empty.

    Groups that a second rotation removed do not come back.
    """
    for file in (older(path), path):
        truncate_to(file, step)
        if file.exists() and not file.stat().st_size:
            file.unlink()
    if older(path).exists() and not path.exists():
        os.replace(older(path), path)
