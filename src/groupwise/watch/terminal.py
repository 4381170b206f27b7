"""A run on the terminal: a live panel for people, plain lines for logs, warnings only, or JSON lines for programs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from groupwise.readable import ROUND, duration, is_round, is_step, number, of_reward_model, percent, why
from groupwise.store.events import encode
from groupwise.streams import ERR, OUT, Output, output
from groupwise.watch.panel import JUDGE_LEGEND, LEGEND, Progress, Sample, panel

Mode = Literal["auto", "plain", "quiet", "json"]


class Terminal(Protocol):
    """A sink that also shows sentences. Warnings go to standard error, but above the panel where there is one.

    It raises nothing where a stream is lost, such as a pipe whose reader has gone. It says so on the other one.
    """

    @property
    def lost(self) -> Sequence[str]:
        """The streams that could not be written any more, each with the reason."""

    def write(self, event: Mapping[str, Any]) -> None:
        """Show one event: a step, an evaluation, or both in one."""

    def say(self, message: str) -> None:
        """Show a sentence, such as where the run is, or how it ended."""

    def warn(self, message: str) -> None:
        """Show a sentence that wants attention."""

    def sample(self, text: str, reward: float | None = None, question: str = "") -> None:
        """Show one output of the step, shortened, with its reward and what it answers."""

    def close(self, message: str | None = None, advice: str | None = None) -> None:
        """Leave the terminal as it was found; `message` is the last line of all, `advice` what could be done next.

        Calling it twice is fine.
        """


def make_terminal(
    mode: Mode,
    *,
    total_steps: int,
    title: str,
    history: Iterable[Mapping[str, Any]] = (),
    console: Console | None = None,
) -> Terminal:
    """The terminal for a mode. `auto` is live where standard output is a terminal that can do it, otherwise plain.

    `quiet` shows warnings, and at its end the last sentence said. `json` writes each event to standard output as a
    line of JSON, and nothing else there. `history` holds the events of a run that is resumed: the panel goes on from
    them. `console` stands in for standard output.
    """
    out = output(console.file if console else sys.stdout, OUT)  # type: ignore[arg-type]
    if console is None:
        console = Console()
        console.file = out  # type: ignore[assignment]
    if mode == "json":
        return JsonLines(out)
    if mode == "quiet":
        return Quiet(out, total_steps)
    # rich also takes a pipe for a terminal where FORCE_COLOR is set; a panel that moves has no place there, and none
    # where COLUMNS says that there are no columns.
    drawn = out.isatty() and console.is_interactive and console.width > 0 and "utf" in console.encoding.lower()
    if mode == "auto" and drawn:
        return LivePanel(console, out, total_steps, title, history)
    return Plain(out, total_steps)


class _Streams:
    """Standard output and error as one terminal uses them."""

    def __init__(self, out: Output) -> None:
        self._out, self._err = out, output(sys.stderr, ERR)
        self._out.is_all = False  # all of it is in the run folder
        self._told: set[str] = set()

    @property
    def lost(self) -> Sequence[str]:
        """See `Terminal`."""
        return [f"{one.name}: {one.lost}" for one in (self._out, self._err) if one.lost is not None]

    def _put(self, line: str) -> bool:
        """Write a line to standard output, and tell whether it went out."""
        out = self._out.put(line)
        self._tell()
        return out

    def _put_warning(self, message: str) -> bool:
        out = self._err.put(f"warning: {message}")
        self._tell()
        return out

    def _tell(self) -> None:
        """Say once of each lost stream that it is lost, where that can still be said."""
        for one, other in ((self._out, self._err), (self._err, self._spare())):
            if one.lost is not None and one.name not in self._told:
                self._told.add(one.name)
                kept = "what it would show is in events.jsonl" if one is self._out else "so do its warnings, here"
                if other is not None:
                    other.put(f"warning: {one.name} was lost ({one.lost}); the run goes on, and {kept}")

    def _spare(self) -> Output | None:
        """Where warnings go when standard error is lost."""
        return self._out


class Plain(_Streams):
    """One line per step, in columns that stay where they are."""

    def __init__(self, out: Output, total_steps: int) -> None:
        super().__init__(out)
        self._total_steps = total_steps
        self._teaches_nothing = False

    def write(self, event: Mapping[str, Any]) -> None:
        """Write a step's line, and an evaluation's, or a round's. The first of several steps that teach nothing says
        why."""
        if is_round(event):
            self._put(round_line(event))
            return
        if is_step(event):
            self._put(step_line(event, self._total_steps))
            verdict = why(event)
            if verdict and not self._teaches_nothing:
                self._put(verdict)
            self._teaches_nothing = verdict is not None
        if any(name.startswith(("eval/", "reward_model/eval/")) for name in event):
            self._put(reward_model_eval_line(event) if of_reward_model(event) else eval_line(event))

    def say(self, message: str) -> None:
        """Write a sentence; where standard output is lost, to standard error."""
        if not self._put(message):
            self._err.put(message)

    def warn(self, message: str) -> None:
        """Write a warning to standard error; where that is lost, to standard output."""
        if not self._put_warning(message):
            self._out.put(f"warning: {message}")

    def sample(self, text: str, reward: float | None = None, question: str = "") -> None:
        """Samples are left to `rollouts.jsonl`: lines stay one per step."""

    def close(self, message: str | None = None, advice: str | None = None) -> None:
        """Write what could be done next, and the last line."""
        for line in (advice, message):
            if line is not None:
                self.say(line)


class Quiet(Plain):
    """Warnings, and one last line."""

    def __init__(self, out: Output, total_steps: int) -> None:
        super().__init__(out, total_steps)
        self._last: str | None = None

    def write(self, event: Mapping[str, Any]) -> None:
        """Remember the step's line, in case nothing is said at the end."""
        if is_step(event):
            self._last = step_line(event, self._total_steps)

    def say(self, message: str) -> None:
        """Remember a sentence: the last one is shown at the end."""
        self._last = message

    def close(self, message: str | None = None, advice: str | None = None) -> None:
        """Write the last line, once."""
        super().close(message)
        if self._last is not None:
            super().say(self._last)
        self._last = None


