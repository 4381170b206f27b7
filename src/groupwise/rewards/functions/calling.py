"""Load a user's function, learn from its signature how it wants to be called, and call it.

A worker process runs this very file as a script, so it imports nothing but the standard library: a worker is up in a
twentieth of a second, and functions in a worker and callables given from Python obey the same rules."""

from __future__ import annotations

import difflib
import fcntl
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import asyncio

# What only a function over lists can name, and what is handed out beside the data.
LISTS = frozenset({"prompts", "completions", "completion_ids", "log_extra"})
HELPERS = ("trainer_state", "log_metric", "log_extra")
TRACEBACK_LINES = 12
IMPORT_FAILURE_LENGTH = 600
OURS = (__file__, importlib.__file__, "<frozen importlib")
"""Where frames of a traceback come from that say nothing about the user's code."""

Message = dict[str, Any]
Number = float | None | tuple[str, str]
"""A value as it travels: a number, None for "not scored", or (type, text) of what is neither."""


class LoadError(Exception):
    """A function that cannot be loaded; the message is a sentence for the user."""


@dataclass(frozen=True)
class Signature:
    """How a function wants to be called.

    `per_output`: once per output with single values, else once with lists. `positional`: what it is handed by
    position, and `own_names` what it calls those itself. `named`, `required`: the parameters it takes by keyword, and
    those of them without a default. `takes_all`: it has `**kwargs`. `stepwise`: it returns a list per output.
    """

    name: str
    per_output: bool
    positional: tuple[str, ...]
    own_names: tuple[str, ...]
    named: tuple[str, ...]
    required: tuple[str, ...]
    takes_all: bool
    stepwise: bool = False

    def takes(self, name: str) -> bool:
        """Whether a call hands this to the function."""
        return self.takes_all or name in self.named or name in self.positional


def describe(function: Callable[..., Any], stepwise: bool = False) -> Signature:
    """Read a function's signature by the rule of `adapters.py`. Raises LoadError where it has none."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise LoadError("its signature cannot be read; wrap it in a `def`") from error
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    single = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    names = {p.name for p in single}
    over_lists = bool(names & LISTS)
    by_name = not over_lists and bool(names & {"prompt", "completion"})
    first_two = [p.name for p in single[:2] if p.kind is not p.KEYWORD_ONLY and p.default is p.empty]
    by_position = not (over_lists or by_name or takes_all or stepwise) and len(set(first_two) - set(HELPERS)) == 2
    own_names = tuple(first_two) if by_position else ()
    positional = tuple(p.name for p in single if p.kind is p.POSITIONAL_ONLY)
    named = [p for p in single if p.name not in own_names + positional]
    return Signature(
        name=getattr(function, "__name__", type(function).__name__).strip("<>"),
        per_output=by_name or by_position,
        positional=("prompt", "completion") if by_position else positional,
        own_names=own_names,
        named=tuple(p.name for p in named),
        required=tuple(p.name for p in named if p.default is p.empty),
        takes_all=takes_all,
        stepwise=stepwise,
    )


def as_number(value: object) -> Number:
    """A value as a float; None stays None; anything that is not a number becomes (its type, how it prints)."""
    if value is None:
        return None
    # NumPy and torch have scalars of their own, and neither library is imported here.
    size = value.numel() if hasattr(value, "numel") else getattr(value, "size", 1)
    scalar = value.item() if hasattr(value, "item") and size == 1 else value
    if not isinstance(scalar, numbers.Real):
        return type(value).__name__, repr(value)[:200]
    try:
        return float(scalar)
    except OverflowError:  # an integer beyond the largest float
        return math.inf


def as_numbers(value: object) -> list[Number] | Number:
    """An output's list with each value as a float; None stays None; what is no list becomes (its type, its repr)."""
    if value is None:
        return None
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | dict):
        return type(value).__name__, repr(value)[:200]
    return [as_number(one) for one in value]


class Notes:
    """What a function reported during one call through `log_metric` and `log_extra`."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}

    def metric(self, name: str, value: Any) -> None:
        """Keep a number; the mean of all that were logged under the name is reported."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def extra(self, column: str, values: Iterable[Any]) -> None:
        """Keep a column for the rollouts, one entry per output, as JSON can hold it."""
        plain = [json.loads(json.dumps(value, default=_json_value)) for value in values]
        self.extras.setdefault(str(column), []).extend(plain)


