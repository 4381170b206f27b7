"""Sampling by several processes: the completions of one, whatever becomes of the others."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.cpu.cores import threads
from groupwise.engines import processes
from groupwise.engines.base import finished
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.processes import PooledEngine, by_process
from groupwise.errors import ConfigError, ModelError
from groupwise.models.policy import Policy
from groupwise.tokenizer.codec import Codec
from groupwise.types import Branch, Completion, Request, Sampling, Tree
from tests.engines.policies import (
    CODEC,
    PROMPTS,
    difference,
    generate,
    make_policy,
    requests,
    sample,
    tokens,
    without_end,
)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, and helpers for as few outputs as a test has."""
    monkeypatch.setattr(processes, "ROWS", 1)
    with threads(2):
        yield


class Pooled(PooledEngine):
    """An engine that deals out whatever it can, and knows its helpers."""

    def __init__(self, policy: Policy | None = None, codec: Codec = CODEC, **options: Any) -> None:
        super().__init__(NativeEngine(policy or make_policy(), codec, **options), least_tokens=0)

    @property
    def workers(self) -> list[Any]:
        return [*self._busy, *self._idle]

    @property
    def pids(self) -> list[int]:
        return [worker.fork.process.pid for worker in self.workers]


@pytest.fixture
def engine() -> Iterator[Pooled]:
    made = Pooled()
    yield made
    made.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: Sequence[int]) -> bool:
    """Whether they all end, however long a busy machine takes."""
    until = time.monotonic() + 300
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    return not any(map(alive, pids))


def same(left: Sequence[Sequence[Completion]], right: Sequence[Sequence[Completion]]) -> None:
    assert tokens(left) == tokens(right)
    for one, other in zip([c for g in left for c in g], [c for g in right for c in g], strict=True):
        assert one.sampled_logprobs == pytest.approx(other.sampled_logprobs, abs=1e-5)
        assert (one.text, one.finish, one.policy_versions) == (other.text, other.finish, other.policy_versions)


# --- what it samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, layout", [("llama", "shared"), ("llama", "plain"), ("gpt2", "shared")])
def test_completions_are_those_of_one_process(kind: str, layout: Any) -> None:
    policy = make_policy(kind, layout)
    engine = Pooled(policy)
    for settings in ({}, {"temperature": 0.0}, {"top_k": 5, "max_tokens": 20}, {"stop": ("a", "bc")}):
        asked = requests(n=5, **settings)
        same(generate(engine, asked), sample(make_policy(kind, layout), asked))
        assert len(engine.workers) == 1, "and it was no process alone that made them"
    assert difference(policy, asked, generate(engine, asked)) < 1e-5
    engine.close()


def test_slots_refill_in_each_process(engine: Pooled) -> None:
    small = Pooled(max_live=4)
    asked = requests(n=7, prompts=PROMPTS * 2)
    same(generate(small, asked), generate(engine, asked))
    assert small.own.max_live == 2
    small.close()


def test_requests_of_a_tree_stay_together(engine: Pooled) -> None:
    trees = [Tree(f"t{i}", prompt, ((5, 6, 7), (8, 9))) for i, prompt in enumerate(PROMPTS[:2])]
    branches = [Branch(tree, output, 2) for tree in trees for output in (0, 1)]
    settings = Sampling(max_tokens=8)
    asked = [Request(f"b{i}", b.token_ids, 3, settings, 100 * i, b) for i, b in enumerate(branches)]
    shares = engine._shares(asked)
    assert [{r.branch.tree.uid for r in share if r.branch} for share in shares] == [{"t0"}, {"t1"}]
    same(generate(engine, asked), sample(make_policy(), asked))


def test_rounding_does_not_depend_on_who_is_done_first(engine: Pooled) -> None:
    """This process has one thread to the end of a batch, whether its helpers are done early or late."""
    seen: list[int] = []
    decode = engine.own._decode
    engine.own._decode = lambda limit: (seen.append(torch.get_num_threads()), decode(limit))  # type: ignore[method-assign, assignment]
    for pause in (0.0, 0.2):
        for request in requests(n=4, max_tokens=20):
            engine.submit(request)
        engine._deal()
        time.sleep(pause)
        assert len(list(finished(engine))) == 16
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    generate(engine, requests(n=4)[:1])
    assert seen[-1] == 2, "alone it has all of them"


