"""How each kind of row is measured. Runs of the systems alternate, and ratios are taken between neighbours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks import environments
from benchmarks.cases import Case, Row, sampling_flops, step_flops, training_flops
from benchmarks.protocol import TooSlowError, Worker

Settings = dict[str, Any]
Answer = dict[str, Any]
SHORT = 4
"""Output tokens of a warm-up: enough for every lazy allocation and the optimizer's state."""
QUICK = 5.0
"""Seconds. Runs shorter than this differ by a third from one to the next: one says little."""
SLOW = 15.0
"""Seconds. A default slower than this is timed once: it is not what the bar is about."""

TRL_DEFAULT: Settings = {}
TRL_SETTINGS = [
    {"dtype": dtype, "checkpointing": checkpointing}
    for dtype in ("float32", "bfloat16")
    for checkpointing in (False, True)
]
OUR_SETTINGS = [
    {"dtype": dtype, "tokens_per_micro_batch": budget} for dtype in ("float32", "bfloat16") for budget in (16384, 2048)
]
GENERATE_SETTINGS = [
    {"dtype": dtype, "cache": cache} for dtype in ("float32", "bfloat16") for cache in (None, "static")
]
VLLM_SETTINGS = [{"dtype": "float32"}, {"dtype": "bfloat16"}]
SAMPLING_SETTINGS = [{"dtype": dtype, "sampling_only": True} for dtype in ("float32", "bfloat16")]


@dataclass(frozen=True)
class Bench:
    """Where workers find things, how many pairs are wanted, and for how many seconds TRL's default is waited for."""

    models: Path
    logs: Path
    pairs: int = 5
    patience: float = 120.0
    threads: int = 2

    def start(self, system: str, case: Case, settings: Settings) -> Worker:
        """A worker of a system: `ours`, `trl`, `generate` or `vllm`."""
        separate = system in ("trl", "vllm")
        python = environments.python_of(system) if separate else Path(sys.executable)
        # As the command line of groupwise sets it on an idle machine; the others run with what they come with.
        own = {"GOMP_SPINCOUNT": "10000"} if system == "ours" else {}
        return Worker(
            python, f"{system}_worker", {"case": asdict(case), "folder": str(self.models / case.shape), **settings},
            log=self.logs / f"{system}.log", environment={"OMP_NUM_THREADS": str(self.threads), **own},
        )  # fmt: skip


def measure(row: Row, bench: Bench) -> dict[str, Any]:
    """Measure a row; returns the numbers of the table and all raw ones."""
    return KINDS[row.kind](row, bench)


def best_of(bench: Bench, system: str, case: Case, settings: Sequence[Settings], verb: str) -> tuple[Settings, Answer]:
    """The fastest settings of a system by a trial of each, and what the trials were.

    A trial ends where it cannot win any more; its seconds are None then.
    """
    best, fastest, trials = settings[0], float("inf"), []
    for one in settings:
        seconds = trial(bench.start(system, case, one), verb, None if fastest == float("inf") else fastest)
        trials.append({**one, "seconds": seconds})
        if seconds is not None and seconds < fastest:
            best, fastest = one, seconds
    return best, {"best": best, "trials": trials}


def trial(worker: Worker, verb: str, fastest: float | None) -> float | None:
    """Seconds of a run after a warm-up, of short runs the least of three; None where one takes clearly longer than the
    fastest so far."""
    patience = None if fastest is None else 1 + 1.5 * fastest
    try:
        worker.ask(patience=None if fastest is None else 10 + 2 * fastest, **{verb: 0, "short": SHORT})
        least = float(worker.ask(patience=patience, **{verb: 1})["seconds"])
        for number in range(2, 4) if least < QUICK else ():
            least = min(least, float(worker.ask(patience=patience, **{verb: number})["seconds"]))
        return least
    except TooSlowError:
        return None
    finally:
        worker.close()


class Steps:
    """Timed steps of one system. Where workers cannot live together, one has to `leave` before another begins.

    Beside each of ours stands its floor in seconds: its FLOPs at the rate of large products, measured right after it.
    """

    def __init__(self, bench: Bench, system: str, row: Row, settings: Settings, closing: ExitStack) -> None:
        self.start = lambda: bench.start(system, row.case, settings)
        self.case, self.floored = row.case, system == "ours"
        self.alone, self.closing = row.alone, closing
        self.worker: Worker | None = None
        self.about: Mapping[str, Any] = {}
        self.answers: list[Answer] = []
        self.next = 0

    def time(self) -> None:
        """One timed step, warmed up before."""
        if self.worker is None:
            self.worker = self._warm()
        answer = self.worker.ask(step=self.next)
        if self.floored:
            answer["floor"] = step_flops(self.case, self.next) / self.worker.ask(product=True)["rate"]
        self.answers.append(answer)
        self.next += 1

    def leave(self) -> None:
        """Give the memory back where workers cannot live together."""
        if self.alone and self.worker is not None:
            self.worker.close()
            self.worker = None

    def _warm(self) -> Worker:
        """A worker that has done a whole step: only the first one touches memory that is new to it."""
        worker = self.start()
        self.closing.callback(worker.close)
        self.about = worker.about
        if not self.alone:
            worker.ask(step=self.next, short=SHORT)
            self.next += 1
        worker.ask(step=self.next)
        self.next += 1
        return worker

    def seconds(self) -> list[float]:
        """Of every timed step."""
        return [answer["seconds"] for answer in self.answers]


