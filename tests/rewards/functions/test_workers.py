"""Functions of a file in their own process: loaded, called, killed, started anew, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from groupwise.errors import RewardError
from groupwise.rewards.base import Reward
from groupwise.rewards.functions.calls import MOST_COSTLY
from groupwise.rewards.functions.load import load_reward
from groupwise.rewards.functions.workers import Worker
from tests.rewards.groups import flat, group, listening

GROUPS = [group("a", "bb", row={"answer": "a"}, slot=0), group("ccc", "dddd", row={"answer": "c"}, slot=1)]

Load = Callable[..., Reward]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Write a reward file and load its `score`, or another name."""
    loaded: list[Reward] = []

    def make(source: str, name: str = "score", timeout: float = 20.0, output_timeout: float = 5.0) -> Reward:
        file = tmp_path / "rewards.py"
        file.write_text(textwrap.dedent(source))
        loaded.append(load_reward(f"{file}:{name}", timeout=timeout, output_timeout=output_timeout))
        return loaded[-1]

    yield make
    for reward in loaded:
        reward.close()


def gone(pid: int, within: float = 300.0) -> bool:
    """Whether a process ends within so many seconds, a zombie counting as ended."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_both_kinds_of_function_keep_the_order_of_the_outputs(load: Load) -> None:
    over_lists = load("def score(completions, answer): return [len(c) + (c == a) for c, a in zip(completions, answer)]")
    assert over_lists(GROUPS, listening()[0]) == [[2.0, 2.0], [3.0, 4.0]]
    plain = load("def score(prompt, completion): return float(len(prompt) * len(completion))")
    assert plain(GROUPS, listening()[0]) == [[4.0, 8.0], [12.0, 16.0]]


def test_async_helpers_and_state(load: Load) -> None:
    reward = load(
        """
        import asyncio
        calls = 0
        async def judge(completions, trainer_state, log_metric, log_extra):
            global calls
            calls += 1
            await asyncio.sleep(0.001)
            log_metric("calls", calls)
            log_extra("half", [len(text) / 2 for text in completions])
            return [trainer_state.global_step + trainer_state.max_steps] * len(completions)
    """,
        name="judge",
    )
    assert reward.name == "judge"
    for call in (1.0, 2.0):  # the module's globals live on from step to step
        context, _ = listening(step=3, total_steps=10)
        assert flat(reward(GROUPS, context)) == [13.0] * 4
        assert context.metrics["calls"] == call
        assert context.extras == {"half": [0.5, 1.0, 1.5, 2.0]}


def test_a_worker_holds_neither_torch_nor_this_package(load: Load) -> None:
    reward = load("""
        import sys
        def score(completions): return [float("torch" in sys.modules or "groupwise" in sys.modules)] * len(completions)
    """)
    assert flat(reward(GROUPS, listening()[0])) == [0.0] * 4


def test_a_file_finds_its_neighbours(load: Load, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 0.25\n")
    reward = load("from neighbour import VALUE\ndef score(completions): return [VALUE] * len(completions)")
    assert flat(reward(GROUPS, listening()[0])) == [0.25] * 4


def test_a_module_is_found_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "judges.py").write_text("def score(completions): return [0.5] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    reward = load_reward("pack.judges:score")
    assert flat(reward(GROUPS, listening()[0])) == [0.5] * 4
    reward.close()


@pytest.mark.parametrize(
    "source, name, message",
    [
        ("x = 1\n\ndef score(:", "score", r"does not import: \S+rewards\.py, line 3: SyntaxError: .+: `def score\(:`$"),
        ("\nimport nowhere_at_all", "score", "line 2: ModuleNotFoundError: No module named 'nowhere_at_all'$"),
        ("raise SystemExit(3)", "score", "does not import: .+, line 1: SystemExit: 3$"),
        ("def f():\n    return {}['a']\n\nf()", "score", "does not import: .+, line 2: KeyError: 'a'$"),
        ("import json\n\njson.loads('{')", "score", r"rewards\.py, line 3: JSONDecodeError: Expecting"),
        ("raise ValueError('one\\n\\ntwo')", "score", "line 1: ValueError: one two$"),
        ("raise ValueError", "score", "line 1: ValueError$"),
        ("def score(completions): ...", "scor", "has no `scor`; did you mean `score`"),
        ("", "score", "has no `score`; it has no function at all"),
        ("score = 3", "score", "`score` in .* is of type int, not a function"),
        ("class score: ...", "score", "is a class, not a function"),
        (
            "import os; print('bye'); os._exit(7)",
            "score",
            "(?s)ended while it was imported: it ended with status 7.*bye",
        ),
    ],
)
def test_a_file_that_cannot_be_loaded_is_an_error_before_any_call(
    load: Load, source: str, name: str, message: str
) -> None:
    with pytest.raises(RewardError, match=message) as error:
        load(source, name)
    assert f"rewards.py:{name}` cannot be loaded" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_broken_file_that_the_reward_imports_is_the_one_that_is_named(load: Load, tmp_path: Path) -> None:
    (tmp_path / "broken_helper.py").write_text("x = (\n")
    with pytest.raises(RewardError, match=r"import: \S+broken_helper\.py, line 1: SyntaxError: '\(' was never"):
        load("import broken_helper")


def test_a_failure_inside_a_call_shows_the_users_frames(load: Load) -> None:
    context, warnings = listening()
    load("def score(completions):\n    return check(completions)\n\ndef check(c):\n    return 1 / 0")(GROUPS, context)
    said = "\n".join(warnings)
    assert "Traceback" in said
    assert said.index("line 2, in score") < said.index("line 5, in check") < said.index("ZeroDivisionError")
    assert "calling.py" not in said


def test_a_file_that_does_not_exist_or_never_imports(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="there is no file"):
        load_reward(f"{tmp_path}/none.py:score")
    with pytest.raises(RewardError, match="`nowhere_at_all` does not import: ModuleNotFoundError"):
        load_reward("nowhere_at_all:score")
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    with pytest.raises(RewardError, match=r"not imported after 0\.2 s"):
        Worker(f"{tmp_path}/slow.py:score", start_timeout=0.2)


def test_the_time_to_import_does_not_count(load: Load) -> None:
    reward = load(
        """
        import time
        time.sleep(3.0)
        def score(completions): return [1.0] * len(completions)
    """,
        timeout=2.5,
    )
    context, told = listening()
    assert flat(reward(GROUPS, context)) == [1.0] * 4
    assert told == []


@pytest.mark.parametrize(
    "result, message",
    [
        ("[1.0]", "`score` returned 1 values for 4 outputs"),
        ("[1.0, '1', 1.0, 1.0]", "(?s)'1', which is of type str.*prompt row-0: '2.2='.output 2 of 2: 'bb'"),
        ("[1.0, 1.0, float('nan'), 1.0]", "(?s)nan, which is not finite.*output 1 of 2: 'ccc'"),
        ("None", "returned NoneType None"),
    ],
)
def test_unusable_values_stop_the_run(load: Load, result: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load(f"def score(completions): return {result}")(GROUPS, listening()[0])


def test_none_and_zero_are_told_apart(load: Load) -> None:
    context, told = listening()
    assert load("def score(completions): return [0, None, 0.0, False]")(GROUPS, context) == [[0.0, None], [0.0, 0.0]]
    assert context.metrics["rewards/score/failed"] == 0.0
    assert told == []


@pytest.mark.parametrize(
    "fault, told_as",
    [
        ("raise ValueError('no digits')", "ValueError: no digits"),
        ("os._exit(3)", "it ended with status 3"),
        ("print('out of memory', flush=True); os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL\nout of memory"),
    ],
)
def test_an_output_that_fails_costs_only_itself(load: Load, fault: str, told_as: str) -> None:
    reward = load(f"""
        import os, signal
        def score(completions):
            for text in completions:
                if text == "bb":
                    {fault}
            return [float(len(text)) for text in completions]
    """)
    context, told = listening()
    assert reward(GROUPS, context) == [[1.0, None], [3.0, 4.0]]
    assert context.metrics == {
        "rewards/score/failed": 1.0,
        "rewards/score/timeouts": 0.0,
        "rewards/score/worker_restarts": 0.0 if "raise" in fault else 2.0,
    }
    assert len(told) == 1
    for part in ("`score`", "output 2 of 2: 'bb'", told_as):
        assert part in told[0]


def test_an_output_that_hangs_is_killed_and_counted(load: Load) -> None:
    reward = load(
        """
        import re
        def score(completions):
            for text in completions:
                if text == "bb":
                    re.match(r"(a+)+$", "a" * 50 + "b")  # holds the interpreter's lock for years
            return [float(len(text)) for text in completions]
    """,
        timeout=3.0,
        output_timeout=3.0,
    )
    context, told = listening()
    assert reward(GROUPS, context) == [[1.0, None], [3.0, 4.0]]
    assert context.metrics == {
        "rewards/score/failed": 1.0,
        "rewards/score/timeouts": 2.0,
        "rewards/score/worker_restarts": 2.0,
    }
    assert len(told) == 1
    assert "it took longer than 3 s" in told[0]
    assert reward(GROUPS[1:], listening()[0]) == [[3.0, 4.0]]


def test_children_of_a_killed_worker_die_with_it(load: Load, tmp_path: Path) -> None:
    reward = load(
        f"""
        import pathlib, subprocess, time
        def score(completions):
            child = subprocess.Popen(["sleep", "60"])
            pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
            time.sleep(60)
    """,
        timeout=5.0,
        output_timeout=0.05,
    )
    assert reward([group("a")], listening()[0]) == [[None]]
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_large_payload_goes_both_ways(load: Load) -> None:
    reward = load("""
        def score(completions, log_extra):
            log_extra("copy", completions)
            return [float(len(text)) for text in completions]
    """)
    context, _ = listening()
    assert reward([group("x" * 5_000_000, "y" * 3_000_000)], context) == [[5e6, 3e6]]
    assert context.extras["copy"][1] == "y" * 3_000_000


def test_prints_and_input_stay_away_from_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rewards.py").write_text(
        "import sys\n"
        "def score(completions):\n"
        "    print('hello'); print('oh', file=sys.stderr)\n"
        "    return [float(sys.stdin.read() == '')] * len(completions)\n"
    )
    reward = load_reward(f"{tmp_path}/rewards.py:score", log=tmp_path / "rewards.log")
    assert flat(reward(GROUPS, listening()[0])) == [1.0] * 4
    reward.close()
    assert (tmp_path / "rewards.log").read_text() == "hello\noh\n"
    assert capfd.readouterr() == ("", "")


def test_the_log_is_bounded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.rewards.functions.workers.LOG_MAX_BYTES", 1000)
    worker = Worker(_file(load), log=None)
    request = {"columns": {"completions": ["a"]}, "count": 1, "state": {"global_step": 0, "max_steps": 1}}
    sizes = []
    for _ in range(6):
        worker.call(request, 10.0)
        sizes.append(os.fstat(worker._log.fileno()).st_size)
    worker.close()
    assert sizes == [601, 1202, 601, 1202, 601, 1202]


def _file(load: Load) -> str:
    reward = load("def score(completions):\n    print('x' * 600)\n    return [1.0] * len(completions)")
    return reward._runner._spec  # type: ignore[attr-defined, no-any-return]


def test_closing_leaves_no_process_and_can_be_repeated(load: Load) -> None:
    before = {child.pid for child in psutil.Process().children()}
    reward = load("def score(completions): return [1.0] * len(completions)")
    started = {child.pid for child in psutil.Process().children()} - before
    assert len(started) == 1
    reward.close()
    reward.close()
    assert not {child.pid for child in psutil.Process().children()} & started  # not even a zombie


def test_a_worker_that_died_between_steps_is_replaced(load: Load) -> None:
    reward = load("import os\ndef score(completions): return [float(os.getpid())] * len(completions)")
    pid = reward([group("a")], listening()[0])[0][0]
    assert pid is not None
    os.kill(int(pid), signal.SIGKILL)
    # A process shows as a zombie before its last thread has ended, and only then can its end be seen.
    os.waitid(os.P_PID, int(pid), os.WEXITED | os.WNOWAIT)
    context, told = listening()
    assert reward([group("a")], context)[0][0] not in (pid, None)
    assert context.metrics["rewards/score/worker_restarts"] == 1.0
    assert told == []


def test_an_interrupted_call_does_not_answer_the_next(load: Load) -> None:
    reward = load("""
        import time
        def score(completions):
            time.sleep(0.5 if "a" in completions else 0.0)
            return [float(len(text)) for text in completions]
    """)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def call() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        reward([group("a")], listening()[0])

    previous = signal.signal(signal.SIGALRM, interrupt)
    with pytest.raises(KeyboardInterrupt):
        call()
    signal.signal(signal.SIGALRM, previous)
    assert reward([group("dddd")], listening()[0]) == [[4.0]]


@pytest.mark.parametrize("busy", ["idle", "in a call"])
def test_a_worker_dies_with_its_parent(tmp_path: Path, busy: str) -> None:
    (tmp_path / "rewards.py").write_text(
        "import os, pathlib, re\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "def score(completions):\n"
        f"    pathlib.Path({str(tmp_path / 'called')!r}).touch()\n"
        "    return [bool(re.match(r'(a+)+$', 'a' * 50 + 'b'))]\n"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from groupwise.rewards.functions.workers import Worker\n"
            "worker = Worker(sys.argv[1])\n"
            "state = {'global_step': 0, 'max_steps': 1}\n"
            "print('ready', flush=True)\n"
            "if sys.argv[2] == 'idle': time.sleep(60)\n"
            "worker.call({'columns': {'completions': ['a']}, 'count': 1, 'state': state}, 60.0)\n",
            f"{tmp_path}/rewards.py:score",
            busy,
        ],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == b"ready\n"
    worker = int((tmp_path / "pid").read_text())
    while busy != "idle" and not (tmp_path / "called").exists():
        time.sleep(0.01)
    assert not gone(worker, within=0.1)
    parent.kill()
    parent.wait()
    left_behind = not gone(worker)
    if left_behind:
        os.kill(worker, signal.SIGKILL)
    assert not left_behind


def test_data_that_cannot_be_sent_is_named(load: Load) -> None:
    reward = load("def score(completions, answer): return [1.0] * len(completions)")
    with pytest.raises(RewardError, match="the data cannot be sent to the worker"):
        reward([group("a", row={"answer": lambda: 0})], listening()[0])


def test_a_child_that_the_function_forks_and_that_returns_does_not_answer(load: Load) -> None:
    reward = load("""
        import os
        calls = 0
        def score(completions):
            global calls
            calls += 1
            if calls == 1 and os.fork() == 0 and len(completions) == 3:
                raise ValueError("in the child")
            return [float(len(text)) for text in completions]
    """)
    for texts in (["a", "bb"], ["ccc"], ["dddd", "eeeee"], ["f"]):
        assert flat(reward([group(*texts)], listening()[0])) == [float(len(text)) for text in texts]


@pytest.mark.parametrize("forged", ["'number': 7, 'process': os.getpid()", "'number': 1, 'process': os.getpid() + 1"])
def test_a_reply_to_another_request_or_of_another_process_is_an_error(load: Load, forged: str) -> None:
    """Whatever finds the socket, under any descriptor, must not be taken for the function."""
    reward = load(f"""
        import os, pickle, socket, stat
        def score(completions):
            data = pickle.dumps({{{forged}, 'values': [9.0], 'failures': {{}}, 'metrics': {{}}, 'extras': {{}}}})
            for number in range(3, 40):
                try:
                    if stat.S_ISSOCK(os.fstat(number).st_mode):
                        os.write(number, len(data).to_bytes(8, "little") + data)
                except OSError:
                    pass
            return [1.0]
    """)
    with pytest.raises(RewardError, match=r"request 1 to process \d+ got the reply to request \d of process \d+"):
        reward([group("a")], listening()[0])


def test_a_function_that_always_hangs_costs_one_batch_and_a_bounded_number_of_tries(load: Load, tmp_path: Path) -> None:
    reward = load(
        f"""
        import time
        def score(completions):
            with open({str(tmp_path / "calls")!r}, "a") as file:
                file.write(f"{{len(completions)}}\\n")
            time.sleep(60)
    """,
        timeout=0.3,
        output_timeout=0.05,
    )
    groups = [group(*"abcdefgh", slot=slot) for slot in range(4)]
    for _ in range(3):
        context, _ = listening()
        assert flat(reward(groups, context)) == [None] * 32
        assert context.metrics["rewards/score/failed"] == 32.0
    calls = (tmp_path / "calls").read_text().split() if (tmp_path / "calls").exists() else []
    assert len(calls) <= 1 + MOST_COSTLY + 2
    assert calls.count("32") <= 1
    assert context.metrics["rewards/score/timeouts"] == 1.0, "one more try in each later step"
    assert "it took longer than 0.05 s" in context.faults[-1] or "was not tried" in context.faults[-1]


def test_a_function_that_ends_its_process_every_time_is_not_restarted_for_every_output(load: Load) -> None:
    reward = load("import os\ndef score(completions): os._exit(3)")
    groups = [group(*"abcdefgh", slot=slot) for slot in range(4)]
    restarts = []
    for _ in range(3):
        context, _ = listening()
        assert flat(reward(groups, context)) == [None] * 32
        restarts.append(context.metrics["rewards/score/worker_restarts"])
    assert restarts == [1.0 + MOST_COSTLY, 2.0, 2.0]


def test_after_a_step_of_single_calls_that_do_not_hang_comes_one_of_all_together(load: Load, tmp_path: Path) -> None:
    reward = load(
        f"""
        import pathlib, time
        def score(completions):
            with open({str(tmp_path / "calls")!r}, "a") as file:
                file.write(f"{{len(completions)}}\\n")
            if "bad" in completions:
                time.sleep(60)
            return [float(len(text)) for text in completions]
    """,
        timeout=4.0,
        output_timeout=4.0,
    )
    found = [flat(reward([group(*texts)], listening()[0])) for texts in (["bad", "bb"], ["a", "bb"], ["a", "bb"])]
    assert found == [[None, 2.0], [1.0, 2.0], [1.0, 2.0]]
    assert (tmp_path / "calls").read_text().split()[-3:] == ["1", "1", "2"]


def test_what_says_why_comes_before_what_was_not_tried(load: Load) -> None:
    """The first failure is what a run ends with: of many, one that was really seen."""
    reward = load(
        """
        import os

        def score(completions):
            os._exit(3)
        """
    )
    context, _ = listening()
    reward([group(*"abcdefgh")], context)
    assert len(context.faults) == 8
    assert "status 3" in context.faults[0]
    assert "was not tried" in context.faults[-1]
