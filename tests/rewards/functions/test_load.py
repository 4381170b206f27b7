"""Callables given from Python: what they are handed, what they report, and what happens when they fail."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from groupwise.errors import RewardError, Stopped
from groupwise.rewards.base import Reward, RewardContext, Values
from groupwise.rewards.functions.load import FunctionReward, load_reward
from groupwise.types import Group
from tests.rewards.groups import flat, group, listening

GROUPS = [
    group("a", "bb", prompt="first", row={"answer": "a", "level": 1}, slot=0),
    group("ccc", "", prompt="second", row={"answer": "c", "level": 2}, slot=1),
]
CHAT = [{"role": "user", "content": "hello"}]

Load = Callable[..., Reward]


@pytest.fixture
def load() -> Iterator[Load]:
    loaded: list[Reward] = []

    def make(function: Any, timeout: float = 20.0, output_timeout: float = 5.0) -> Reward:
        loaded.append(load_reward(function, timeout=timeout, output_timeout=output_timeout))
        return loaded[-1]

    yield make
    for reward in loaded:
        reward.close()


def test_a_function_over_lists_gets_every_column_by_keyword(load: Load) -> None:
    seen: dict[str, Any] = {}

    def score(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [1.0, 2.0, 3.0, 4.0]

    reward = load(score)
    context = RewardContext(3, 10, epoch=1.5, epochs=5)
    assert reward(GROUPS, context) == [[1.0, 2.0], [3.0, 4.0]]
    assert reward.name == "score"
    state = seen.pop("trainer_state")
    assert (state.global_step, state.max_steps, state.epoch) == (3, 10, 1.5)
    assert (state.num_train_epochs, state.is_world_process_zero, state.is_local_process_zero) == (5, True, True)
    assert getattr(state, "log_history", None) is None
    with pytest.raises(AttributeError, match=r"has no `log_history` here; it has epoch, global_step, is_"):
        state.log_history  # noqa: B018 - reading it is the test
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["first", "first", "second", "second"],
        "completions": ["a", "bb", "ccc", ""],
        "completion_ids": [[97], [98, 98], [99, 99, 99], []],
        "answer": ["a", "a", "c", "c"],
        "level": [1, 1, 2, 2],
    }


def test_a_function_without_kwargs_gets_only_what_it_names(load: Load) -> None:
    def right(completions: list[str], answer: list[str], bonus: float = 0.5) -> list[float]:
        return [float(text == wanted) + bonus for text, wanted in zip(completions, answer, strict=True)]

    assert load(right)(GROUPS, listening()[0]) == [[1.5, 0.5], [0.5, 0.5]]


def test_a_missing_column_is_named_with_those_there_are(load: Load) -> None:
    with pytest.raises(RewardError, match=r"needs a column `answr`, but the data set has answer, level; .*`answer`"):
        load(lambda completions, answr: [])(GROUPS, listening()[0])


def test_a_row_without_a_column_that_others_have_gives_none(load: Load) -> None:
    groups = [group("a", row={"answer": "a"}), group("b", slot=1)]
    reward = load(lambda completions, answer: [float(entry is None) for entry in answer])
    assert reward(groups, listening()[0]) == [[0.0], [1.0]]


def test_conversations_are_given_as_messages(load: Load) -> None:
    seen: list[Any] = []

    def score(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.append((prompts, completions))
        return [1.0, 1.0]

    load(score)([group("hi", "oh", prompt=CHAT)], listening()[0])
    answers = [[{"role": "assistant", "content": "hi"}], [{"role": "assistant", "content": "oh"}]]
    assert seen == [([CHAT, CHAT], answers)]


def test_a_function_that_appends_to_a_conversation_changes_nothing_for_others(load: Load) -> None:
    def score(prompts: list[list[Any]], completions: list[Any]) -> list[float]:
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt += completion
        return [float(len(prompt)) for prompt in prompts]

    groups = [group("hi", "oh", prompt=[dict(CHAT[0])])]
    assert load(score)(groups, listening()[0]) == [[2.0, 2.0]]
    assert groups[0].prompt.content == CHAT


def test_plain_functions_are_called_per_output(load: Load) -> None:
    by_position = load(lambda question, reply: float(len(question) + len(reply)))
    by_name = load(lambda completion, answer: float(completion == answer))
    assert by_position(GROUPS, listening()[0]) == [[6.0, 7.0], [9.0, 6.0]]
    assert by_name(GROUPS, listening()[0]) == [[1.0, 0.0], [0.0, 0.0]]


def test_a_plain_function_gets_the_text_of_a_conversation(load: Load) -> None:
    reward = load(lambda prompt, completion: float(completion == "hi" and prompt == CHAT))
    assert reward([group("hi", prompt=CHAT)], listening()[0]) == [[1.0]]


def test_a_positional_name_that_is_also_a_column_is_ambiguous(load: Load) -> None:
    with pytest.raises(RewardError, match="`answer` is a column of the data set"):
        load(lambda question, answer: 1.0)(GROUPS, listening()[0])


def test_async_functions_of_both_kinds(load: Load) -> None:
    async def together(completions: list[str]) -> list[float]:
        await asyncio.sleep(0.001)
        return [float(len(text)) for text in completions]

    arrived = 0

    async def each(prompt: str, completion: str) -> float:
        nonlocal arrived
        arrived += 1
        while arrived < 4:  # none finishes before all have started: they run at the same time
            await asyncio.sleep(0.001)
        return float(len(completion))

    assert load(together)(GROUPS, listening()[0]) == [[1.0, 2.0], [3.0, 0.0]]
    assert load(each, timeout=60.0)(GROUPS, listening()[0]) == [[1.0, 2.0], [3.0, 0.0]]


def test_an_async_function_keeps_its_event_loop(load: Load) -> None:
    loops = set()

    async def score(completions: list[str]) -> list[float]:
        loops.add(id(asyncio.get_running_loop()))
        return [0.0] * len(completions)

    reward = load(score)
    for _ in range(3):
        reward(GROUPS, listening()[0])
    assert len(loops) == 1


def test_logged_metrics_and_extras_reach_the_context(load: Load) -> None:
    def score(completions: list[str], log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("length/short", 1)
        log_metric("length/short", 2)
        log_extra("first", [text[:1] for text in completions])
        return [0.0] * len(completions)

    context, _ = listening()
    load(score)(GROUPS, context)
    assert context.metrics["length/short"] == 1.5
    assert context.extras == {"first": ["a", "b", "c", ""]}


def test_extras_of_the_wrong_length_are_refused(load: Load) -> None:
    def score(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("first", ["a"])
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"returned 1 entries through log_extra\('first'\) for 4 outputs"):
        load(score)(GROUPS, listening()[0])


@pytest.mark.parametrize(
    "result, message",
    [
        ([1.0, 2.0, 3.0], "returned 3 values for 4 outputs"),
        ([1.0, "2", 3.0, 4.0], "'2', which is of type str"),
        ([1.0, float("nan"), 3.0, 4.0], "nan, which is not finite"),
        (0.5, "returned float 0.5; it must return a list of 4 numbers"),
        (None, "returned NoneType None"),
    ],
)
def test_unusable_values_stop_the_run(load: Load, result: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load(lambda completions: result)(GROUPS, listening()[0])


def test_none_is_not_scored_and_zero_is_scored(load: Load) -> None:
    context, told = listening()
    assert load(lambda completions: [0.0, None, 0, False])(GROUPS, context) == [[0.0, None], [0.0, 0.0]]
    assert context.metrics["rewards/lambda/failed"] == 0.0
    assert told == []


def test_after_an_exception_each_output_is_tried_alone(load: Load) -> None:
    calls: list[list[str]] = []

    def fragile(completions: list[str], answer: list[str], log_extra: Any) -> list[float]:
        calls.append(completions)
        values = [1.0 / len(text.strip("a")) for text in completions]
        log_extra("answer", answer)
        return values

    context, told = listening()
    assert load(fragile)(GROUPS, context) == [[None, 0.5], [pytest.approx(1 / 3), None]]
    assert calls == [["a", "bb", "ccc", ""], ["a"], ["bb"], ["ccc"], [""]]
    assert context.metrics["rewards/fragile/failed"] == 2.0
    assert context.extras == {"answer": [None, "a", "c", None]}
    assert len(told) == 1
    for part in ("`fragile`", "prompt row-0: 'first'", "output 1 of 2: 'a'", 'text.strip("a")', "ZeroDivisionError"):
        assert part in told[0]


def test_the_traceback_is_shown_once(load: Load) -> None:
    context, told = listening()
    reward = load(lambda prompt, completion: 1.0 / len(completion))
    for _ in range(2):
        assert flat(reward(GROUPS, context))[-1] is None
    assert len(told) == 1


def test_a_failure_of_one_output_costs_a_plain_function_no_second_call(load: Load) -> None:
    calls: list[str] = []

    async def score(prompt: str, completion: str) -> float:
        calls.append(completion)
        return 1.0 / len(completion)

    assert flat(load(score)(GROUPS, listening()[0]))[-1] is None
    assert calls == ["a", "bb", "ccc", ""]


def test_a_function_that_needs_the_whole_batch_is_reported(load: Load) -> None:
    failing = iter([True])

    def score(completions: list[str]) -> list[float]:
        if next(failing, False):
            raise OSError("the judge is away")
        return [1.0]

    context, told = listening()
    assert load(score)(GROUPS, context) == [[1.0, 1.0], [1.0, 1.0]]
    assert "on 4 outputs together, yet on none of them alone" in told[0]
    assert "the judge is away" in told[0]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("exception", [SystemExit, GeneratorExit, asyncio.CancelledError])
def test_a_function_cannot_end_the_run(load: Load, exception: type[BaseException], asynchronous: bool) -> None:
    def score(completions: list[str]) -> list[float]:
        raise exception

    async def later(completions: list[str]) -> list[float]:
        return score(completions)

    context, _ = listening()
    assert flat(load(later if asynchronous else score)(GROUPS, context)) == [None] * 4
    assert context.metrics[f"rewards/{'later' if asynchronous else 'score'}/failed"] == 4.0


@pytest.mark.parametrize("ends", [KeyboardInterrupt, Stopped])
def test_what_a_signal_raises_is_no_answer_of_the_function(load: Load, ends: type[BaseException]) -> None:
    def interrupt(*_: object) -> None:
        raise ends

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(ends):
            load(lambda completions: [signal.raise_signal(signal.SIGALRM)])(GROUPS, listening()[0])
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_a_function_runs_in_the_main_thread_where_it_may_set_an_alarm(load: Load) -> None:
    def score(completions: list[str]) -> list[float]:
        def over(*_: object) -> None:
            raise TimeoutError

        previous = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            while True:
                pass
        except TimeoutError:
            return [1.0 if threading.current_thread() is threading.main_thread() else 0.0] * len(completions)
        finally:
            signal.signal(signal.SIGALRM, previous)

    context, told = listening()
    assert flat(load(score)(GROUPS, context)) == [1.0] * 4
    assert told == []


def test_a_sync_function_over_its_limit_is_told_of_with_its_stack_and_waited_for(load: Load) -> None:
    said = threading.Event()

    def score(completions: list[str]) -> list[float]:
        assert said.wait(60), "the warning comes while it hangs"
        return [1.0] * len(completions)

    context, told = listening()
    context.warn = lambda message: (told.append(message), said.set())  # type: ignore[func-returns-value, assignment]
    reward = load(score, timeout=0.1)
    assert flat(reward(GROUPS, context)) == [1.0] * 4
    assert context.metrics["rewards/score/failed"] == 0.0
    assert context.metrics["rewards/score/timeouts"] == 1.0
    for part in ("`score` has taken more than 0.1 s on 4 outputs", "in score", "said.wait(60)", "`file.py:name`"):
        assert part in told[0]
    assert "calling.py" not in told[0]
    assert flat(reward(GROUPS, context)) == [1.0] * 4
    assert len(told) == 1


def test_async_functions_run_while_a_loop_runs_in_the_calling_thread(load: Load) -> None:
    async def score(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook() -> Values:
        return load(score)(GROUPS, listening()[0])

    assert flat(asyncio.run(notebook())) == [1.0] * 4


def test_the_child_of_a_function_that_forks_never_comes_back(load: Load, tmp_path: Path) -> None:
    here = os.getpid()

    def score(completions: list[str]) -> list[float]:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        return [1.0] * len(completions)

    reward = load(score)
    assert flat(reward(GROUPS, listening()[0])) == [1.0] * 4
    with (tmp_path / "came back").open("a") as file:
        file.write(f"{os.getpid()}\n")
    assert (tmp_path / "came back").read_text() == f"{here}\n"


def test_an_async_function_that_hangs_is_cancelled(load: Load) -> None:
    cancelled: list[str] = []

    async def score(prompt: str, completion: str) -> float:
        try:
            await asyncio.sleep(3600 if completion == "bb" else 0)
        except asyncio.CancelledError:
            cancelled.append(completion)
            raise
        return 1.0

    context, _ = listening()
    assert load(score, timeout=3.0, output_timeout=3.0)(GROUPS, context) == [[1.0, None], [1.0, 1.0]]
    assert cancelled == ["bb", "bb"]
    assert context.metrics["rewards/score/timeouts"] == 2.0


def test_an_async_function_that_blocks_its_loop_gets_a_new_one(load: Load) -> None:
    free = threading.Event()

    async def score(prompt: str, completion: str) -> float:
        if completion == "bb":
            free.wait(3600)
        return 1.0

    reward = load(score, timeout=2.0, output_timeout=2.0)
    assert reward(GROUPS[:1], listening()[0]) == [[1.0, None]]
    assert reward(GROUPS[1:], listening()[0]) == [[1.0, 1.0]]
    free.set()


def test_why_outputs_have_no_value_is_in_the_context_every_time(load: Load) -> None:
    def score(prompt: str, completion: str) -> float:
        raise OSError("no judge")

    reward = load(score)
    for _ in range(2):
        context, _ = listening()
        reward(GROUPS, context)
        assert len(context.faults) == 4
        assert "output 1 of 2: 'a'" in context.faults[0]
        assert "OSError: no judge" in context.faults[0]


def test_no_outputs_need_no_call(load: Load) -> None:
    assert load(lambda completions: pytest.fail("called"))([group()], listening()[0]) == [[]]


def test_builtin_and_unknown_builtin(load: Load) -> None:
    reward = load("builtin:arithmetic")
    assert reward.name == "arithmetic"
    assert reward([group("1+2=3\n3", "4", row={"answer": "3"})], listening()[0]) == [[1.0, 0.0]]
    with pytest.raises(RewardError, match="the nearest is `builtin:arithmetic`"):
        load_reward("builtin:arithmetics")


def test_a_reward_is_returned_as_it_is() -> None:
    class Mine:
        name = "mine"

        def __call__(self, groups: Any, context: RewardContext) -> Values:
            return [[1.0] * len(group.completions) for group in groups]

        def close(self) -> None: ...

    mine: Reward = Mine()
    assert load_reward(mine) is mine


def test_what_is_called_as_a_reward_and_is_none_is_refused() -> None:
    class Mine:
        name = "mine"

        def __call__(self, groups: Any, context: RewardContext) -> Values:
            return [[1.0] * len(group.completions) for group in groups]

    with pytest.raises(RewardError, match=r"called with \(groups, context\), as a Reward is, and lacks `close`"):
        load_reward(Mine())


def test_a_callable_without_a_signature_is_refused() -> None:
    class Odd:
        __signature__ = "none"

        def __call__(self) -> None: ...

    with pytest.raises(RewardError, match="wrap it in a `def`"):
        load_reward(Odd())


def test_prompts_of_a_group_may_be_empty(load: Load) -> None:
    groups: list[Group] = [group("x", prompt=[])]
    with pytest.raises(RewardError, match="nan"):
        load(lambda prompt, completion: float("nan"))(groups, listening()[0])


def test_limits_are_kept_by_the_reward() -> None:
    reward = load_reward(lambda completions: [], timeout=3, output_timeout=1)
    assert isinstance(reward, FunctionReward)
    assert not reward.own_process
    reward.close()
    reward.close()
