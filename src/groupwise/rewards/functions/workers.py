"""Where reward functions run: in a process of their own that can be killed, or in this one, where they cannot be."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

from groupwise.errors import RewardError, Stopped
from groupwise.rewards.functions import calling
from groupwise.rewards.functions.calling import Caller, Message, Signature

if TYPE_CHECKING:
    import asyncio

START_TIMEOUT = 120.0  # a reward file may import large libraries; this never counts against the limit of a call
CLOSE_TIMEOUT = 2.0
CANCEL_TIMEOUT = 0.5
LOG_MAX_BYTES = 10_000_000
LOG_TAIL_LINES = 5

Kind = Literal["error", "timeout", "died"]


class CallFailed(Exception):
    """A call that gave no values: the function raised, took too long, or ended its process."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.kind: Kind = kind
        self.detail = detail


Late = Callable[[str], None]
"""Takes the stack of a call that is over its limit and goes on."""


def _unheard(stack: str) -> None:
    """Where nobody listens."""


class Runner(Protocol):
    """Runs one function. After any failure the next call finds it ready again.

    `own_process`: it runs beside this process, and may be called while others work. `timeouts` counts the calls that
    took too long so far, `restarts` how often it had to begin anew.
    """

    signature: Signature
    own_process: bool
    timeouts: int

    @property
    def restarts(self) -> int: ...

    def call(self, request: Message, limit: float, late: Late = _unheard) -> Message:
        """The answer to a request (see `Caller.call`) within `limit` seconds. Raises CallFailed.

        A call that cannot be stopped may take longer: `late` is then told, from another thread, where it is.
        """

    def close(self) -> None:
        """End what runs. Calling it twice is fine."""


