"""What people and programs see, in every mode."""

from __future__ import annotations

import io
import json
import math
import re
from typing import Any

import pytest
from rich.console import Console

from groupwise.streams import OUT, Output
from groupwise.watch.panel import JUDGE_LEGEND, LEGEND, Progress, Sample, draw_svg, panel
from groupwise.watch.terminal import JsonLines, LivePanel, Mode, Plain, Quiet, eval_table, make_terminal

EVENT = {
    "step": 42,
    "reward": 0.797,
    "reward_std": 0.147,
    "frac_reward_zero_std": 0.52,
    "completions/mean_length": 25.34,
    "completions/clipped_ratio": 0.004,
    "tokens/per_second": 12345.6,
    "kl": 0.0517,
    "clip_ratio/region_mean": 0.0012,
    "entropy": 0.432,
    "loss": -0.0123,
    "grad_norm": 0.823,
    "time/step": 2.0,
    "time/sample": 1.1,
    "time/reward": 0.1,
    "time/prepare": 0.1,
    "time/update": 0.5,
}
BASELINE = {
    "step": 0,
    "time/step": 3.0,
    "eval/accuracy_ci95": 0.05,
    "eval/reward": 0.27,
    "eval/accuracy": 0.27,
    "eval/reward_ci95": 0.03,
    "eval/mean_length": 30.1,
}
SILENT = EVENT | {"step": 43, "frac_reward_zero_std": 1.0, "loss": 0.0}

STEPWISE = EVENT | {"step_reward": 0.613, "steps/per_output": 3.04, "steps/first_right": 0.48}


class Screen(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _ordinary_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def drawn(progress: Progress, width: int = 80) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(panel(progress, 130.0, width, coloured=False))
    return console.export_text()


def seen(*events: dict[str, Any], sample: str = "") -> Progress:
    progress = Progress(120, "demo")
    for event in events:
        progress.take(event)
    progress.sample = Sample("12+34=?", sample, 1.0) if sample else None
    return progress


def test_the_panel_shows_what_matters() -> None:
    picture = drawn(seen(BASELINE, EVENT | {"eval/accuracy": 0.75}, sample="12+34=46\n46"))
    for shown in ("groupwise · demo", "step 42/120", "2 min 36 s left", "2 min 10 s", "0.797", "± 0.147", "12,346"):
        assert shown in picture
    for shown in ("KL        0.0517", "clipped   0.1%", "entropy   0.432", "loss      -0.0123", "grad norm 0.823"):
        assert shown in picture
    assert "held out  0.750  accuracy, from 0.270 · step 42" in picture
    assert "█ sample 55%  ▓ reward 5%  ▒ update 30%  ░ other 10%  of 2.0 s" in picture
    assert "question  12+34=?" in picture
    assert "answer    1.00  12+34=46 ↵ 46" in picture


@pytest.mark.parametrize("width", [20, 30, 50, 80, 100])
@pytest.mark.parametrize("events", [(), (BASELINE,), (EVENT,), (BASELINE, SILENT), ({"step": 1, "reward": None},)])
def test_the_panel_fits_its_width_whatever_is_missing(width: int, events: tuple[dict[str, Any], ...]) -> None:
    picture = drawn(seen(*events, sample="x" * 500 + "\x1b[2J[bold]"), width)
    assert {len(line) for line in picture.splitlines()} == {width}
    assert "\x1b" not in picture


def test_the_bar_of_phases_is_filled_exactly_in_proportion() -> None:
    bar = next(line for line in drawn(seen(EVENT)).splitlines() if "██" in line)
    assert [bar.count(block) for block in "█▓▒░"] == [41, 3, 23, 7]


def test_the_panel_says_why_nothing_is_learned_and_stops_saying_it() -> None:
    assert "Nothing is learned in this step" in drawn(seen(SILENT))
    assert "Nothing is learned in this step" not in drawn(seen(SILENT, EVENT | {"step": 44}))
    assert "Nothing is learned in this step" in drawn(seen(SILENT, BASELINE | {"step": 43}))


def test_numbers_that_are_not_finite_are_shown_as_such() -> None:
    picture = drawn(seen(EVENT | {"loss": math.nan, "reward": math.nan, "completions/clipped_ratio": math.nan}))
    assert picture.count("nan") == 3


@pytest.mark.parametrize("mode, kind", [("plain", Plain), ("quiet", Quiet), ("json", JsonLines), ("auto", LivePanel)])
def test_each_mode_has_its_terminal(mode: Any, kind: type) -> None:
    terminal = make_terminal(mode, total_steps=2, title="demo", console=Console(file=Screen()))
    terminal.close()
    assert type(terminal) is kind


def test_auto_is_plain_where_standard_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert type(make_terminal("auto", total_steps=2, title="demo", console=Console(file=io.StringIO()))) is Plain
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_terminal("auto", total_steps=2, title="demo", console=Console(file=Screen()))) is Plain


