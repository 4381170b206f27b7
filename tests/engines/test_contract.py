"""What every engine promises, held for each of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from groupwise.cpu.cores import threads
from groupwise.engines import processes
from groupwise.engines.base import Engine, InFlight, finished
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.processes import PooledEngine
from groupwise.engines.scripted import ScriptedEngine
from groupwise.tokenizer.codec import Codec
from groupwise.types import Request, Sampled, Sampling
from tests.engines.policies import CODEC, PROMPTS, generate, make_policy, requests, tokens
from tests.tiny_tokenizers import byte_level

TEXTS = ["yes.", "no", "perhaps not today", ""]


@pytest.fixture(params=["shared", "plain", "pooled", "scripted"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made: Engine
    if request.param == "scripted":
        made = ScriptedEngine({PROMPTS[0]: TEXTS, **{f"r{i}": TEXTS[i:] for i in (1, 2, 3)}}, CODEC)
    elif request.param == "pooled":
        monkeypatch.setattr(processes, "ROWS", 1)
        made = PooledEngine(NativeEngine(make_policy(), CODEC, max_live=4), least_tokens=0)
    else:
        made = NativeEngine(make_policy(layout=request.param), CODEC, max_live=4)
    with threads(2 if request.param == "pooled" else torch.get_num_threads()):
        yield made
    made.close()


def test_each_request_gets_its_completions_once(engine: Engine) -> None:
    asked = requests(n=3)
    for request in asked:
        engine.submit(request)
    seen = Counter((sampled.uid, sampled.output) for sampled in finished(engine))
    assert seen == Counter((request.uid, index) for request in asked for index in range(3))


def test_generate_gives_them_in_order(engine: Engine) -> None:
    groups = generate(engine, requests(n=3))
    assert [len(group) for group in groups] == [3] * 4
    again = {f"r{i}": group for i, group in enumerate(groups)}
    for request in reversed(requests(n=3)):
        engine.submit(request)
    for uid, index, completion in finished(engine):
        assert completion.token_ids == again[uid][index].token_ids


def test_a_completion_is_whole(engine: Engine) -> None:
    end = next(iter(CODEC.end_token_ids))
    finishes = set()
    for completion in [c for group in generate(engine, requests(n=4, max_tokens=9)) for c in group]:
        assert 1 <= len(completion.token_ids) <= 9
        assert len(completion.sampled_logprobs) == len(completion.token_ids)
        assert all(math.isfinite(logprob) and logprob <= 0 for logprob in completion.sampled_logprobs)
        assert completion.text == CODEC.decode(completion.token_ids)
        assert sum(count for _, count in completion.policy_versions) == len(completion.token_ids)
        assert end not in completion.token_ids[:-1]
        assert (completion.finish == "stop") == (completion.token_ids[-1] == end)
        assert completion.finish == "stop" or len(completion.token_ids) == 9
        finishes.add(completion.finish)
    assert finishes == {"stop", "length"}


def test_nothing_in_flight_is_nothing_completed(engine: Engine) -> None:
    assert list(finished(engine)) == []
    assert generate(engine, []) == []


def test_a_uid_is_free_again_when_its_request_is_done(engine: Engine) -> None:
    first = requests()[0]
    engine.submit(first)
    with pytest.raises(AssertionError, match="in flight"):
        engine.submit(first)
    assert len(list(finished(engine))) == 3
    engine.submit(first)
    assert len(list(finished(engine))) == 3


def test_a_request_may_come_while_others_are_under_way(engine: Engine) -> None:
    first, second, *_ = requests(n=3)
    engine.submit(first)
    seen = []
    for number, sampled in enumerate(finished(engine)):
        seen.append(sampled.uid)
        if number == 1:
            engine.submit(second)
    assert Counter(seen) == {"r0": 3, "r1": 3}


def test_a_cancelled_request_is_heard_of_no_more(engine: Engine) -> None:
    for request in requests(n=3):
        engine.submit(request)
    engine.cancel("nobody")
    assert engine.poll()
    engine.cancel("r0")
    engine.cancel("r2")
    assert {sampled.uid for sampled in finished(engine)} <= {"r1", "r3"}
    assert engine.poll() == []
    engine.submit(requests()[0])
    assert {sampled.uid for sampled in finished(engine)} == {"r0"}


def test_cancelling_everything_leaves_nothing_in_flight(engine: Engine) -> None:
    for request in requests():
        engine.submit(request)
    assert engine.poll()
    for uid in ("r0", "r1", "r2", "r3"):
        engine.cancel(uid)
    assert engine.poll() == []


def test_who_asks_now_and_then_misses_nothing(engine: Engine) -> None:
    for request in requests(n=3):
        engine.submit(request)
    seen: list[Sampled] = []
    while len(seen) < 12:  # without waiting, an engine of this thread goes on by a step
        seen += engine.poll(timeout=0.0)
    assert engine.poll() == []
    assert {(s.uid, s.output): s.completion.token_ids for s in seen} == {
        (f"r{i}", j): c.token_ids
        for i, group in enumerate(generate(engine, requests(n=3)))
        for j, c in enumerate(group)
    }


@pytest.mark.parametrize("in_flight", ["finish", "continue"])
def test_weights_that_are_replaced_under_way_leave_each_completion_told(engine: Engine, in_flight: InFlight) -> None:
    """ "finish": of one version each; "continue": versions that follow one another, and say which tokens are whose."""
    for request in requests(n=3, max_tokens=9):
        engine.submit(request)
    seen = engine.poll()
    engine.load_weights(iter(()), version=1, in_flight=in_flight)
    later = list(finished(engine))
    assert len(seen) + len(later) == 12
    for one in (*seen, *later):
        counted = one.completion.policy_versions
        assert sum(count for _, count in counted) == len(one.completion.token_ids)
        assert [version for version, _ in counted] == sorted({version for version, _ in counted})
        assert in_flight == "continue" or len(counted) == 1
    assert {one.completion.policy_versions[0][0] for one in seen} == {0}
    assert {one.completion.policy_versions[-1][0] for one in later} == {1}


def test_what_begins_again_is_what_the_new_weights_say(engine: Engine) -> None:
    """Draws are those of a fresh engine: seeds do not know that something began twice."""
    expected = tokens(generate(engine, requests(n=3)))
    for request in requests(n=3):
        engine.submit(request)
    seen = {(one.uid, one.output): one.completion.token_ids for one in engine.poll()}
    engine.load_weights(iter(()), version=2, in_flight="finish")
    seen |= {(one.uid, one.output): one.completion.token_ids for one in finished(engine)}
    assert [[seen[f"r{i}", j] for j in range(3)] for i in range(4)] == expected


def test_completions_carry_the_version_of_the_weights(engine: Engine) -> None:
    def versions() -> set[tuple[tuple[int, int], ...]]:
        return {c.policy_versions for group in generate(engine, requests(n=1, max_tokens=1)) for c in group}

    assert versions() == {((0, 1),)}
    engine.load_weights(iter(()), version=7)
    assert versions() == {((7, 1),)}


def test_closing_drops_what_is_in_flight_and_may_be_done_twice(engine: Engine) -> None:
    engine.submit(requests()[0])
    engine.poll(timeout=0.0)
    engine.close()
    engine.close()
    assert engine.poll() == []


# --- the script itself ------------------------------------------------------------------------------------------------


def scripted(text: str, codec: Codec = CODEC, **sampling: object) -> tuple[str, str, int]:
    engine = ScriptedEngine(lambda request, index: text, codec)
    ((completion,),) = generate(engine, [Request("a", (1,), 1, Sampling(**sampling), 0)])  # type: ignore[arg-type]
    return completion.text, completion.finish, len(completion.token_ids)


def test_a_script_is_read_by_uid_by_prompt_or_by_function() -> None:
    engine = ScriptedEngine({"r0": ["a"], PROMPTS[1]: ["b", "c"]}, CODEC)
    found = generate(engine, requests(n=3, prompts=PROMPTS[:2]))
    assert [[c.text for c in group] for group in found] == [["a"] * 3, ["b", "c", "b"]]
    assert [request.uid for request in engine.requests] == ["r0", "r1"]
    counting = ScriptedEngine(lambda request, index: "x" * (index + 1), CODEC, logprob=-0.5)
    ((one, two),) = generate(counting, requests(n=2, prompts=PROMPTS[:1]))
    assert (one.text, two.text, two.sampled_logprobs) == ("x", "xx", (-0.5,) * 3)


def test_a_script_is_cut_like_an_output() -> None:
    assert scripted("abc") == ("abc", "stop", 4)
    assert scripted("abc", max_tokens=4) == ("abc", "stop", 4)
    assert scripted("abc", max_tokens=3) == ("abc", "length", 3)
    assert scripted("abcabc", stop=("ca",)) == ("abca", "stop", 4)
    assert scripted("abcabc", stop=("ca",), max_tokens=3) == ("abc", "length", 3)
    assert scripted("the answer is 85.\n", Codec(byte_level()), stop=("wer",))[:2] == ("the answer", "stop")