def test_who_asks_while_much_is_ready_misses_nothing(engine: Pooled) -> None:
    for request in requests(n=4):
        engine.submit(request)
    engine._deal()
    time.sleep(0.3)  # the helper is done by now, and its outputs come in at once
    parts = []
    while part := engine.poll():
        parts.append(part)
    assert len({(s.uid, s.output) for part in parts for s in part}) == sum(map(len, parts)) == 16


def test_tokens_of_all_processes_are_told(engine: Pooled) -> None:
    told: list[int] = []
    engine.own.on_tokens = told.append
    groups = generate(engine, requests(n=4))
    assert sum(told) == sum(len(c.token_ids) for group in groups for c in group)


def test_there_are_no_helpers_where_one_process_is_best(engine: Pooled, monkeypatch: pytest.MonkeyPatch) -> None:
    few = PooledEngine(engine.own)
    generate(few, requests(n=3))
    assert not few._idle, "few tokens"
    generate(engine, requests(n=3)[:1])
    assert not engine.workers, "one group"
    torch.set_num_threads(1)
    generate(engine, requests(n=3))
    assert not engine.workers, "one thread"
    torch.set_num_threads(2)
    monkeypatch.setattr(processes, "ROWS", 100)
    generate(engine, requests(n=3))
    assert not engine.workers, "few outputs"
    monkeypatch.setattr(processes, "ROWS", 1)
    generate(engine, requests(n=3))
    assert engine.workers
    one, two = [[0, 1, 2, 3]], [[0, 2], [1, 3]]
    assert by_process([1, 1, 1, 1], 64, 1000, "cpu") == two
    assert by_process([1, 1, 1, 1], 64, 1000, "cuda") == by_process([1, 1, 1, 1], 64, 1 << 28, "cpu") == one
    assert by_process([6, 1, 1, 1], 64, 1000, "cpu") == one, "not even"
    torch.set_num_threads(3)
    assert by_process([1, 1, 1, 1], 64, 1000, "cpu") == one, "a thread would be idle"