def test_auto_is_plain_where_there_are_no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    screen = Screen()
    terminal = make_terminal("auto", total_steps=2, title="demo", console=Console(file=screen))
    terminal.close("the end")
    assert screen.getvalue() == "the end\n"


def test_plain_lines_keep_their_columns(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make_terminal("plain", total_steps=120, title="demo")
    terminal.write(BASELINE)
    terminal.write(EVENT)
    terminal.write({"step": 7, "reward": None, "time/step": 130.0})
    terminal.sample("not here")
    terminal.say("the end [bold]")
    terminal.warn("careful")
    out, err = capsys.readouterr()
    first, *steps, last = out.splitlines()
    assert first == "eval at step 0: reward 0.270 +- 0.0300  accuracy 0.270  length 30.1"
    assert steps == [
        "step  42/120  reward  0.797  len  25.3  kl   0.0517  clip  0.1%  loss   -0.0123"
        "  grad  0.823  tok/s  12,346  time  2.0 s",
        "step   7/120  reward      -  len     -  kl        -  clip     -  loss         -"
        "  grad      -  tok/s       -  time 2 min 10 s",
    ]
    assert max(len(line) for line in steps) <= 124
    assert last == "the end [bold]"
    assert err == "warning: careful\n"
    assert "\x1b" not in out


def test_plain_says_why_once_per_stretch(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make_terminal("plain", total_steps=120, title="demo")
    for event in (SILENT, SILENT, EVENT, SILENT):
        terminal.write(event)
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("Nothing is learned") for line in lines] == [False, True, False, False, False, True]


def test_plain_survives_a_stream_without_unicode() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    terminal = make_terminal("plain", total_steps=2, title="demo", console=Console(file=out))
    terminal.say("accuracy 0.27 → 0.83")
    assert raw.getvalue() == b"accuracy 0.27 \\u2192 0.83\n"


def test_quiet_shows_warnings_and_the_last_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make_terminal("quiet", total_steps=120, title="demo")
    terminal.say("first")
    terminal.write(EVENT)
    terminal.say("last")
    terminal.warn("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")
    terminal.close()
    terminal.close()
    assert capsys.readouterr() == ("last\n", "")


def test_quiet_falls_back_to_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make_terminal("quiet", total_steps=120, title="demo")
    terminal.write(EVENT)
    terminal.close()
    assert capsys.readouterr().out.startswith("step  42/120  reward  0.797")


def test_json_puts_nothing_but_events_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make_terminal("json", total_steps=120, title="demo")
    terminal.say("for people")
    terminal.sample("for people")
    terminal.warn("careful")
    terminal.write(EVENT)
    terminal.write({"step": 43, "loss": math.nan})
    terminal.close()
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [EVENT, {"step": 43, "loss": None}]
    assert err == "warning: careful\n"


def live(screen: Screen, **options: Any) -> LivePanel:
    terminal = make_terminal("auto", total_steps=120, title="demo", console=Console(file=screen, width=80), **options)
    assert isinstance(terminal, LivePanel)
    return terminal


def test_the_live_panel_ends_standing_with_messages_around_it() -> None:
    screen = Screen()
    terminal = live(screen, history=[BASELINE])
    terminal.warn("[careful]")
    terminal.sample("12+34=46", 1.0)
    terminal.write(EVENT)
    terminal.close()
    terminal.say("the end")
    terminal.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert text.index("warning: [careful]") < text.index("step 42/120") < text.index("the end")
    last = text[text.rindex("╭") :]
    assert "12+34=46" in last
    assert "accuracy, at the start" in last
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1, "the cursor is back"


@pytest.mark.parametrize("mode", ["plain", "quiet"])
def test_the_last_message_is_the_last_line(mode: Mode, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make_terminal(mode, total_steps=120, title="demo")
    terminal.write(EVENT)
    terminal.close("the end")
    terminal.close()
    assert capsys.readouterr().out.splitlines()[-1] == "the end"


def test_the_last_message_stands_below_the_panel() -> None:
    screen = Screen()
    terminal = live(screen)
    terminal.write(EVENT)
    terminal.close("the end")
    assert screen.getvalue().rindex("the end") > screen.getvalue().rindex("╰")


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]")
    for setting, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", setting)
        screen = Screen()
        terminal = live(screen)
        terminal.write(EVENT)
        terminal.close()
        assert bool(colour.search(screen.getvalue())) is coloured


def test_an_evaluation_is_a_table_with_its_intervals() -> None:
    found = {"reward": 0.27, "reward_ci95": 0.03, "accuracy": 0.25, "accuracy_ci95": math.nan, "pass@1": 0.25}
    assert eval_table(found) == "reward    0.270 +- 0.0300\naccuracy  0.250 +- nan\npass@1    0.250"


def test_the_picture_is_an_svg_that_fetches_nothing() -> None:
    picture = draw_svg([BASELINE, EVENT], total_steps=120, title="demo", sample=Sample("12+34=?", "12+34=46", 1.0))
    assert picture.startswith("<svg")
    assert "12+34=46" in picture
    assert 'url("' not in picture
    assert "@font-face" not in picture
    assert picture == draw_svg(
        [BASELINE, EVENT], total_steps=120, title="demo", sample=Sample("12+34=?", "12+34=46", 1.0)
    )


def test_steps_are_told_where_they_are_scored() -> None:
    [line] = capture_plain(STEPWISE)
    assert "reward  0.797  steps 0.613 of 3.04, 1st 48%  len" in line
    [without] = capture_plain(EVENT)
    assert "steps" not in without
    picture = drawn(seen(STEPWISE))
    assert "steps     0.613  3.04 an output, first right 48%" in picture
    assert "an output" not in drawn(seen(EVENT))


def capture_plain(event: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    Plain(Output(out, OUT), 120).write(event)
    return out.getvalue().splitlines()


def test_an_evaluation_tells_of_steps() -> None:
    out = io.StringIO()
    Plain(Output(out, OUT), 120).write(BASELINE | {"eval/step_accuracy": 0.52, "eval/right_by_luck": 0.125})
    assert "accuracy 0.270  right_by_luck 0.125  step_accuracy 0.520  length 30.1" in out.getvalue()


ROUND = {
    "step": 16, "reward_model/round": 2.0, "reward_model/new": 928.0, "reward_model/replayed": 103.0,
    "reward_model/before/accuracy": 0.652, "reward_model/eval/accuracy": 0.834, "reward_model/eval/auc": 0.9,
    "reward_model/loss": 0.5, "time/step": 21.0, "time/label": 1.0,
}  # fmt: skip


def test_a_round_inside_a_run_is_one_line_and_no_step(capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("plain", "quiet"):
        terminal = make_terminal(mode, total_steps=120, title="demo")  # type: ignore[arg-type]
        terminal.write(ROUND)
        terminal.close()
    said = "928 new examples  103 replayed  held-out accuracy 0.652 -> 0.834  auc 0.900  time 21 s"
    assert capsys.readouterr().out == f"reward model, round 2: {said}\n"


def test_the_panel_keeps_the_steps_own_numbers_beside_a_round() -> None:
    before = seen(EVENT)
    after = seen(EVENT | {"reward_model/gap": 0.0625}, ROUND)
    assert after.seconds == before.seconds
    assert after.rewards == before.rewards
    assert after.evals == before.evals, "they are the verifier's, the round's are the reward model's"
    picture = drawn(after)
    assert "judge     0.834  round 2, above the verifier by 0.0625" in picture
    assert "judge" not in drawn(before)
    assert "█ sample 55%" in picture


def test_a_reward_models_training_has_lines_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    update = {"reward_model/loss": 0.5, "reward_model/accuracy": 0.75, "reward_model/grad_norm": 2.0}
    event = {"step": 3, **update, "reward_model/learning_rate": 2e-5, "time/step": 0.5}
    held_out = {"reward_model/eval/accuracy": 0.9, "reward_model/eval/auc": 0.95}
    terminal = make_terminal("plain", total_steps=20, title="demo")
    terminal.write({"step": 0, **held_out, "time/step": 0.1})
    terminal.write(event | held_out)
    assert capsys.readouterr().out.splitlines() == [
        "eval at step 0: accuracy 0.900  auc 0.950",
        "step  3/20  loss  0.500  accuracy  0.750  grad   2.00  lr 2.00e-05  time  0.5 s",
        "eval at step 3: accuracy 0.900  auc 0.950",
    ]
    svg = draw_svg([{"step": 0, **held_out}, event | held_out], total_steps=20, title="demo").replace("&#160;", " ")
    assert "accuracy  " in svg
    assert "accuracy, from 0.900" in svg
    assert "tokens/s" not in svg
    inside = EVENT | {"reward_model/loss": 0.5}
    terminal.write(inside)
    assert "reward  0.797" in capsys.readouterr().out, "inside a policy's run the step is the policy's"


def test_at_sixty_columns_nothing_is_cut() -> None:
    """Whatever a run can show is there, the phases in two lines; of the rewards the last ones."""
    progress = seen(BASELINE, *[STEPWISE | {"step": step} for step in range(1, 60)], ROUND, sample="46")
    progress.take(STEPWISE | {"step": 60, "reward": 2.0, "reward_model/gap": 0.0625, "eval/accuracy": 0.75})
    picture = drawn(progress, 60)
    assert {len(line) for line in picture.splitlines()} == {60}
    assert "…" not in picture
    for shown in ("░ other 10%", "of 2.0 s", "no spread 52%", "above the verifier by 0.0625", "first right 48%", "▁█"):
        assert shown in picture


def test_what_goes_on_before_the_first_step_stands_in_the_panel() -> None:
    screen = Screen()
    terminal = live(screen)
    terminal.say("loading a/model")
    before = screen.getvalue()[screen.getvalue().rindex("╭") :]
    assert re.search(r"now +loading a/model", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", before))
    terminal.write(EVENT)
    after = screen.getvalue()[screen.getvalue().rindex("╭") :]
    assert "now" not in after
    assert "length" in after
    terminal.close()


def test_the_words_of_the_panel_are_told_once() -> None:
    """Each name that stands before a number is in the legend, or says itself."""
    screen = Screen()
    terminal = live(screen, history=[BASELINE])
    for _ in range(2):
        terminal.write(EVENT | {"eval/accuracy": 0.75})
    terminal.close()
    said = " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).split())
    assert said.count(LEGEND) == 1
    for word in ("reward", "held out", "length", "cut off", "KL", "clipped", "entropy", "grad norm", "no spread"):
        assert word in LEGEND
    screen = Screen()
    live(screen, history=[{"step": 0, "reward_model/eval/accuracy": 0.5}]).close()
    assert JUDGE_LEGEND[:40] in screen.getvalue()


@pytest.mark.parametrize("width", [60, 120])
def test_a_panel_that_was_resized_is_drawn_anew(width: int) -> None:
    """The terminal has wrapped the lines of the old width: its screen is cleared, once, before the next drawing."""
    screen = Screen()
    console = Console(file=screen, width=80)
    terminal = make_terminal("auto", total_steps=120, title="demo", console=console)
    terminal.write(EVENT)
    assert "\x1b[2J" not in screen.getvalue()
    console.width = width
    terminal.write(EVENT)
    terminal.write(EVENT)
    terminal.close("the end")
    assert screen.getvalue().count("\x1b[2J") == 1
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()[screen.getvalue().rindex("╭") :])
    assert len(last.splitlines()[0].rstrip()) == min(width, 100)


@pytest.mark.parametrize("mode, lines", [("plain", ["what next: eval", "the end"]), ("quiet", ["the end"])])
def test_what_could_be_done_next_stands_before_the_last_line(
    mode: Mode, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = make_terminal(mode, total_steps=120, title="demo")
    terminal.close("the end", "what next: eval")
    terminal.close()
    assert capsys.readouterr().out.splitlines() == lines