def measure_steps(row: Row, bench: Bench) -> dict[str, Any]:
    """Whole steps: ours and TRL's best in pairs, TRL's default beside them."""
    settings, trials = best_of(bench, "ours", row.case, sensible(OUR_SETTINGS, bench), "step")
    theirs, their_trials = best_of(bench, "trl", row.case, sensible(TRL_SETTINGS, bench), "step")
    default = default_once(row, bench)
    with ExitStack() as closing:
        ours = Steps(bench, "ours", row, settings, closing)
        best = Steps(bench, "trl", row, theirs, closing)
        beside = Steps(bench, "trl", row, TRL_DEFAULT, closing)
        times = default_times(default, bench.pairs, row.alone)
        for index in range(bench.pairs):
            one, other = (ours, best) if index % 2 == 0 else (best, ours)
            one.time()
            one.leave()
            other.time()  # and where the other comes first next time, its worker goes on
            if index < times:
                other.leave()
                beside.time()
                beside.leave()
    defaults = beside.seconds() or ([] if default is None else [default])
    return {
        **_pairs(ours.seconds(), best.seconds()),
        "floor": median(answer["floor"] for answer in ours.answers),
        "default": median(defaults) if defaults else None,
        "default_at_least": None if defaults else bench.patience,
        "phases": {name: _phases(steps.answers) for name, steps in (("ours", ours), ("best", best))},
        "raw": {
            "ours": ours.answers, "best": best.answers, "default": beside.answers, "default_trial": default,
            "our_trials": trials, "best_trials": their_trials, "about": {"ours": ours.about, "best": best.about},
        },
    }  # fmt: skip


def default_once(row: Row, bench: Bench) -> float | None:
    """Seconds of one step of TRL as it comes; None where it takes too long."""
    worker = bench.start("trl", row.case, TRL_DEFAULT)
    try:
        worker.ask(patience=bench.patience, step=0, short=SHORT)
        return float(worker.ask(patience=bench.patience, step=1)["seconds"])
    except TooSlowError:
        return None
    finally:
        worker.close()


def default_times(once: float | None, pairs: int, alone: bool) -> int:
    """How often TRL's default is timed beside the pairs."""
    if once is None or once > SLOW:
        return 0
    return min(pairs, 2) if alone else pairs