class Worker:
    """A process that has loaded one function of a file or module and keeps it, with its state, from call to call.

    What the function prints goes to the file `log`, or to a temporary one. `kind` is what messages call it, `stepwise`
    says that it returns a list per output. Raises RewardError where the function
    cannot be loaded, within `start_timeout` seconds.
    """

    own_process = True

    def __init__(
        self, spec: str, *, log: Path | None = None, start_timeout: float = START_TIMEOUT,
        kind: str = "reward function", stepwise: bool = False,
    ) -> None:  # fmt: skip
        self.timeouts = 0
        self.restarts = 0
        self._spec, self._folder = spec, Path.cwd()  # where it begins anew, wherever this process is by then
        self._kind, self._stepwise = kind, stepwise
        self._start_timeout = start_timeout
        self._log = _open_log(log)
        self._log_start = 0
        self._number = self._answering = 0
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._spawn()
            self.signature = self._ready()
        except BaseException:
            self.close()
            raise

    def call(self, request: Message, limit: float, late: Late = _unheard) -> Message:
        """Have the function called. When it takes longer than `limit` or ends its process, a new one is started.

        Raises RewardError where something else than the worker answered.
        """
        if self._process is None or self._process.poll() is not None:
            self._restart()
        if not self._is_ready:
            self._ready()
        deadline = time.monotonic() + limit
        self._number += 1
        try:
            self._send(request, deadline)
            reply = self._checked(self._receive(deadline))
        except TimeoutError:
            self.timeouts += 1
            self._restart()
            raise CallFailed("timeout", f"it took longer than {limit:g} s") from None
        except (EOFError, ConnectionError):
            ending = self._ending()
            self._restart()
            raise CallFailed("died", ending) from None
        except BaseException:
            self._kill()  # interrupted half way: its answer must not be taken for that of a later call
            raise
        if "error" in reply:
            raise CallFailed("error", reply["error"])
        return reply

    def close(self) -> None:
        """End the process: it is asked first, and killed when it does not follow."""
        if self._process is not None:
            self._socket.close()
            if self._is_ready:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(CLOSE_TIMEOUT)
            self._kill()
        self._log.close()

    def _spawn(self) -> None:
        """Start a process; it loads the function while we do other things, until `_ready`."""
        self._is_ready = False
        self._socket, far_socket = socket.socketpair()
        far_lifeline, self._lifeline = os.pipe()
        arguments = [str(far_socket.fileno()), str(far_lifeline), str(os.getpid())]
        with far_socket:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-X", "faulthandler", calling.__file__, *arguments],
                cwd=self._folder,
                pass_fds=(far_socket.fileno(), far_lifeline),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is for the run to handle; and children of the function die with it
            )
        os.close(far_lifeline)

    def _ready(self) -> Signature:
        """Wait until the function is loaded. Raises RewardError where it cannot be."""
        deadline = time.monotonic() + self._start_timeout
        try:
            self._send({"spec": self._spec, "path": sys.path, "stepwise": self._stepwise}, deadline)
            reply = self._receive(deadline)
        except TimeoutError:
            reply = {"error": f"it was not imported after {self._start_timeout:g} s"}
        except (EOFError, ConnectionError):
            reply = {"error": f"its process ended while it was imported: {self._ending()}"}
        if "error" in reply:
            raise RewardError(f"{self._kind} `{self._spec}` cannot be loaded: {reply['error']}")
        self._is_ready = True
        self._number, self._answering = 0, reply["process"]
        return Signature(**reply["signature"])

    def _checked(self, reply: Message) -> Message:
        number, process = reply["number"], reply["process"]
        if (number, process) != (self._number, self._answering):
            raise RewardError(
                f"{self._kind} `{self._spec}`: request {self._number} to process {self._answering} got the reply to "
                f"request {number} of process {process}. A child process that the function forks must not come back "
                "from it: end it inside the function (os._exit), or use subprocess."
            )
        return reply

    def _restart(self) -> None:
        self._kill()
        self.restarts += 1
        self._spawn()

    def _kill(self) -> None:
        """End the process and its children, and leave no zombie."""
        if self._process is None:
            return
        if self._process.returncode is None:  # not reaped yet, so the group's number is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended by itself a moment ago
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        self._socket.close()
        os.close(self._lifeline)

    def _ending(self) -> str:
        """How the process ended, and the last lines it printed."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT)
        code = self._process.returncode
        if code is None:
            how = "it closed its connection"
        else:
            how = f"it ended with status {code}" if code >= 0 else f"it was ended by {signal.Signals(-code).name}"
        self._log.seek(self._log_start)
        lines = self._log.read(LOG_MAX_BYTES).decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([how, *lines])

    def _send(self, message: Message, deadline: float) -> None:
        try:
            data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise RewardError(f"the data cannot be sent to the worker of `{self._spec}`: {error}") from error
        if os.fstat(self._log.fileno()).st_size > LOG_MAX_BYTES:
            os.ftruncate(self._log.fileno(), 0)
        self._log_start = os.fstat(self._log.fileno()).st_size
        self._socket.settimeout(_left(deadline))
        self._socket.sendall(len(data).to_bytes(8, "little") + data)

    def _receive(self, deadline: float) -> Message:
        size = int.from_bytes(self._read(8, deadline), "little")
        message: Message = pickle.loads(self._read(size, deadline))
        return message

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(_left(deadline))
            chunk = self._socket.recv(min(size - len(data), 1 << 20))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)


def _open_log(log: Path | None) -> IO[bytes]:
    """A file that two processes may append to, and that one may empty meanwhile."""
    if log is not None:
        return log.open("a+b")
    file = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed by `Worker.close`
    fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)  # which a file without a name lacks despite its mode
    return file


def _left(deadline: float) -> float:
    """Seconds until the deadline; never 0, which a socket takes for "do not wait at all"."""
    return max(deadline - time.monotonic(), 1e-3)


class InProcess:
    """Runs a callable in this process, a sync one in the thread that calls, which is where TRL runs it.

    In the main thread it may set signals, as `signal.alarm` needs. It cannot be stopped: a call over its limit is told
    of and waited for. An async function runs in an event loop of its own thread, and is cancelled at its limit.
    """

    own_process = False

    def __init__(self, function: Callable[..., Any], stepwise: bool = False) -> None:
        self.timeouts = 0
        self._loop = _LoopThread()
        self._caller = Caller(function, stepwise, self._wait, (KeyboardInterrupt, Stopped, CallFailed))
        self.signature = self._caller.signature
        self._limit, self._deadline = 0.0, 0.0
        self._watch = threading.Timer(0.0, lambda: None)

    @property
    def restarts(self) -> int:
        """Event loops that a function blocked, so that another had to be made."""
        return self._loop.left_behind

    def call(self, request: Message, limit: float, late: Late = _unheard) -> Message:
        """Call the function. Raises CallFailed where it raised, or was async and took longer than `limit`."""
        thread = threading.get_ident()

        def over() -> None:
            self.timeouts += 1
            late(_stack_of(thread))

        self._limit, self._deadline = limit, time.monotonic() + limit
        self._watch = threading.Timer(limit, over)
        self._watch.daemon = True
        self._watch.start()
        try:
            reply = self._caller.call(request)
        finally:
            self._watch.cancel()
        if "error" in reply:
            raise CallFailed("error", reply["error"])
        return reply

    def _wait(self, awaitable: Awaitable[Any]) -> Any:
        """What an async function gives. Raises CallFailed at the limit of the call under way."""
        self._watch.cancel()
        try:
            return self._loop.run(awaitable, _left(self._deadline))
        except _Late:
            self.timeouts += 1
            raise CallFailed("timeout", f"it took longer than {self._limit:g} s") from None

    def close(self) -> None:
        """End the event loop of async functions."""
        self._loop.close()


class _Late(Exception):
    """An awaitable that did not finish in time."""


class _LoopThread:
    """An event loop in a thread of its own, kept from call to call: the calling thread may have one that runs already,
    as in a notebook. `left_behind` counts those that a function blocked."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.current_thread()
        self.left_behind = 0

    def run(self, awaitable: Awaitable[Any], limit: float) -> Any:
        """What the awaitable comes to. Raises _Late after `limit` seconds, when it is cancelled."""
        import asyncio  # takes longer to import than all else here, and most functions are not async

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=(self._loop,), daemon=True, name="groupwise-reward")
            self._thread.start()
        ended = threading.Event()
        future = asyncio.run_coroutine_threadsafe(_settled(awaitable, ended), self._loop)
        try:
            value, error = future.result(limit)
        except TimeoutError:
            future.cancel()
            if not ended.wait(CANCEL_TIMEOUT):  # it holds the loop, maybe for good
                self.close(wait=0.0)
                self.left_behind += 1
            raise _Late from None
        if error is not None:
            raise error
        return value

    def close(self, wait: float = CLOSE_TIMEOUT) -> None:
        """Let the loop end, when it gets its turn, and wait so many seconds for that."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(wait)
            self._loop = None


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


async def _settled(awaitable: Awaitable[Any], ended: threading.Event) -> tuple[Any, BaseException | None]:
    """What it comes to, or what it raised: a loop would pass some exceptions on to its own thread, and end."""
    try:
        return await awaitable, None
    except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
        return None, error
    finally:
        ended.set()


def _stack_of(thread: int) -> str:
    """Where a thread is, from the user's first frame on."""
    frame = sys._current_frames().get(thread)
    frames = traceback.extract_stack(frame) if frame else []
    ours = [index for index, one in enumerate(frames) if one.filename == calling.__file__]
    lines = "".join(traceback.format_list(frames[ours[-1] + 1 :] if ours else frames)).rstrip().splitlines()
    return "\n".join(lines[-calling.TRACEBACK_LINES :])