def _json_value(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)


class TrainerState(SimpleNamespace):
    """What a function finds as `trainer_state`: those fields of the class of that name in transformers that a reward
    can use. Another field is an AttributeError that names these."""

    def __init__(self, **fields: Any) -> None:
        # One process computes rewards here, so it is always the first.
        super().__init__(is_local_process_zero=True, is_world_process_zero=True, **fields)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has no `{name}` here; it has {', '.join(sorted(vars(self)))}")


class Caller:
    """Calls one function, sync or async. Keeps one event loop for life, so that clients bound to it stay usable.

    `wait` gives what an awaitable comes to, where that is not for the event loop of this thread; `let_through` are
    exceptions that are no answer of the function.
    """

    def __init__(
        self, function: Callable[..., Any], stepwise: bool = False, wait: Callable[[Awaitable[Any]], Any] | None = None,
        let_through: tuple[type[BaseException], ...] = (),
    ) -> None:  # fmt: skip
        self.signature = describe(function, stepwise)
        self._function, self._let_through = function, let_through
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wait = wait or self._wait_here

    def call(self, request: Message) -> Message:
        """Call the function with `columns` (name -> one entry for each of `count` outputs) and `state`.

        Gives `values`, the `failures` of single outputs (index -> traceback), `metrics` and `extras`; or `unusable`,
        how the result prints when it is not a list; or `error`, a traceback.
        """
        process = os.getpid()
        answer = self._answer(request)
        if os.getpid() != process:  # forked by the function, and came back: not the process that was asked
            os._exit(0)
        return answer

    def _answer(self, request: Message) -> Message:
        notes = Notes()
        state = TrainerState(**request["state"])
        helpers = dict(zip(HELPERS, (state, notes.metric, notes.extra), strict=True))
        given = {name: helper for name, helper in helpers.items() if self.signature.takes(name)}
        failures: dict[int, str] = {}
        result: Any
        try:
            if self.signature.per_output:
                result = self._each(request, given)
                failures = {i: tail(error) for i, error in enumerate(result) if isinstance(error, BaseException)}
                result = [None if i in failures else value for i, value in enumerate(result)]
            else:
                result = self._function(**request["columns"], **given)
                result = self._wait(result) if inspect.isawaitable(result) else result
            if not isinstance(result, Iterable) or isinstance(result, str | bytes | dict):
                return {"unusable": f"{type(result).__name__} {repr(result)[:200]}"}
            values = list(map(as_numbers if self.signature.stepwise else as_number, result))
        except self._let_through:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a user's function raises is an answer, counted by the caller
            return {"error": tail(error)}
        return {"values": values, "failures": failures, "metrics": notes.metrics, "extras": notes.extras}

    def close(self) -> None:
        """Close the event loop."""
        if self._loop is not None:
            self._loop.close()

    def _each(self, request: Message, given: Message) -> list[Any]:
        """The value, or the exception, of each output."""
        positional = self.signature.positional

        def attempt(index: int) -> Any:
            row = {name: entries[index] for name, entries in request["columns"].items()}
            arguments = [row.pop(name) for name in positional]
            try:
                return self._function(*arguments, **row, **given)
            except Exception as error:  # noqa: BLE001 - one output's failure must not cost the others theirs
                return error

        results = [attempt(index) for index in range(request["count"])]
        return self._wait(_settle(results)) if any(map(inspect.isawaitable, results)) else results

    def _wait_here(self, awaitable: Awaitable[Any]) -> Any:
        import asyncio  # costs as much as everything else here together, and most functions are not async

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(_finish(awaitable))


