"""Parts of a batch that are computed at once on a CPU: the same numbers as one after the other, and the same bits each
time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from groupwise.cpu.cores import threads
from groupwise.errors import ModelError
from groupwise.learn import lanes
from groupwise.learn.lanes import at_once, deal, most_lanes
from groupwise.learn.learner import PolicyLearner
from groupwise.learn.pack import Output
from groupwise.models.layout import Stream
from groupwise.models.load import checkpoint_gradients
from groupwise.models.policy import LayoutName, Policy
from groupwise.types import ScoredGroup
from tests.learn.tiny import (
    Gradient,
    distance,
    gathered,
    gradients,
    make_learner,
    size,
    some_credit,
    some_groups,
    tiny_policy,
    with_past,
)


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three threads, and lanes for batches as small as a test's."""
    monkeypatch.setattr(lanes, "LEAST_TOKENS", 8)
    with threads(3):
        yield


def learner(policy: Policy, count: int, **settings: Any) -> PolicyLearner:
    """One that computes in so many lanes."""
    made = make_learner(policy, **settings)
    assert made.replicas.most == 3
    made.replicas.most = count
    return made


def batch_groups(policy: Policy) -> list[ScoredGroup]:
    """Ten groups, so that three lanes come out even."""
    first, second = some_groups(policy, 1.0, seed=0), some_groups(policy, 1.0, seed=1)
    return [*first, *second]


def outputs(*sizes: int, prompt: int = 10) -> list[Output]:
    return [Output(g, (0,) * prompt, (0,) * size, 0) for g, size in enumerate(sizes)]


def test_groups_are_dealt_out_whole_and_evenly() -> None:
    made = [Output(g, (0,) * 10, (0,) * (5 + g), 0) for g in range(9) for _ in range(4)]
    dealt = deal(made, range(len(made)), 3)
    assert sorted(member for lane in dealt for member in lane) == list(range(len(made)))
    groups = [{made[member].group for member in lane} for lane in dealt]
    assert [len(own) for own in groups] == [3, 3, 3]
    assert not groups[0] & groups[1] | groups[1] & groups[2] | groups[0] & groups[2]
    loads = [sum(10 + 4 * (5 + g) for g in own) for own in groups]
    assert max(loads) <= 1.1 * min(loads)


def test_there_is_one_lane_where_more_would_not_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [[0, 1, 2]]
    assert deal(outputs(5, 5, 5), range(3), 1) == whole, "one is all there may be"
    assert deal(outputs(50, 5, 5), range(3), 3) == whole, "one group is most of the batch"
    assert deal(outputs(5, 5), range(2), 3) == [[0], [1]], "a lane per group is the most"
    monkeypatch.setattr(lanes, "LEAST_TOKENS", 100)
    assert deal(outputs(5, 5, 5), range(3), 3) == whole, "too little in all"
    assert deal(outputs(5, 5, 5), [], 3) == [[]]
    assert most_lanes(1000, "cuda") == most_lanes(1000, "meta") == most_lanes(1 << 28, "cpu") == 1
    assert most_lanes(1000, "cpu") == 3
    torch.set_num_threads(1)
    assert most_lanes(1000, "cpu") == 1


def test_work_is_done_in_threads_of_its_own_with_their_share_of_torchs() -> None:
    together = threading.Barrier(3, timeout=600)

    def work() -> tuple[int, int, bool]:
        together.wait()
        return threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        found = at_once([work] * 3)
    assert found[0][0] == threading.get_ident()
    assert len({ident for ident, *_ in found}) == 3
    assert {(count, grad) for _, count, grad in found} == {(1, False)}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_goes_wrong_is_raised_when_all_have_ended(failing: int) -> None:
    ended = []

    def work(number: int) -> None:
        if number == failing:
            raise ModelError("no")
        ended.append(number)

    with pytest.raises(ModelError, match="no"):
        at_once([lambda n=n: work(n) for n in range(3)])  # type: ignore[misc]
    assert sorted(ended) == sorted({0, 1, 2} - {failing})


@pytest.mark.parametrize("preset", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_the_gradient_and_the_metrics_are_those_of_one_lane(layout: LayoutName, preset: str) -> None:
    found: list[tuple[Gradient, dict[str, float]]] = []
    groups = batch_groups(tiny_policy())
    for count in (1, 3):
        own = learner(tiny_policy(layout=layout), count, preset=preset, tokens_per_micro_batch=60)
        batch = with_past(own.pack(groups, some_credit(groups)), own.objective)
        (gradient,) = gradients(own, batch)
        found.append((gradient, own._tally.metrics()))
    assert size(found[0][0]) > 1e-3
    assert distance(found[0][0], found[1][0]) < 1e-12
    cut = [metrics.pop("micro_batches") for _, metrics in found]
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-9)
    assert cut[0] > 1
    assert cut[1] >= 3


