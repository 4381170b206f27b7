"""The speed benchmarks: our worker does the work that it is asked for, and the table says what the results say."""

import os
import signal
import sys
from dataclasses import asdict, replace

import pytest

from benchmarks import measure, protocol, shapes, speed, table
from benchmarks.cases import ROWS, SHAPES, Case, reward_of, sampling_flops, step_flops, training_flops
from benchmarks.protocol import FamilyPeak, TooSlowError, Worker, WorkerError

MICRO = Case("micro", 2, 3, 5, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "micro"
    shapes.save("micro", folder)
    return folder


def worker(folder, case, **settings):
    settings = {"case": asdict(case), "folder": str(folder), "dtype": "float32", **settings}
    return Worker(sys.executable, "ours_worker", settings, log=folder / "log", environment={**os.environ})


def test_our_worker_does_a_step_of_natural_lengths(folder):
    case = replace(MICRO, completion=40, natural=True)
    ours = worker(folder, case, tokens_per_micro_batch=16384)
    try:
        whole, short = ours.ask(step=0), ours.ask(step=1, short=2)  # it checks every length itself
    finally:
        ours.close()
    assert "once per group" in ours.about["line"]
    assert whole["tokens"] == sum(case.lengths(0))
    assert short["tokens"] == 2 * 6
    assert whole["grad_norm"] > 0
    assert whole["mismatch"] < 1e-5
    assert whole["seconds"] >= whole["sample"] > 0


def test_our_worker_trains_an_output_without_siblings(folder):
    ours = worker(folder, replace(MICRO, outputs=1), tokens_per_micro_batch=16384)
    try:
        assert ours.ask(step=0)["grad_norm"] > 0
    finally:
        ours.close()


def test_our_worker_samples_alone_and_multiplies(folder):
    ours = worker(folder, MICRO, sampling_only=True)
    try:
        assert ours.ask(sample=0)["tokens"] == 24
        assert ours.ask(product=True)["rate"] > 0
    finally:
        ours.close()


def test_a_worker_ends_by_itself_when_it_is_closed(folder, monkeypatch):
    monkeypatch.setattr(protocol, "GRACE", None)  # for ever: nothing is said of how long it takes
    ours = worker(folder, MICRO, sampling_only=True)
    ours.close()
    ours.close()
    assert ours.process.returncode == 0, "a killed one leaves its helpers behind"


def test_a_worker_that_does_not_end_is_killed(folder, monkeypatch):
    monkeypatch.setattr(protocol, "GRACE", 0.2)
    ours = worker(folder, MICRO, sampling_only=True)
    os.kill(ours.process.pid, signal.SIGSTOP)
    ours.close()
    assert ours.process.returncode == -signal.SIGKILL


def test_the_peak_of_a_family_counts_a_child_and_what_is_shared_once():
    size = 200_000_000
    shared = b"a" * size

    def peak_with(allocate):
        (has_begun, begin), (may_end, end) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            held = bytearray(b"b") * size if allocate else shared
            os.write(begin, b"x")
            os.read(may_end, 1)
            os._exit(len(held) == 0)
        os.read(has_begun, 1)
        seen = FamilyPeak()
        seen.start()
        found = seen.stop()
        os.write(end, b"x")
        os.waitpid(child, 0)
        for descriptor in (has_begun, begin, may_end, end):
            os.close(descriptor)
        return found

    alone, both = peak_with(allocate=False), peak_with(allocate=True)
    assert 0.8 * size < both - alone < 1.2 * size
    assert len(shared) == size


def test_a_worker_that_ends_says_what_it_wrote_last(folder):
    with pytest.raises(WorkerError, match="no_such_shape"):
        worker(folder, replace(MICRO, shape="no_such_shape"), sampling_only=True)


def test_lengths_are_prescribed_alike_wherever_they_are_asked_for():
    case = ROWS["small-natural"].case
    lengths = [length for step in range(50) for length in case.lengths(step)]
    assert case.lengths(3) == case.lengths(3) != case.lengths(4)
    assert 1 <= min(lengths) <= max(lengths) == 256
    assert sum(lengths) / len(lengths) == pytest.approx(48, abs=2)
    assert MICRO.lengths(7) == [4] * 6


def test_prompts_have_their_length_and_none_comes_twice():
    prompts = [tuple(MICRO.prompt_ids(number)) for number in range(100)]
    assert {len(prompt) for prompt in prompts} == {5}
    assert len(set(prompts)) == 100
    assert min(min(prompt) for prompt in prompts) >= 2


def test_rewards_tell_outputs_apart():
    assert reward_of([2, 3, 4]) != reward_of([4, 3, 2]) != reward_of([4, 3, 3])
    assert 0 <= reward_of([9] * 50) < 1


def test_shapes_have_the_size_that_they_are_named_for():
    sizes = {name: (shape.trunk + shape.head) / 1e6 for name, shape in SHAPES.items()}
    assert sizes["tiny"] == pytest.approx(0.8, abs=0.02)
    assert sizes["small"] == pytest.approx(28, abs=0.5)
    assert sizes["qwen05"] == pytest.approx(494, abs=1)


def test_flops_by_hand():
    # N = 2 layers * 32 * (2 * 32 + 2 * 16 + 3 * 48) = 15,360; HV = 32 * 53 = 1,696; 10 prompt and 24 output tokens.
    # Pairs per prompt: 5 * 6 / 2 = 15, and for each of 3 outputs 4 * 5 + 4 * 5 / 2 = 30: 105, times 2 prompts.
    attention = 4 * 32 * 2 * 2 * 105
    training = 3 * (2 * 15_360 * 34 + 2 * 1_696 * 24 + attention)
    assert training_flops(MICRO) == training
    assert step_flops(MICRO) == training + 2 * 15_360 * 10 + 24 * 2 * (15_360 + 1_696) + attention
    assert training_flops(replace(MICRO, beta=0.04)) == training * 4 / 3


def test_flops_of_natural_lengths_are_those_of_the_step():
    case = replace(MICRO, completion=40, natural=True)
    tokens = [sum(case.lengths(step)) for step in range(2)]
    attention = [4 * 32 * 2 * (2 * 15 + sum(5 * c + c * (c + 1) / 2 for c in case.lengths(step))) for step in range(2)]
    expected = [2 * 15_360 * 10 + t * 2 * (15_360 + 1_696) + a for t, a in zip(tokens, attention, strict=True)]
    assert [sampling_flops(case, step) for step in range(2)] == expected
    assert expected[0] != expected[1]


def test_the_slope_is_that_of_least_squares():
    assert measure.slope((1, 2, 3), (2, 4, 7)) == pytest.approx(2.5)


@pytest.mark.parametrize(
    "name, ratio, verdict",
    [
        ("tiny-p16", 1.5, True),
        ("tiny-p16", 1.49, False),
        ("memory-tiny", 1.99, False),
        ("share-small-fp32", 0.6, True),
        ("share-small-bf16", None, None),
        ("slope-g", 1.25, True),
        ("slope-g", 0.7, False),
    ],
)
def test_what_meets_a_bar(name, ratio, verdict):
    assert table.met(ROWS[name], {"ratio": ratio}) is verdict


def test_the_table_shows_what_was_measured_and_what_was_not():
    step = {"ours": 0.5, "default": 1.0, "best": 0.8, "ratio": 1.6, "unit": "s"}
    slow = {**step, "default": None, "default_at_least": 61.2, "ratio": 1.2}
    share = {"ours": 90.0, "best": 120.0, "ratio": 0.75, "unit": "GFLOP/s"}
    floored = {**step, "floor": 0.32}
    sampled = {"ours": 900.0, "best": 600.0, "ratio": 1.5, "floor": 1200.0, "unit": "tok/s"}
    assert table.cells(ROWS["tiny-p16"], step)[1:] == ("0.5 s", "1 s", "0.8 s", "1.60x", "1.5x", "met", "")
    assert table.cells(ROWS["tiny-p16"], floored)[-1] == "0.32 s, 2.5x"
    assert table.cells(ROWS["generate-tiny-p16"], sampled)[4:] == ("1.50x", "1.3x", "met", "1,200 tok/s, 2.0x")
    assert table.cells(ROWS["tiny-p16"], slow)[2:7:2] == ("over 61.2 s", "1.20x", "missed")
    assert table.cells(ROWS["share-small-fp32"], share)[3:7] == ("120 GFLOP/s", "75%", "60%", "met")
    assert table.cells(ROWS["slope-p"], None)[4:7] == ("", "within 25%", "not measured")
    no_units = {"ratio": None, "unit": "", "note": "no units"}
    assert table.cells(ROWS["share-small-bf16"], no_units)[4:7] == ("", "45%", "no units")


def test_results_are_stored_whole_and_printed_as_markdown(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "speed")
    row = ROWS["tiny-p16"]
    raw = {"about": {"ours": {"versions": {"torch": "2.13.0"}}, "best": {"versions": {"trl": "1.16.0"}}}}
    found = {"ours": 0.5, "default": 1.0, "best": 0.8, "ratio": 1.6, "unit": "s", "raw": raw}
    speed.write(row, found, measure.Bench(tmp_path, tmp_path, pairs=2), commit="a" * 40, minutes=1.234, others=0.02)
    stored = speed.stored(ROWS)
    assert list(stored) == ["tiny-p16"]
    assert stored["tiny-p16"] | {"met": True, "minutes": 1.23, "pairs": 2, "raw": raw} == stored["tiny-p16"]
    lines = table.markdown([row, ROWS["small-p16"]], stored).splitlines()
    assert lines[2] == "| step, tiny P16 | 0.5 s | 1 s | 0.8 s | 1.60x | 1.5x | met |  |"
    assert lines[3].endswith("| not measured |  |")
    assert "commit aaaaaaaaaa, seed 0, 2 pairs" in lines[-1]
    assert "trl 1.16.0" in lines[-1]


@pytest.mark.parametrize(
    "once, alone, times",
    [
        (3.0, False, 5),
        (3.0, True, 2),
        (20.0, False, 0),
        (20.0, True, 0),
        (None, False, 0),
    ],
)
def test_a_slow_default_is_not_waited_for_often(once, alone, times):
    assert measure.default_times(once, 5, alone) == times


@pytest.mark.parametrize("rates, dtypes", [((1.0, 2.0), {"float32", "bfloat16"}), ((2.0, 1.0), {"float32"})])
def test_what_the_processor_does_slowly_is_not_tried(monkeypatch, tmp_path, rates, dtypes):
    asked = []

    class Scripted:
        def __init__(self, settings):
            self.rate = rates[settings["dtype"] == "bfloat16"]

        def ask(self, *, product):
            asked.append(product)
            return {"rate": self.rate}

        def close(self):
            pass

    monkeypatch.setattr(measure.Bench, "start", lambda self, system, case, settings: Scripted(settings))
    bench = measure.Bench(tmp_path, tmp_path)
    for _ in range(2):
        assert {one["dtype"] for one in measure.sensible(measure.TRL_SETTINGS, bench)} == dtypes
    assert len(asked) == 2, "it is asked once"


def test_a_trial_ends_where_it_cannot_win(monkeypatch, tmp_path):
    asked = []

    class Scripted:
        def __init__(self, warm, whole):
            self.warm, self.whole = warm, whole

        def ask(self, *, patience, step, short=None):
            asked.append((step, patience, short))
            seconds = self.warm if short else self.whole
            if patience is not None and seconds > patience:
                raise TooSlowError
            return {"seconds": seconds}

        def close(self):
            asked.append("closed")

    monkeypatch.setattr(measure.Bench, "start", lambda self, system, case, one: Scripted(*one["times"]))
    settings = [{"times": (99, 80)}, {"times": (2, 40)}, {"times": (91, 1)}, {"times": (1, 60)}, {"times": (1, 80)}]
    best, found = measure.best_of(measure.Bench(tmp_path, tmp_path), "trl", MICRO, settings, "step")
    assert best == settings[1]
    assert [trial["seconds"] for trial in found["trials"]] == [80, 40, None, 60, None]
    assert asked[:7] == [(0, None, 4), (1, None, None), "closed", (0, 170, 4), (1, 121, None), "closed", (0, 90, 4)]
    assert asked.count("closed") == 5


def test_short_runs_are_tried_three_times(tmp_path):
    class Scripted:
        times = iter((9, 4, 2, 3))

        def ask(self, **command):
            return {"seconds": next(self.times)}

        def close(self):
            assert next(self.times, None) is None

    assert measure.trial(Scripted(), "step", None) == 2


def test_a_worker_that_is_too_slow_is_ended(folder):
    ours = worker(folder, MICRO, sampling_only=True)
    try:
        assert ours.ask(patience=60, sample=0)["tokens"] == 24
        with pytest.raises(TooSlowError, match="had no answer"):
            ours.ask(patience=0.001, sample=1)
    finally:
        ours.close()


@pytest.mark.parametrize("alone, starts", [(True, 3), (False, 1)])
def test_workers_that_do_not_fit_together_make_room_and_go_on_where_they_come_first(
    monkeypatch, tmp_path, alone, starts
):
    living, most, began = set(), [], []

    class Scripted:
        def __init__(self, system):
            self.about = {}
            began.append(system)
            living.add(self)
            most.append(len(living))

        def ask(self, *, product=False, **step):
            return {"rate": 1.0} if product else {"seconds": 1.0, "sample": 0.5, "train": 0.5}

        def close(self):
            living.discard(self)

    monkeypatch.setattr(measure.Bench, "start", lambda self, system, case, settings: Scripted(system))
    monkeypatch.setattr(measure, "sensible", lambda settings, bench: settings)
    monkeypatch.setattr(measure, "best_of", lambda *arguments: ({}, {}))
    monkeypatch.setattr(measure, "default_once", lambda *arguments: None)
    row = replace(ROWS["tiny-p16"], alone=alone)
    found = measure.measure_steps(row, measure.Bench(tmp_path, tmp_path, pairs=5))
    assert (began.count("ours"), began.count("trl"), len(found["ratios"])) == (starts, starts, 5)
    assert max(most) == (1 if alone else 2)
    assert not living