async def _finish(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def _settle(results: list[Any]) -> list[Any]:
    import asyncio

    return await asyncio.gather(*map(_attempt, results), return_exceptions=True)


async def _attempt(value: Any) -> Any:
    try:
        return await _finish(value)
    except (SystemExit, KeyboardInterrupt) as error:  # a task that raised one would take the event loop with it
        return error


def tail(error: BaseException) -> str:
    """The last lines of a traceback, from the user's first frame on."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename.startswith(OURS):
        frames = frames.tb_next
    lines = "".join(traceback.format_exception(type(error), error, frames)).rstrip().splitlines()
    return "\n".join(lines[-TRACEBACK_LINES:])


def import_failure(error: BaseException) -> str:
    """Where the user's own code failed at import, and the error itself, in one line: no frames of libraries, no ours.

    `"rewards.py, line 3: ModuleNotFoundError: No module named 'sympy'"`. A broken file that another one imports is
    named itself; so is the line of a function that the file calls while it is imported.
    """
    message, where = str(error), ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(OURS)]
    if isinstance(error, SyntaxError) and error.filename:
        message = f"{error.msg}: `{error.text.strip()}`" if error.text else error.msg
        where = f"{error.filename}, line {error.lineno}: "
    elif frames:
        last = [frame for frame in frames if frame.filename == frames[0].filename][-1]
        where = f"{last.filename}, line {last.lineno}: "
    return " ".join(f"{where}{type(error).__name__}: {message}".split())[:IMPORT_FAILURE_LENGTH].rstrip(" :")


def load(spec: str) -> Callable[..., Any]:
    """The function that `file.py:name` or `package.module:name` names. Raises LoadError."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise LoadError("write `file.py:name` or `package.module:name`")
    module = _import(place)
    if not hasattr(module, name):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("__")]
        nearest = difflib.get_close_matches(name, callables, n=1) or callables[-3:]
        offer = f"did you mean {', '.join(f'`{key}`' for key in nearest)}?" if nearest else "it has no function at all"
        raise LoadError(f"`{place}` has no `{name}`; {offer}")
    function = getattr(module, name)
    if not callable(function) or isinstance(function, type):
        kind = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise LoadError(f"`{name}` in `{place}` is {kind}, not a function")
    return function  # type: ignore[no-any-return]


def _import(place: str) -> ModuleType:
    """Import a file by its path, with its folder on the path so that it finds its neighbours, or a module by name."""
    file = Path(place).expanduser().resolve()
    if place.endswith(".py") and not file.is_file():
        raise LoadError(f"there is no file `{file}`")
    try:
        if not place.endswith(".py"):
            sys.path.insert(0, os.getcwd())
            return importlib.import_module(place)
        sys.path.insert(0, str(file.parent))
        # A file may be called like a module that is in use; that one must stay what it is.
        name = file.stem if file.stem not in sys.modules else f"reward_file_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except BaseException as error:
        raise LoadError(f"`{place}` does not import: {import_failure(error)}") from error


# What follows is the life of a worker process.


def send(stream: BinaryIO, message: Message) -> None:
    """Write one message: its length in 8 bytes, then its pickle."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def die_with_parent(parent: int, lifeline: int) -> None:
    """Leave no worker behind, however the parent ends and whatever this process is doing.

    The parent holds the other end of `lifeline` and never writes to it. When the parent is gone the kernel closes
    that end and ends this process group with SIGIO, also while a function holds the interpreter's lock (a runaway
    regular expression), which no thread of ours could do. Systems that ignore SIGIO have the thread.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def serve(stream: BinaryIO) -> None:
    """Load the function that the first message names, answer with its signature, then answer calls until the end.

    Each reply has the `number` of its request, from 0, and the `process` that it comes from.
    """

    def receive() -> bytes:
        return stream.read(int.from_bytes(stream.read(8), "little"))

    number = 0

    def answer(reply: Message) -> None:
        send(stream, {"number": number, "process": os.getpid(), **reply})

    start = pickle.loads(receive())
    sys.path[:] = start["path"]
    try:
        caller = Caller(load(start["spec"]), start["stepwise"])
    except LoadError as error:
        return answer({"error": str(error)})
    answer({"signature": asdict(caller.signature)})
    while data := receive():
        number += 1
        try:
            request = pickle.loads(data)
        except Exception as error:  # noqa: BLE001 - rows may hold objects whose classes do not import here
            answer({"error": tail(error)})
        else:
            answer(caller.call(request))


def main() -> None:
    """Run as a worker: arguments are the socket's and the lifeline's file descriptors and the parent's process id."""
    channel, lifeline, parent = map(int, sys.argv[1:])
    del sys.argv[1:]
    for descriptor in (channel, lifeline):
        os.set_inheritable(descriptor, False)
    die_with_parent(parent, lifeline)
    nowhere = os.open(os.devnull, os.O_RDWR)
    # A child that the function forks has the socket too; it must neither read a request nor answer one.
    os.register_at_fork(after_in_child=lambda: os.dup2(nowhere, channel))
    with socket.socket(fileno=channel) as connection, connection.makefile("rwb") as stream:
        serve(stream)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
