"""What every engine promises, held for each of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from groupwise.cpu.cores import threads
from groupwise.engines import processes
from groupwise.engines.base import Engine, generate
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.processes import PooledEngine
from groupwise.engines.scripted import ScriptedEngine
from groupwise.tokenizer.codec import Codec
from groupwise.types import Request, Sampled, Sampling
from tests.engines.policies import CODEC, PROMPTS, make_policy, requests
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
    seen = Counter((sampled.uid, sampled.output) for sampled in engine.completed())
    assert seen == Counter((request.uid, index) for request in asked for index in range(3))


def test_generate_gives_them_in_order(engine: Engine) -> None:
    groups = generate(engine, requests(n=3))
    assert [len(group) for group in groups] == [3] * 4
    again = {f"r{i}": group for i, group in enumerate(groups)}
    for request in reversed(requests(n=3)):
        engine.submit(request)
    for uid, index, completion in engine.completed():
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
    assert list(engine.completed()) == []
    assert generate(engine, []) == []


def test_a_uid_is_free_again_when_its_request_is_done(engine: Engine) -> None:
    first = requests()[0]
    engine.submit(first)
    with pytest.raises(AssertionError, match="in flight"):
        engine.submit(first)
    assert len(list(engine.completed())) == 3
    engine.submit(first)
    assert len(list(engine.completed())) == 3


def test_a_request_may_come_while_others_are_under_way(engine: Engine) -> None:
    first, second, *_ = requests(n=3)
    engine.submit(first)
    seen = []
    for number, sampled in enumerate(engine.completed()):
        seen.append(sampled.uid)
        if number == 1:
            engine.submit(second)
    assert Counter(seen) == {"r0": 3, "r1": 3}


def test_a_cancelled_request_is_heard_of_no_more(engine: Engine) -> None:
    for request in requests(n=3):
        engine.submit(request)
    engine.cancel("nobody")
    seen = []
    for number, sampled in enumerate(engine.completed()):
        if number == 2:
            engine.cancel("r0")
            engine.cancel("r2")
            seen.clear()
        elif number > 2:
            seen.append(sampled.uid)
    assert not {"r0", "r2"} & set(seen)
    assert list(engine.completed()) == []
    engine.submit(requests()[0])
    assert {sampled.uid for sampled in engine.completed()} == {"r0"}


def test_cancelling_everything_ends_the_iteration(engine: Engine) -> None:
    for request in requests():
        engine.submit(request)
    for _ in engine.completed():
        for uid in ("r0", "r1", "r2", "r3"):
            engine.cancel(uid)
    assert list(engine.completed()) == []


def test_who_leaves_and_comes_back_misses_nothing(engine: Engine) -> None:
    for request in requests(n=3):
        engine.submit(request)
    seen = []
    while part := list(islice(engine.completed(), 2)):
        seen += part
    assert len(seen) == len({(sampled.uid, sampled.output) for sampled in seen}) == 12
    assert {(s.uid, s.output): s.completion for s in seen} == {
        (f"r{i}", j): c for i, group in enumerate(generate(engine, requests(n=3))) for j, c in enumerate(group)
    }


def test_completions_carry_the_version_of_the_weights(engine: Engine) -> None:
    def versions() -> set[tuple[tuple[int, int], ...]]:
        return {c.policy_versions for group in generate(engine, requests(n=1, max_tokens=1)) for c in group}

    assert versions() == {((0, 1),)}
    engine.load_weights(iter(()), version=7)
    assert versions() == {((7, 1),)}


def test_closing_drops_what_is_in_flight_and_may_be_done_twice(engine: Engine) -> None:
    engine.submit(requests()[0])
    next(engine.completed())
    engine.close()
    engine.close()
    assert list(engine.completed()) == []


def test_an_engine_that_stops_early_is_found_out() -> None:
    class Lazy(ScriptedEngine):
        def completed(self) -> Iterator[Sampled]:
            return islice(super().completed(), 2)

    with pytest.raises(AssertionError, match="without finishing"):
        generate(Lazy(lambda request, index: "a", CODEC), requests(n=3)[:1])


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
