"""The live picture of a run: what has been seen so far, drawn as one rich panel."""

from __future__ import annotations

import io
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from groupwise.readable import (
    ABSENT,
    ROUND,
    duration,
    is_round,
    is_step,
    number,
    of_reward_model,
    one_line,
    percent,
    sparkline,
    why,
)


class _Phase(NamedTuple):
    """A part of a step's time, and how it is drawn: a line in its colour, blocks of its own where there is none."""

    name: str
    block: str
    colour: str
    metrics: tuple[str, ...] = ()


_PHASES = (
    _Phase("sample", "█", "cyan", ("time/sample",)),
    _Phase("reward", "▓", "yellow", ("time/reward", "time/verify")),
    _Phase("update", "▒", "green", ("time/prepare", "time/update")),
)
_OTHER = _Phase("other", "░", "bright_black")


class Sample(NamedTuple):
    """One output, what it answers, and its reward."""

    question: str
    answer: str
    reward: float | None


LEGEND = (
    "reward ± its spread within a group · held out: on questions that are not trained on · length: tokens of an output "
    "· cut off: at the length limit · KL: distance from the reference · clipped: tokens at the clip bound · entropy: "
    "of the next token · grad norm: before it is limited · no spread: groups of equal rewards, which teach nothing"
)
"""What the words of the panel mean; `docs/metrics.md` has all of them."""
JUDGE_LEGEND = "accuracy: outputs, pairs or steps that are judged right · held out: on examples that are not trained on"


@dataclass
class Progress:
    """What the events of a run have said so far. `latest` holds the newest value of every metric."""

    total_steps: int
    title: str
    step: int = 0
    latest: dict[str, Any] = field(default_factory=dict)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=40))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    evals: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    """Of each evaluation its step, and its accuracy and mean reward where it has them."""
    verdict: str | None = None
    sample: Sample | None = None
    doing: str = ""
    """What goes on before the next event: loading a model and the first step may take minutes."""
    judge: dict[str, Any] = field(default_factory=dict)
    """The latest round of the reward model that the run trains."""

    def take(self, event: Mapping[str, Any]) -> None:
        """Add one event."""
        self.step, self.doing = event["step"], ""
        if is_round(event):
            self.judge |= event
            return
        self.latest.update(event)
        judge = of_reward_model(event)
        accuracy = event.get("reward_model/eval/accuracy" if judge else "eval/accuracy")
        if accuracy is not None or event.get("eval/reward") is not None:
            self.evals.append((self.step, accuracy, event.get("eval/reward")))
        if not is_step(event):
            return
        self.verdict = why(event)
        shown = event.get("reward_model/accuracy" if judge else "reward")
        self.rewards.append(math.nan if shown is None else shown)
        if event.get("time/step"):
            self.seconds.append(event["time/step"])

    @property
    def seconds_left(self) -> float | None:
        """Steps left times the mean of the last twenty; None before the first."""
        if not self.seconds:
            return None
        return (self.total_steps - self.step) * sum(self.seconds) / len(self.seconds)


def panel(progress: Progress, elapsed: float, width: int, *, coloured: bool = True) -> Panel:
    """Draw a run, for a terminal `width` columns wide, `elapsed` seconds after its start."""
    inside = max(width - 6, 20)
    rows: list[RenderableType] = [_bar(progress, inside)]
    waiting = progress.doing and progress.step < progress.total_steps
    rows += ["", _in_two_lines(("now       ", "dim"), (progress.doing, ""), inside)] if waiting else []
    rows += ["", *_headline(progress, inside), "", _grid(progress, inside)] if progress.latest or not waiting else []
    phases = _phases(progress.latest, inside, coloured)
    rows += ["", phases] if phases else []
    rows += ["", *_sample(progress.sample, inside)] if progress.sample else []
    rows += ["", Text(progress.verdict, style="yellow")] if progress.verdict else []
    return Panel(
        Group(*rows),
        box=ROUNDED,
        title=Text.assemble(("groupwise", "bold"), f" · {one_line(progress.title)}"),
        title_align="left",
        subtitle=Text(duration(elapsed), style="dim"),
        subtitle_align="right",
        border_style="bright_black",
        padding=(0, 2),
        width=width,
    )


def _bar(progress: Progress, width: int) -> RenderableType:
    done = Text.assemble("step ", (f"{progress.step}/{progress.total_steps}", "bold"))
    finished = progress.step >= progress.total_steps
    left = "done" if finished else f"{duration(progress.seconds_left)} left" if progress.seconds else "starting"
    table = Table.grid(padding=(0, 2, 0, 0))
    bar = ProgressBar(
        total=max(progress.total_steps, 1),
        completed=progress.step,
        width=max(width - done.cell_len - len(left) - 4, 6),
        complete_style="cyan",
        finished_style="green",
        style="bright_black",
    )
    table.add_row(done, bar, Text(left, style="dim"))
    return table


def _headline(progress: Progress, width: int) -> list[Text]:
    """The reward and the evaluation: what the run is about."""
    latest = progress.latest
    if of_reward_model(latest):
        line = Text.assemble(("accuracy  ", "dim"), (f"{number(latest.get('reward_model/accuracy')):<7}", "bold green"))
    else:
        line = Text.assemble(("reward    ", "dim"), (f"{number(latest.get('reward')):<7}", "bold green"))
        line.append(f"± {number(latest.get('reward_std')):<7}", style="dim")
    shown = list(progress.rewards)[-max(width - line.cell_len, 1) :]
    line.append(sparkline(shown), style="green")
    lines = [line, *_steps(latest), *_held_out(progress), *_judge(progress)]
    for each in lines:
        each.truncate(width, overflow="ellipsis")
    return lines