def test_a_process_that_may_have_no_children_samples_alone(engine: Pooled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    same(generate(engine, requests()), sample(make_policy(), requests()))
    assert not engine.workers


def test_where_the_system_has_no_room_for_a_process_there_is_one_fewer(
    engine: Pooled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*ignored: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(processes, "SamplingProcess", refuse)
    with pytest.warns(RuntimeWarning, match="no room for another process.*temporarily unavailable"):
        found = generate(engine, requests())
    same(found, sample(make_policy(), requests()))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_helpers_compute_with_the_weights_as_they_are_now(engine: Pooled) -> None:
    """Changed in place as by an optimizer, and by load_weights; without being told, and by the same process."""
    asked = requests(n=4, temperature=0.0)
    policy, before = engine.own.policy, generate(engine, asked)
    pids = engine.pids
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            parameter.mul_(1.5 if "mlp" in name else 1.0)
    engine.load_weights(policy.model.state_dict(keep_vars=True).items(), version=3)
    changed = generate(engine, asked)
    assert tokens(changed) != tokens(before)
    same(changed, with_version(sample(copy.deepcopy(policy), asked), 3))
    engine.load_weights([(n, t / 1.5 if "mlp" in n else t) for n, t in policy.model.state_dict().items()], version=4)
    assert tokens(generate(engine, asked)) == tokens(before)
    assert engine.pids == pids


def test_weights_that_were_moved_are_found_again(engine: Pooled) -> None:
    asked = requests(n=4)
    expected = generate(engine, asked)
    pids = engine.pids
    for parameter in engine.own.policy.model.parameters():
        parameter.data = parameter.data.clone()
    same(generate(engine, asked), expected)
    assert engine.pids != pids
    assert gone(pids)


def test_new_weights_under_way_begin_what_is_not_finished_again() -> None:
    engine = Pooled(codec=without_end())
    for request in requests(n=3, max_tokens=9):
        engine.submit(request)
    engine._deal()
    os.kill(engine.pids[0], signal.SIGSTOP)  # it will not have finished anything
    versions: dict[tuple[str, int], Any] = {}
    for number, (uid, output, completion) in enumerate(finished(engine)):
        assert (uid, output) not in versions
        versions[uid, output] = completion.policy_versions
        if number == 0:
            engine.load_weights(iter(()), version=5)
    assert len(versions) == 12
    assert {sum(count for _, count in found) for found in versions.values()} == {9}
    assert {version for found in versions.values() for version, _ in found} <= {0, 5}
    assert sum(found == ((5, 9),) for found in versions.values()) >= 6, "what the helper had is begun again"
    generate(engine, requests())
    engine.close()


def with_version(groups: Sequence[Sequence[Completion]], version: int) -> list[tuple[Completion, ...]]:
    return [tuple(replace(c, policy_versions=((version, len(c.token_ids)),)) for c in group) for group in groups]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_empty_stop_string_is_refused_before_anything_runs(engine: Pooled) -> None:
    with pytest.raises(ConfigError):
        engine.submit(requests(stop=("",))[0])
    assert not engine._flights


def test_a_cancelled_uid_may_be_used_again_at_once(engine: Pooled) -> None:
    for request in requests(n=4):
        engine.submit(request)
    seen: Counter[tuple[str, int]] = Counter()
    again = Request("r0", PROMPTS[1], 2, Sampling(max_tokens=3), 77)
    before = {(one.uid, one.output) for one in engine.poll()}
    for old in ("r0", "r1"):
        engine.cancel(old)
    engine.submit(again)
    for uid, output, completion in finished(engine):
        seen[uid, output] += 1
        assert uid != "r1"
        assert uid == "r0" or (uid, output) not in before
        assert uid != "r0" or len(completion.token_ids) <= 3
    assert seen["r0", 0] == seen["r0", 1] == 1
    assert max(seen.values()) == 1


def exactly(groups: Sequence[Sequence[Completion]]) -> list[Any]:
    """Outputs with their log-probs, to the bit."""
    return [[(c.token_ids, c.sampled_logprobs, c.text, c.finish) for c in group] for group in groups]


def gathered(engine: Pooled, asked: Sequence[Request], kills: int) -> list[list[Completion]]:
    """What is sampled when so many processes that sample beside us are killed, each at its second output."""
    found: dict[str, dict[int, Completion]] = {request.uid: {} for request in asked}
    deaths, parent, finish = multiprocessing.Value("i", 0), os.getpid(), engine.own._finish
    seen: list[Any] = []

    def finish_or_die(row: Any) -> Any:
        if os.getpid() != parent and deaths.value < kills:
            seen.append(row)
            if len(seen) == 2:
                deaths.value += 1
                os.kill(os.getpid(), signal.SIGKILL)
        return finish(row)

    engine.own._finish = finish_or_die  # type: ignore[method-assign]
    try:
        for request in asked:
            engine.submit(request)
        for uid, output, completion in finished(engine):
            assert output not in found[uid], "each comes once"
            found[uid][output] = completion
        assert deaths.value == kills
    finally:
        engine.own._finish = finish  # type: ignore[method-assign]
    return [[found[request.uid][i] for i in range(request.n)] for request in asked]


@pytest.mark.parametrize("kills", [1, 2, 3])
def test_a_busy_helper_that_is_killed_is_replaced_and_its_outputs_are_the_same_to_the_bit(kills: int) -> None:
    asked = requests(n=4, max_tokens=40)
    expected = exactly(generate(Pooled(codec=without_end()), asked))
    engine = Pooled(codec=without_end())
    with pytest.warns(RuntimeWarning, match=r"ended with status -9.*is drawn again.*max_live_outputs") as said:
        found = gathered(engine, asked, kills)
    assert exactly(found) == expected
    assert len(said) == 1, "it is said once"
    assert exactly(generate(engine, asked)) == expected
    engine.close()


def test_helpers_that_are_killed_again_and_again_are_an_error_that_says_so_and_the_next_one_works() -> None:
    engine = Pooled(codec=without_end())
    expected = sample(make_policy(), requests(n=4), without_end())
    with pytest.warns(RuntimeWarning), pytest.raises(ModelError, match=r"status -9.*so did 3 others.*max_live_outputs"):
        gathered(engine, requests(n=4, max_tokens=200), processes.REPLACED + 1)
    same(generate(engine, requests(n=4)), expected)
    engine.close()


def test_a_helper_that_is_killed_before_it_is_told_what_to_do_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = Pooled(codec=without_end()), requests(n=4)
    expected = exactly(generate(engine, asked))
    os.kill(engine.pids[0], signal.SIGKILL)
    engine.workers[0].fork.process.join()
    monkeypatch.setattr(type(engine.workers[0].fork.process), "is_alive", lambda process: True)
    with pytest.warns(RuntimeWarning, match="ended with status -9"):
        assert exactly(generate(engine, asked)) == expected
    engine.close()


def test_what_was_cancelled_stays_so_when_its_helper_is_replaced() -> None:
    engine = Pooled(codec=without_end())
    for request in requests(n=4, max_tokens=40):
        engine.submit(request)
    engine._deal()
    (worker,) = engine._busy
    cancelled = next(iter(worker.wanted))
    engine.cancel(cancelled)
    os.kill(engine.pids[0], signal.SIGKILL)
    with pytest.warns(RuntimeWarning):
        seen = {sampled.uid for sampled in finished(engine)}
    assert seen == {request.uid for request in requests()} - {cancelled}
    engine.close()


def test_where_there_is_no_room_for_another_the_rest_is_sampled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*ignored: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    engine = Pooled(codec=without_end())
    asked = requests(n=4, max_tokens=40)
    for request in asked:
        engine.submit(request)
    engine._deal()
    monkeypatch.setattr(processes, "SamplingProcess", refuse)
    os.kill(engine.pids[0], signal.SIGKILL)
    with pytest.warns(RuntimeWarning) as said:
        found = {(uid, output): completion for uid, output, completion in finished(engine)}
    assert ["no room for another process" in str(one.message) for one in said] == [False, True]
    expected = sample(make_policy(), asked, without_end())
    same([[found[request.uid, i] for i in range(request.n)] for request in asked], expected)
    engine.close()


def test_an_idle_helper_that_is_killed_is_replaced(engine: Pooled) -> None:
    expected = generate(engine, requests(n=4))
    pids = engine.pids
    os.kill(pids[0], signal.SIGKILL)
    engine.workers[0].fork.process.join()
    with pytest.warns(RuntimeWarning, match="ended from outside"):
        found = generate(engine, requests(n=4))
    same(found, expected)
    assert len(engine.pids) == 1
    assert engine.pids != pids


def test_what_goes_wrong_in_a_helper_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, pattern in ((ModelError("logits are not finite"), "^logits are not finite$"),
                           (RuntimeError("some kernel"), r"Sampling failed: .*some kernel")):  # fmt: skip
        engine, parent = Pooled(), os.getpid()
        finish = engine.own._finish

        def fail(row: Any, error: Exception = error, parent: int = parent, finish: Any = finish) -> Any:
            if os.getpid() != parent:
                raise error
            return finish(row)

        expected = generate(engine, requests(n=4))
        engine.close()  # the next helper is a copy of what follows
        with monkeypatch.context() as patch:
            patch.setattr(engine.own, "_finish", fail)
            with pytest.raises(ModelError, match=pattern):
                generate(engine, requests(n=4))
        engine.close()
        same(generate(engine, requests(n=4)), expected)
        engine.close()


def test_a_helper_that_is_busy_with_what_was_cancelled_is_not_waited_for() -> None:
    engine = Pooled(codec=without_end())
    for request in requests(n=4, max_tokens=40):
        engine.submit(request)
    engine._deal()
    (worker,) = engine._busy
    os.kill(engine.pids[0], signal.SIGSTOP)
    kept, *others = worker.wanted
    for uid in others:
        engine.cancel(uid)
    assert engine._busy, "one request of it is still wanted"
    engine.cancel(kept)
    assert not engine._busy
    assert {sampled.uid for sampled in finished(engine)} == {r.uid for r in requests()} - {kept, *others}
    engine.close()


def test_an_interrupt_is_for_this_process_alone(engine: Pooled) -> None:
    expected = generate(engine, requests(n=4))
    (pid,) = engine.pids
    os.kill(pid, signal.SIGINT)
    same(generate(engine, requests(n=4)), expected)
    assert engine.pids == [pid]


# --- processes --------------------------------------------------------------------------------------------------------


def test_closing_ends_them_and_may_be_done_twice(engine: Pooled) -> None:
    generate(engine, requests())
    pids = engine.pids
    assert len(pids) == 1
    engine.close()
    engine.close()
    assert not engine.workers
    assert gone(pids)


def test_an_engine_that_nobody_closed_ends_them_too() -> None:
    engine = Pooled()
    generate(engine, requests())
    pids = engine.pids
    del engine
    gc.collect()
    assert gone(pids)


def test_they_end_with_the_process_that_began_them() -> None:
    script = (
        "import os, signal, torch\nfrom tests.engines import test_processes as t\n"
        "t.processes.ROWS = 1\ntorch.set_num_threads(2)\n"
        "engine = t.Pooled(); t.generate(engine, t.requests()); print(engine.pids[0], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=900, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert gone([int(ended.stdout)])


def test_they_hold_nothing_of_what_is_open_here(engine: Pooled) -> None:
    reader, writer = os.pipe()
    generate(engine, requests())
    assert engine.workers
    os.close(writer)
    assert os.read(reader, 1) == b"", "somebody else holds the other end"
    os.close(reader)
