"""Laying out some of a batch's outputs, and their log-probs without gradient."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from groupwise.learn.forward import lay_out, score_outputs
from groupwise.learn.pack import Batch, pack
from groupwise.models.layout import Stream
from groupwise.models.policy import LayoutName, Policy
from tests.learn.tiny import EVERYTHING, some_credit, some_groups, stock_logprobs, tiny_policy

both_layouts = pytest.mark.parametrize("layout", ["shared", "plain"])


@cache
def exact(layout: LayoutName) -> Policy:
    return tiny_policy(layout=layout)


@cache
def batch() -> Batch:
    groups = some_groups(exact("plain"), 0.7)
    return pack(groups, some_credit(groups), temperature=0.7, mask_truncated=False, dtype=torch.float64)


@both_layouts
@pytest.mark.parametrize("members", [range(13), [12, 0, 7, 1, 10, 5], [4]])
def test_every_output_token_knows_its_place(layout: LayoutName, members: list[int]) -> None:
    stream, place = lay_out(exact(layout), batch().outputs, members)
    flat = torch.tensor([token for output in batch().outputs for token in output.token_ids])
    assert stream.target_T.tolist() == flat[place].tolist()
    wanted = {batch().outputs[m].start + t for m in members for t in range(len(batch().outputs[m].token_ids))}
    assert sorted(place.tolist()) == sorted(wanted)


@both_layouts
@pytest.mark.parametrize("budget", [1, 25, EVERYTHING])
def test_log_probs_are_those_of_the_stock_model(layout: LayoutName, budget: int) -> None:
    with torch.no_grad():
        expected_T = stock_logprobs(exact("plain").model, batch())
    found_T = score_outputs(exact(layout), batch(), budget)
    assert (found_T - expected_T).abs().max() < 1e-12
    assert not found_T.requires_grad


@both_layouts
def test_outputs_that_nobody_asked_for_are_not_forwarded(layout: LayoutName) -> None:
    everything_T = score_outputs(exact(layout), batch(), EVERYTHING)
    some_T = score_outputs(exact(layout), batch(), EVERYTHING, [2, 9])
    asked_T = (batch().completion_T == 2) | (batch().completion_T == 9)
    assert (some_T - everything_T)[asked_T].abs().max() < 1e-12
    assert torch.equal(some_T[~asked_T], torch.zeros_like(some_T[~asked_T]))


@both_layouts
@pytest.mark.parametrize("budget", [30, 60])
def test_no_forward_pass_is_larger_than_the_budget(
    layout: LayoutName, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = exact(layout)
    seen: list[Stream] = []
    forward = policy.forward

    def watched(stream: Stream, temperature: float) -> object:
        seen.append(stream)
        return forward(stream, temperature)

    monkeypatch.setattr(policy, "forward", watched)
    score_outputs(policy, batch(), budget)
    assert len(seen) > 1
    assert max(stream.tokens for stream in seen) <= budget