def _pairs(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return {"ours": median(ours), "best": median(theirs), "ratio": median(ratios), "ratios": ratios, "unit": "s"}


def _phases(answers: Sequence[Answer]) -> dict[str, float]:
    return {name: median(answer[name] for answer in answers) for name in ("sample", "train")}


def measure_sampling(row: Row, bench: Bench) -> dict[str, Any]:
    """Sampling alone, against `generate` or vLLM, in tokens per second."""
    choices = GENERATE_SETTINGS if row.kind == "generate" else VLLM_SETTINGS
    settings, trials = best_of(bench, "ours", row.case, sensible(SAMPLING_SETTINGS, bench), "sample")
    theirs, their_trials = best_of(bench, row.kind, row.case, sensible(choices, bench), "sample")
    with ExitStack() as closing:
        workers = [bench.start("ours", row.case, settings), bench.start(row.kind, row.case, theirs)]
        for worker in workers:
            closing.callback(worker.close)
            worker.ask(sample=0)
        answers: list[list[Answer]] = [[], []]
        for index in range(bench.pairs):
            for side in (0, 1) if index % 2 == 0 else (1, 0):
                answers[side].append(workers[side].ask(sample=index + 1))
            answers[0][-1]["floor"] = sampling_flops(row.case, index + 1) / workers[0].ask(product=True)["rate"]
        about = {"ours": workers[0].about, "best": workers[1].about}
    rates = [[answer["tokens"] / answer["seconds"] for answer in side] for side in answers]
    ratios = [our / their for our, their in zip(*rates, strict=True)]
    return {
        "ours": median(rates[0]), "best": median(rates[1]), "ratio": median(ratios), "ratios": ratios,
        "floor": median(answer["tokens"] / answer["floor"] for answer in answers[0]), "unit": "tok/s",
        "raw": {
            "ours": answers[0], "best": answers[1], "our_trials": trials, "best_trials": their_trials, "about": about,
        },
    }  # fmt: skip


def measure_memory(row: Row, bench: Bench) -> dict[str, Any]:
    """Peak resident memory above imports after two whole steps, TRL without checkpointing, each in its own best type.

    Like is held against like: the ratio is the worse one of float32 and, where bfloat16 is computed fast, bfloat16.
    """
    dtypes = ("float32", "bfloat16") if narrow_is_fast(bench) else ("float32",)
    found: dict[str, dict[str, int]] = {}
    for dtype in dtypes:
        ours = {"dtype": dtype, "tokens_per_micro_batch": 16384}
        theirs = {"dtype": dtype, "checkpointing": False}
        found[dtype] = {"ours": _peak(bench, "ours", row, ours), "best": _peak(bench, "trl", row, theirs)}
    worst = min(found, key=lambda dtype: found[dtype]["best"] / found[dtype]["ours"])
    ours_bytes, their_bytes = found[worst]["ours"], found[worst]["best"]
    return {
        "ours": ours_bytes / 1e9, "best": their_bytes / 1e9, "ratio": their_bytes / ours_bytes, "unit": "GB",
        "note": worst, "raw": found,
    }  # fmt: skip


def _peak(bench: Bench, system: str, row: Row, settings: Settings) -> int:
    worker = bench.start(system, row.case, settings)
    try:
        verb = "memory" if system == "ours" else "step"
        return max(int(worker.ask(**{verb: number})["peak"]) for number in range(2))
    finally:
        worker.close()


def sensible(settings: Sequence[Settings], bench: Bench) -> list[Settings]:
    """Those that may be the fastest: none in bfloat16 where the processor multiplies that no faster than float32."""
    wide = [one for one in settings if one["dtype"] == "float32"]
    return wide if len(wide) < len(settings) and not narrow_is_fast(bench) else list(settings)


@cache
def narrow_is_fast(bench: Bench) -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones; asked once."""
    rates = []
    for dtype in ("float32", "bfloat16"):
        case = Case("micro", 1, 1, 8, 1)  # the product is the same beside any model
        worker = bench.start("ours", case, {"dtype": dtype, "sampling_only": True})
        try:
            rates.append(worker.ask(product=True)["rate"])
        finally:
            worker.close()
    return bool(rates[1] > rates[0])


def measure_share(row: Row, bench: Bench) -> dict[str, Any]:
    """The training phase's share of the rate at which large matrices are multiplied, measured beside each step."""
    dtype = "bfloat16" if row.name.endswith("bf16") else "float32"
    if dtype == "bfloat16" and not narrow_is_fast(bench):
        return {"ratio": None, "unit": "", "note": "this processor multiplies bfloat16 no faster than float32"}
    worker = bench.start("ours", row.case, {"dtype": dtype, "tokens_per_micro_batch": 16384})
    try:
        worker.ask(step=0, short=SHORT)
        answers = [{**worker.ask(product=True), **worker.ask(step=number + 1)} for number in range(bench.pairs)]
    finally:
        worker.close()
    flops = training_flops(row.case)
    shares = [flops / (answer["train"] * answer["rate"]) for answer in answers]
    return {
        "ours": flops / median(answer["train"] for answer in answers) / 1e9,
        "best": median(answer["rate"] for answer in answers) / 1e9,
        "ratio": median(shares), "ratios": shares, "unit": "GFLOP/s", "raw": answers,
    }  # fmt: skip


def measure_slope(row: Row, bench: Bench) -> dict[str, Any]:
    """How the time of a step grows with G or P, against how its FLOPs grow, both in units of the row's own case.

    `ratio` is the slope of the straight line through the measured points over that through the formula's.
    """
    changed = "outputs" if row.name == "slope-g" else "prompt"
    points = []
    for value in row.values:
        case = replace(row.case, **{changed: value})
        worker = bench.start("ours", case, {"dtype": "float32", "tokens_per_micro_batch": 16384})
        try:
            worker.ask(step=0, short=SHORT)
            answers = [worker.ask(step=number + 1) for number in range(min(bench.pairs, 3))]
        finally:
            worker.close()
        points.append({"value": value, "answers": answers, "flops": step_flops(case)})
    seconds = [median(answer["seconds"] for answer in point["answers"]) for point in points]
    own = row.values.index(getattr(row.case, changed))
    formula = [point["flops"] / points[own]["flops"] for point in points]
    measured = slope(row.values, [second / seconds[own] for second in seconds])
    return {
        "ours": measured, "best": slope(row.values, formula), "ratio": measured / slope(row.values, formula),
        "unit": f"per {changed}", "seconds": seconds, "formula": formula, "raw": points,
    }  # fmt: skip


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the straight line of least squares."""
    x0, y0 = fmean(xs), fmean(ys)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / sum((x - x0) ** 2 for x in xs)


KINDS: dict[str, Callable[[Row, Bench], dict[str, Any]]] = {
    "step": measure_steps,
    "generate": measure_sampling,
    "vllm": measure_sampling,
    "memory": measure_memory,
    "share": measure_share,
    "slope": measure_slope,
}
