"""Labels of steps by Monte Carlo, worked out by hand from what a script goes on with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from groupwise.engines.mailbox import Mailbox
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.scripted import ScriptedEngine
from groupwise.reward_models import monte_carlo
from groupwise.reward_models.monte_carlo import Completer, MonteCarlo
from groupwise.rewards.base import RewardContext
from groupwise.rewards.steps import by_pattern
from groupwise.rewards.stepwise import StepScorer
from groupwise.types import Completion, Finish, Group, GroupKey, Prompt, Request, Sampled, Sampling, Score, ScoredGroup
from tests.engines.policies import CODEC, make_policy

END = next(iter(CODEC.end_token_ids))
STEPS = by_pattern(CODEC, r"\.")
Continue = Callable[[str, int], str]


def output(text: str, finish: Finish = "stop") -> Completion:
    token_ids = (*CODEC.encode_text(text), *([END] if finish == "stop" else []))
    return Completion(token_ids, text, (-0.5,) * len(token_ids), finish)


def group(*outputs: Completion, prompt: str = "q", slot: int = 0) -> Group:
    return Group(GroupKey(3, slot, f"id{slot}"), Prompt(f"id{slot}", prompt, CODEC.encode_prompt(prompt)), outputs)


def ends_in_z(groups: Sequence[Group]) -> list[ScoredGroup]:
    """1 for what ends in z, 0.5 in y, 0 otherwise; what ends in ? is not scored."""
    worth = {"z": 1.0, "y": 0.5, "?": None}
    return [ScoredGroup(g, tuple(Score(worth.get(c.text[-1:], 0.0)) for c in g.completions)) for g in groups]


def labeller(go_on: Continue, n: int = 4, **options: Any) -> tuple[MonteCarlo, ScriptedEngine]:
    """Continuation `i` of the text so far, prompt included, is `go_on(text, i)`."""
    completer = {name: options.pop(name) for name in ("context", "seed") if name in options}
    engine = ScriptedEngine(lambda request, index: go_on(CODEC.decode(request.token_ids), index), CODEC)
    sampling = Sampling(max_tokens=6)
    return MonteCarlo(Mailbox(engine), ends_in_z, CODEC, STEPS, Completer(n, sampling, **completer), **options), engine


def script(text: str, index: int) -> str:
    """From `qab.` one of four reaches z, from further on none."""
    return "z" if text == "qab." and index == 2 else "w"


def labels(mc: MonteCarlo, *groups: Group) -> list[tuple[float | None, ...]]:
    return [one.labels for one in mc.label(ends_in_z(groups))]


def test_hard_is_whether_any_is_right_and_soft_is_how_many() -> None:
    asked = group(output("ab.cd.ez"))
    assert labels(labeller(script)[0], asked) == [(1.0, 0.0, 1.0)]
    assert labels(labeller(script, soft=True)[0], asked) == [(0.25, 0.0, 1.0)]


def test_what_is_labelled_are_the_steps_and_where_it_comes_from() -> None:
    mc, _ = labeller(script)
    (one,) = mc.label(ends_in_z([group(output("ab.cd.ez"))]))
    assert one.row(soft=False) == {
        "prompt": "q", "completions": ["ab.", "cd.", "ez"], "labels": [True, False, True], "right": [1, 0, 1],
        "tried": [4, 4, 1], "reward": 1.0, "prompt_id": "id0", "step": 3, "slot": 0, "output": 0,
    }  # fmt: skip
    assert one.row(soft=True)["labels"] == [1.0, 0.0, 1.0]
    assert (mc.continuations, mc.tokens) == (8, 16), "each has a letter and its end"


def test_the_last_step_of_a_finished_output_is_not_continued() -> None:
    mc, engine = labeller(lambda text, index: "z")
    assert labels(mc, group(output("ab.cd.e"), output("ab.", "length"))) == [(1.0, 1.0, 0.0), (1.0,)]
    texts = [CODEC.decode(request.token_ids) for request in engine.requests]
    assert texts == ["qab.", "qab.cd.", "qab."], "the first output's own end counts, the second has none"


def test_what_is_verified_is_the_whole_output() -> None:
    seen: list[Group] = []
    mc, _ = labeller(script, n=2)
    mc.verifier = lambda groups: seen.extend(groups) or ends_in_z(groups)  # type: ignore[func-returns-value]
    mc.label(ends_in_z([group(output("ab.cd"), prompt="qq")]))
    (one,) = seen
    assert (one.prompt.content, [c.text for c in one.completions]) == ("qq", ["ab.w", "ab.w"])
    assert one.completions[0].token_ids == (*CODEC.encode_text("ab.w"), END)
    assert one.completions[0].sampled_logprobs == (-0.5,) * 3 + (-1.0,) * 2


def test_right_is_what_reaches_the_threshold() -> None:
    asked = group(output("ab.y"))
    assert labels(labeller(lambda text, index: "y")[0], asked) == [(0.0, 0.0)]
    assert labels(labeller(lambda text, index: "y", threshold=0.5)[0], asked) == [(1.0, 1.0)]


def test_what_is_not_scored_is_not_counted() -> None:
    half = labeller(lambda text, index: "?" if index < 2 else "zw"[index % 2], soft=True)[0]
    assert labels(half, group(output("ab.z"))) == [(0.5, 1.0)]
    none = labeller(lambda text, index: "?")[0]
    assert labels(none, group(output("ab.z"))) == [(None, 1.0)]
    assert labels(none, group(output("ab.?"))) == [(None, None)]


def test_a_continuation_has_the_room_that_the_context_leaves() -> None:
    mc, engine = labeller(lambda text, index: "z", context=10)
    assert labels(mc, group(output("ab.cdef.g.h"))) == [(1.0, 1.0, None, 0.0)]
    assert [request.sampling.max_tokens for request in engine.requests] == [6, 1]


def test_an_output_without_tokens_has_no_steps() -> None:
    mc, engine = labeller(script)
    empty = Completion((), "", (), "length")
    assert [one.output for one in mc.label(ends_in_z([group(empty, output("z"))]))] == [1]
    assert not engine.requests


def test_seeds_are_by_output_and_step() -> None:
    groups = [group(output("ab.cd.e"), output("ab.c"), slot=slot) for slot in (0, 1)]
    mc, engine = labeller(script)
    mc.label(ends_in_z(groups))
    seeds = {request.uid: request.seed for request in engine.requests}
    assert len(set(seeds.values())) == len(seeds) == 6
    assert all(0 <= seed < 2**62 for seed in seeds.values())
    mc, engine = labeller(script)
    mc.label(ends_in_z(groups[1:]))
    assert {request.uid: request.seed for request in engine.requests}.items() <= seeds.items()
    mc, engine = labeller(script, seed=1)
    mc.label(ends_in_z(groups))
    assert set(seeds.values()).isdisjoint(request.seed for request in engine.requests)


def test_the_outputs_of_a_prompt_are_one_tree_as_far_as_they_are_gone_on_from() -> None:
    mc, engine = labeller(script)
    mc.label(ends_in_z([group(output("ab.cd.efgh"), output("efg"), output("a.bc", "length"))]))
    assert len({request.branch.tree.uid for request in engine.requests if request.branch}) == 1
    branch = engine.requests[0].branch
    assert branch is not None
    assert [CODEC.decode(ids) for ids in branch.tree.outputs] == ["ab.cd.", "a.bc"]
    assert [r.branch and r.branch[1:] for r in engine.requests] == [(0, 3), (0, 6), (1, 2), (1, 4)]


def test_a_tree_that_is_too_large_is_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monte_carlo, "TREE_TOKENS", 7)
    mc, engine = labeller(script)
    asked = group(output("ab.c"), output("ab.d"), output("ab.e"), output("abcdefgh.i"))
    assert labels(mc, asked)[:3] == [(1.0, 0.0)] * 3
    trees = {r.branch.tree.uid: len(r.branch.tree.outputs) for r in engine.requests if r.branch}
    assert trees == {"3/0/0": 2, "3/0/1": 1, "3/0/2": 1}
    assert all(r.token_ids == r.branch.token_ids for r in engine.requests if r.branch)


def test_it_is_a_reward_of_steps() -> None:
    mc, _ = labeller(script, soft=True)
    scorer = StepScorer(STEPS, [mc], None)
    context = RewardContext(0, 1)
    (scored,) = scorer(ends_in_z([group(output("ab.cd.ez"), output("w"))]), context, training=False)
    assert [[step.reward for step in score.steps] for score in scored.scores] == [[0.25, 0.0, 1.0], [0.0]]
    assert context.metrics["step_rewards/monte_carlo/mean"] == pytest.approx(1.25 / 4)
    mc.close()


class Unshared(NativeEngine):
    """Samples each full prefix as a prompt of its own."""

    def submit(self, request: Request) -> None:
        super().submit(replace(request, branch=None))


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_sampled_from_a_tree_or_not_labels_are_the_same(layout: Any) -> None:
    def continued(engine: NativeEngine) -> Iterator[Any]:
        sampling = Sampling(max_tokens=8)
        mc = MonteCarlo(Mailbox(engine), by_a, CODEC, STEPS, Completer(6, sampling, seed=5), soft=True)
        yield [(one.labels, one.tries) for one in mc.label(by_a(asked))]
        yield mc.tokens

    def by_a(groups: Iterable[Group]) -> list[ScoredGroup]:
        return [ScoredGroup(g, tuple(Score(float("a" in c.text)) for c in g.completions)) for g in groups]

    asked = [group(output("bc.de.f"), output("d.ef.g.hij", "length"), prompt=p, slot=i) for i, p in enumerate("qr")]
    policy = make_policy("mistral" if layout == "shared" else "llama", layout)
    found, expected = (list(continued(kind(policy, CODEC, max_live=9))) for kind in (NativeEngine, Unshared))
    assert found == expected
    assert len({label for labels, _ in found[0] for label in labels}) > 2


def test_an_engine_that_gives_too_few_is_found_out() -> None:
    class Lazy(ScriptedEngine):
        def poll(self, timeout: float | None = None) -> list[Sampled]:
            return super().poll(timeout) if len(self._waiting) > 1 else []

    mc, _ = labeller(script)
    mc.sampler = Mailbox(Lazy(lambda request, index: "a", CODEC))
    with pytest.raises(AssertionError, match="without finishing"):
        mc.label(ends_in_z([group(output("ab.c"))]))