def _steps(latest: Mapping[str, Any]) -> list[Text]:
    """The rewards of steps, where they are scored."""
    if "step_reward" not in latest:
        return []
    line = Text.assemble(("steps     ", "dim"), (f"{number(latest['step_reward']):<7}", "bold green"))
    first = percent(latest.get("steps/first_right"))
    line.append(f"{number(latest.get('steps/per_output'))} an output, first right {first}", style="dim")
    return [line]


def _judge(progress: Progress) -> list[Text]:
    """The reward model that the run trains: is it right, and does the policy only please it?"""
    if not progress.judge:
        return []
    accuracy, gap = progress.judge.get("reward_model/eval/accuracy"), progress.latest.get("reward_model/gap")
    return [
        Text.assemble(
            ("judge     ", "dim"), (f"{number(accuracy):<7}", "bold green"),
            (f"round {int(progress.judge[ROUND])}, above the verifier by {number(gap)}", "dim"),
        )
    ]  # fmt: skip


def _held_out(progress: Progress) -> list[Text]:
    """The accuracy of held-out outputs, or their reward where not every evaluation has one."""
    evals = progress.evals
    name, column = ("accuracy", 1) if all(one[1] is not None for one in evals) else ("reward", 2)
    known = [(one[0], one[column]) for one in evals if one[column] is not None]
    if not known:
        return []
    (_, first), (step, last) = known[0], known[-1]
    since = f"{name}, from {number(first)} · step {step}" if len(known) > 1 else f"{name}, at the start"
    return [Text.assemble(("held out  ", "dim"), (f"{number(last):<7}", "bold green"), (since, "dim"))]


def _grid(progress: Progress, width: int) -> Table:
    latest = progress.latest
    judge = "reward_model/" if of_reward_model(latest) else ""
    cells = (
        ("length", number(latest.get("completions/mean_length"))),
        ("cut off", percent(latest.get("completions/clipped_ratio"))),
        ("tokens/s", number(latest.get("tokens/per_second"))),
        ("KL", number(latest.get("kl"))),
        ("clipped", percent(latest.get("clip_ratio/region_mean"))),
        ("entropy", number(latest.get("entropy"))),
        ("loss", number(latest.get(f"{judge}loss"))),
        ("grad norm", number(latest.get(f"{judge}grad_norm"))),
        ("no spread", percent(latest.get("frac_reward_zero_std"))),
    )
    shown = [cell for cell in cells if not judge or cell[1] != ABSENT]
    columns = max(1, min(3, width // 22))
    table = Table.grid(padding=(0, 1, 0, 0))
    for _ in range(columns):
        table.add_column(style="dim", no_wrap=True, min_width=9)
        table.add_column(no_wrap=True, min_width=width // columns - 11)
    for start in range(0, len(shown), columns):
        table.add_row(*(text for cell in shown[start : start + columns] for text in cell))
    return table


def _phases(latest: Mapping[str, Any], width: int, coloured: bool) -> Group | None:
    """Where the time of the last step went: one bar, and its legend."""
    total = latest.get("time/step")
    if not total:
        return None
    parts = [(phase, sum(latest.get(name) or 0.0 for name in phase.metrics)) for phase in _PHASES]
    parts.append((_OTHER, max(total - sum(seconds for _, seconds in parts), 0.0)))
    whole = sum(seconds for _, seconds in parts)
    bar, legend, before = Text(), [Text("time      ", style="dim")], 0.0
    for phase, seconds in parts:
        # Rounding the ends instead of the lengths makes the blocks fill the width exactly.
        length = round((before + seconds) / whole * width) - round(before / whole * width)
        block = "━" if coloured else phase.block
        bar.append(block * length, style=phase.colour)
        _add(legend, Text.assemble((block, phase.colour), f" {phase.name} {seconds / whole:.0%}  "), width)
        before += seconds
    _add(legend, Text(f"of {duration(total)}", style="dim"), width)
    return Group(bar, *legend)


def _add(lines: list[Text], text: Text, width: int) -> None:
    """Add a piece to the last line, or begin another where it would not fit; a piece that never fits is cut."""
    if lines[-1].cell_len + len(text.plain.rstrip()) > width:
        lines.append(Text(" " * 10))
    lines[-1].append_text(text)
    lines[-1].truncate(width, overflow="ellipsis")


def _sample(sample: Sample, width: int) -> list[Text]:
    """One question and its answer after its reward, two lines each at most."""
    earned = "" if sample.reward is None else f"{number(sample.reward)}  "
    lines = [_in_two_lines(("question  ", "dim"), (one_line(sample.question), ""), width)] if sample.question else []
    answer = _in_two_lines(("answer    ", "dim"), (earned, "bold green"), width, (one_line(sample.answer), "italic"))
    return [*lines, answer]


def _in_two_lines(name: tuple[str, str], text: tuple[str, str], width: int, more: tuple[str, str] = ("", "")) -> Text:
    line = Text.assemble(name, text, more)
    line.truncate(2 * width - 10, overflow="ellipsis")
    return line


def draw_svg(events: Iterable[Mapping[str, Any]], *, total_steps: int, title: str, sample: Sample | None = None) -> str:
    """A run's terminal as an SVG picture, from its events alone: what a terminal of 80 columns would show."""
    progress = Progress(total_steps, title)
    elapsed = 0.0
    for event in events:
        progress.take(event)
        elapsed += event.get("time/step") or 0.0
    progress.sample = sample
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(panel(progress, elapsed, 80))
    # Without the font that rich would fetch from elsewhere: the picture shows in the reader's own monospace.
    return re.sub(r"@font-face \{[^}]*\}\s*", "", console.export_svg(title="groupwise"))
