"""Several who ask one engine: each gets what it asked for, whoever waits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from groupwise.engines.base import Engine
from groupwise.engines.mailbox import Mailbox, generate
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.scripted import ScriptedEngine
from groupwise.types import Request, Sampled
from tests.engines.policies import CODEC, make_policy, requests, sample, tokens


@pytest.fixture(params=["native", "scripted"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made: Engine
    if request.param == "native":
        made = NativeEngine(make_policy(), CODEC, max_live=4)
    else:
        made = ScriptedEngine(lambda request, index: "abc"[: 1 + index], CODEC)
    yield made
    made.close()


def named(name: str, n: int = 2) -> list[Request]:
    return [replace(request, uid=f"{name}/{request.uid}") for request in requests(n=n)]


def test_an_evaluation_is_answered_while_training_is_in_flight(engine: Engine) -> None:
    mailbox = Mailbox(engine)
    training = mailbox.ask(named("train", 3))
    labels = mailbox.ask(named("label"))
    evaluated = generate(mailbox, named("eval"))
    assert [len(outputs) for outputs in evaluated] == [2] * 4
    for ticket, n in ((labels, 2), (training, 3)):
        found = mailbox.take(ticket)
        assert found is not None
        assert [len(outputs) for outputs in found] == [n] * 4


def test_what_is_drawn_does_not_depend_on_who_else_asks() -> None:
    mailbox = Mailbox(NativeEngine(make_policy(), CODEC, max_live=4))
    first, second = mailbox.ask(named("a", 3)), mailbox.ask(named("b", 3))
    found = mailbox.take(second), mailbox.take(first)
    alone = tokens(sample(make_policy(), requests(n=3)))
    assert [tokens(one) for one in found if one is not None] == [alone, alone]


def test_a_limit_of_time_gives_none_and_loses_nothing(engine: Engine) -> None:
    mailbox = Mailbox(engine)
    ticket = mailbox.ask(named("a"))
    waits = 0
    while (found := mailbox.take(ticket, timeout=0.0)) is None:
        waits += 1
    assert [len(outputs) for outputs in found] == [2] * 4
    assert isinstance(engine, ScriptedEngine) or waits > 0


def test_what_is_given_up_comes_no_more(engine: Engine) -> None:
    mailbox = Mailbox(engine)
    gone, kept = mailbox.ask(named("a")), mailbox.ask(named("b"))
    mailbox.cancel(gone)
    assert mailbox.take(kept) is not None
    assert engine.poll() == []
    assert mailbox.take(mailbox.ask(named("a"))) is not None, "its uids are free again"


def test_the_same_uid_twice_is_a_mistake_of_ours(engine: Engine) -> None:
    mailbox = Mailbox(engine)
    mailbox.ask(named("a"))
    with pytest.raises(AssertionError, match="a/r0 is in flight already"):
        mailbox.ask(named("a"))


def test_after_an_error_of_the_engine_everybody_may_ask_again() -> None:
    class Failing(ScriptedEngine):
        broken = True

        def poll(self, timeout: float | None = None) -> list[Sampled]:
            if self.broken:
                self.close()
                raise RuntimeError("the device is gone")
            return super().poll(timeout)

    engine = Failing(lambda request, index: "a", CODEC)
    mailbox = Mailbox(engine)
    mailbox.ask(named("train"))
    with pytest.raises(RuntimeError, match="the device is gone"):
        generate(mailbox, named("eval"))
    engine.broken = False
    assert [len(generate(mailbox, named(name))) for name in ("eval", "train")] == [4, 4]


def test_an_engine_that_stops_early_is_found_out() -> None:
    class Lazy(ScriptedEngine):
        def poll(self, timeout: float | None = None) -> list[Sampled]:
            return super().poll(timeout) if len(self.requests) > 1 else []

    with pytest.raises(AssertionError, match="without finishing"):
        generate(Mailbox(Lazy(lambda request, index: "a", CODEC)), requests(n=3)[:1])