class JsonLines(_Streams):
    """Events as JSON lines, for programs."""

    def write(self, event: Mapping[str, Any]) -> None:
        """Write one event."""
        self._put(encode(event))

    def say(self, message: str) -> None:
        """Sentences are for people."""

    def warn(self, message: str) -> None:
        """Write a warning to standard error."""
        self._put_warning(message)

    def sample(self, text: str, reward: float | None = None, question: str = "") -> None:
        """Samples are in `rollouts.jsonl`."""

    def close(self, message: str | None = None, advice: str | None = None) -> None:
        """Nothing is held."""

    def _spare(self) -> None:
        """Standard output is for events."""


class LivePanel(_Streams):
    """A panel that is drawn over itself; sentences and warnings scroll above it, and so does what others print."""

    def __init__(
        self, console: Console, out: Output, total_steps: int, title: str, history: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        super().__init__(out)  # before rich puts something else in the place of standard error
        console.file = out  # type: ignore[assignment]
        self._console = console
        self._progress = Progress(total_steps, title)
        for event in history:
            self._progress.take(event)
        self._start = time.monotonic()
        # The panel is drawn once a second from a thread of rich's, so that the clock shows that the run is alive.
        self._lock = threading.Lock()
        self._width = console.width
        self._live = self._begin()
        judge = of_reward_model(self._progress.latest)
        self._console.print(Text(JUDGE_LEGEND if judge else LEGEND, style="dim"))

    def _begin(self) -> Live:
        live = Live(console=self._console, get_renderable=self._draw, refresh_per_second=1)
        live.start()
        return live

    def _draw(self) -> RenderableType:
        coloured = self._console.color_system is not None and not self._console.no_color
        width = min(self._console.width, 100)
        with self._lock:
            return panel(self._progress, time.monotonic() - self._start, width, coloured=coloured)

    def write(self, event: Mapping[str, Any]) -> None:
        """Add one event to the picture."""
        with self._lock:
            self._progress.take(event)
        if self._console.width != self._width:
            # Lines of another width were wrapped anew, so that the cursor is not where the panel was left.
            self._width = self._console.width
            self._live.stop()
            self._console.clear()
            self._live = self._begin()
        self._live.refresh()
        self._tell()

    def say(self, message: str) -> None:
        """Print a sentence above the panel, or below it once the panel is closed; until the next event it stands in the
        panel too, as what goes on."""
        with self._lock:
            self._progress.doing = message
        self._print(Text(message))
        if self._live.is_started:
            self._live.refresh()

    def warn(self, message: str) -> None:
        """Print a warning above the panel."""
        self._print(Text.assemble(("warning: ", "bold yellow"), (message, "yellow")))

    def _print(self, text: Text) -> None:
        self._console.print(text)
        self._tell()
        if self._out.lost is not None:
            self._err.put(text.plain)

    def sample(self, text: str, reward: float | None = None, question: str = "") -> None:
        """Show an output in the panel, from its next drawing on."""
        with self._lock:
            self._progress.sample = Sample(question, text, reward)

    def close(self, message: str | None = None, advice: str | None = None) -> None:
        """Draw the panel a last time and leave it standing, the last lines below it. Calling it twice is fine."""
        self._live.stop()
        for line in (advice, message):
            if line is not None:
                self.say(line)


def step_line(event: Mapping[str, Any], total_steps: int) -> str:
    """A step in one line of about 120 columns, 30 more where steps are scored; a dash where a metric is missing."""
    if of_reward_model(event):
        return reward_model_line(event, total_steps)
    get = event.get
    steps = [("steps", _steps_cell(event), 20)] if "step_reward" in event else []
    columns = (
        ("reward", number(get("reward")), 6),
        *steps,
        ("len", number(get("completions/mean_length")), 5),
        ("kl", number(get("kl")), 8),
        ("clip", percent(get("clip_ratio/region_mean")), 5),
        ("loss", number(get("loss")), 9),
        ("grad", number(get("grad_norm")), 6),
        ("tok/s", number(get("tokens/per_second")), 7),
        ("time", duration(get("time/step")), 6),
    )
    step = f"step {event['step']:>{len(str(total_steps))}}/{total_steps}"
    return "  ".join([step, *(f"{name} {value:>{width}}" for name, value, width in columns)])


def round_line(event: Mapping[str, Any]) -> str:
    """A round of the reward model that a run trains, in one line."""
    get = event.get
    before, after = (number(get(f"reward_model/{when}/accuracy")) for when in ("before", "eval"))
    columns = (
        f"reward model, round {int(event[ROUND])}: {number(get('reward_model/new'))} new examples",
        f"{number(get('reward_model/replayed'))} replayed",
        f"held-out accuracy {before} -> {after}",
        f"auc {number(get('reward_model/eval/auc'))}",
        f"time {duration(get('time/step'))}",
    )
    return "  ".join(columns)


def reward_model_line(event: Mapping[str, Any], total_steps: int) -> str:
    """An update of a reward model in one line."""
    columns = (
        ("loss", "reward_model/loss", 6),
        ("accuracy", "reward_model/accuracy", 6),
        ("grad", "reward_model/grad_norm", 6),
        ("lr", "reward_model/learning_rate", 8),
    )
    step = f"step {event['step']:>{len(str(total_steps))}}/{total_steps}"
    cells = [f"{name} {number(event.get(key)):>{width}}" for name, key, width in columns]
    return "  ".join([step, *cells, f"time {duration(event.get('time/step')):>6}"])


def reward_model_eval_line(event: Mapping[str, Any]) -> str:
    """An evaluation of a reward model in one line."""
    prefix = "reward_model/eval/"
    found = [f"{name.removeprefix(prefix)} {number(event[name])}" for name in event if name.startswith(prefix)]
    return f"eval at step {event['step']}: " + "  ".join(found)


def _steps_cell(event: Mapping[str, Any]) -> str:
    """Mean reward of a step, steps of an output, share of right first steps: `0.61 of 3.00, 1st 48%`."""
    first = percent(event.get("steps/first_right"))
    return f"{number(event.get('step_reward'))} of {number(event.get('steps/per_output'))}, 1st {first}"


def eval_line(event: Mapping[str, Any]) -> str:
    """An evaluation in one line, the reward with the half-width of its 95 % interval."""
    found = [f"reward {number(event.get('eval/reward'))} +- {number(event.get('eval/reward_ci95'))}"]
    shown = ("eval/accuracy", "eval/above_threshold", "eval/step_accuracy", "eval/right_by_luck")
    named = sorted(name for name in event if name in shown or name.startswith(("eval/pass@", "eval/rewards/")))
    found += [f"{name.removeprefix('eval/').removeprefix('rewards/')} {number(event[name])}" for name in named]
    found.append(f"length {number(event.get('eval/mean_length'))}")
    return f"eval at step {event['step']}: " + "  ".join(found)


def eval_table(found: Mapping[str, float]) -> str:
    """An evaluation as a table, one line per number, with the half-width of its 95 % interval where it has one."""
    names = [name for name in found if not name.endswith("_ci95")]
    widest = max(map(len, names), default=0)
    return "\n".join(f"{name:<{widest}}  {number(found[name])}{_interval(found.get(f'{name}_ci95'))}" for name in names)


def _interval(half_width: float | None) -> str:
    return "" if half_width is None else f" +- {number(half_width)}"