@pytest.mark.parametrize("kind, direct", [("exact", False), ("llama", False), ("llama", True), ("qwen3", True)])
def test_updates_follow_the_same_weights(kind: str, direct: bool) -> None:
    """Several updates of which each sees what the one before did: with the modules, and past them."""
    groups = batch_groups(tiny_policy(kind))
    found = []
    for count in (1, 3):
        own = learner(tiny_policy(kind, direct=direct), count, rate=1e-2, num_iterations=2)
        replicas = own.replicas.policies(count)
        assert all((policy.direct is not None) == direct for policy in replicas)
        assert not direct or len({id(policy.direct.body) for policy in replicas if policy.direct}) == count
        for _ in range(2):
            batch = own.prepare(groups, some_credit(groups))
            for done in range(2):
                own.update(batch, done)
        found.append({name: master.detach().clone() for name, master in own.optimizer.master_weights.items()})
    moved = distance(found[0], dict(tiny_policy(kind).model.named_parameters()))
    assert moved > 1e-2
    assert distance(*found) < (1e-9 if kind == "exact" else 5e-3 * moved)


def test_gradient_checkpointing_and_narrow_weights_have_lanes_too() -> None:
    groups = batch_groups(tiny_policy())
    for change in ("checkpointing", "bfloat16"):
        found = []
        for count in (1, 3):
            policy = tiny_policy("llama")
            if change == "checkpointing":
                checkpoint_gradients(policy.model, "tiny")
            dtype = torch.bfloat16 if change == "bfloat16" else torch.float32
            own = learner(policy, count, preset="dapo", compute_dtype=dtype)
            batch = with_past(own.pack(groups, some_credit(groups)), own.objective)
            found.append(gradients(own, batch)[0])
            assert all(gradient.dtype == torch.float32 for gradient in found[-1].values())
        assert distance(*found) < (0.05 if change == "bfloat16" else 1e-5) * size(found[0])


def test_the_same_bits_come_again() -> None:
    groups = batch_groups(tiny_policy("llama"))
    found = []
    for _ in range(3):
        own = learner(tiny_policy("llama"), 3, preset="dapo", tokens_per_micro_batch=60)
        (gradient,) = gradients(own, own.pack(groups, some_credit(groups)), passes_done=0)
        found.append(gradient)
    assert distance(found[0], found[1]) == distance(found[0], found[2]) == 0


def test_the_first_pass_is_on_policy_in_every_lane() -> None:
    own = learner(tiny_policy(), 3)
    groups = batch_groups(own.policy)
    metrics = own.update(own.prepare(groups, some_credit(groups)))
    assert metrics["ratio/max"] == 1.0
    assert metrics["kl"] == 0.0


def test_scores_are_those_of_one_lane() -> None:
    own = learner(tiny_policy(), 3)
    groups = batch_groups(own.policy)
    batch = own.pack(groups, some_credit(groups))
    several = own.logprobs(batch)
    torch.set_num_threads(1)
    torch.testing.assert_close(several, own.logprobs(batch), rtol=0, atol=1e-12)
    assert several.abs().min() > 0
    assert not several.requires_grad


def test_memory_that_runs_out_in_one_lane_halves_the_budget_of_all() -> None:
    """And what the others had added by then is not counted twice."""
    groups, found = batch_groups(tiny_policy()), []
    for room in (1000, 20):
        policy = tiny_policy()
        policy.__class__ = type("Tight", (Policy,), {"forward": tight(room)})  # twins are copies of it
        own = learner(policy, 3, preset="dapo", tokens_per_micro_batch=120)
        (gradient,) = gradients(own, own.pack(groups, some_credit(groups)), passes_done=0)
        found.append(gradient)
        assert (own.token_budget.budget, own.token_budget.halved) == ((120, 0) if room == 1000 else (60, 1))
    assert distance(*found) < 1e-12


def tight(room: int) -> Any:
    def forward(self: Policy, stream: Stream, *inputs: Any, **options: Any) -> Any:
        if stream.tokens > room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return Policy.forward(self, stream, *inputs, **options)

    return forward


def test_twins_share_weights_and_buffers_and_nothing_else() -> None:
    own = learner(tiny_policy("llama"), 3)
    first, second, third = own.replicas.policies(3)
    assert first is own.policy
    assert second is not third
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one is not other
        assert one.data_ptr() == other.data_ptr()
        assert one.grad is not other.grad
    assert [b.data_ptr() for b in first.buffers()] == [b.data_ptr() for b in third.buffers()]
    assert len(list(first.parameters())) == len(list(second.parameters())), "what is tied stays so"
    before = copy.deepcopy(gathered(own))
    for policy in (second, third):
        policy(policy.stream([((2, 3), [(4, 5)])])).logprobs_T.sum().backward()
    assert distance(before, gathered(own)) == 0
    own.replicas.gather()
    doubled = gathered(own)
    own.optimizer.zero_grad()
    own.replicas.gather()
    assert size(gathered(own)) == 0, "gathered once"
    first(first.stream([((2, 3), [(4, 5)])])).logprobs_T.sum().backward()
    assert distance(doubled, {name: 2 * value for name, value in gathered(own).items()}) < 1e-6


def test_twins_follow_weights_that_were_moved() -> None:
    own = learner(tiny_policy("llama"), 3)
    own.replicas.policies(3)
    for parameter in own.policy.parameters():
        parameter.data = 2 * parameter.data
    first, second, third = own.replicas.policies(3)
    for twin in (second, third):
        assert all(p.data_ptr() == q.data_ptr() for p, q in zip(first.parameters(), twin.parameters(), strict=True))
