"""Many scores at once: in order, each different row once, whatever the passes are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from groupwise.reward_models.score import logits_of, scores_of, sigmoid
from groupwise.reward_models.text import Output, Steps
from tests.tiny_judges import judge, save_judge

OUTPUTS = [Output("ab", text) for text in ("c", "gh gh gh", "c", "", "abc", "gh gh gh", "d")]


def test_repeated_outputs_are_computed_once_and_get_the_same_bits(tmp_path: Path, monkeypatch) -> None:
    model = judge(save_judge(tmp_path, "outcome"), "outcome")
    seen: list[list[int]] = []
    logits = model.logits

    def counted(rows):
        seen.append([len(row.token_ids) for row in rows])
        return logits(rows)

    monkeypatch.setattr(model, "logits", counted)
    found, _ = scores_of(model, OUTPUTS, budget=24)
    assert found[0] == found[2]
    assert found[1] == found[5]
    assert seen == [[11, 6], [4, 4, 3]], "the longest first, each pass of at most 24 tokens"
    one_by_one = [scores_of(model, [output])[0][0] for output in OUTPUTS]
    assert torch.tensor(found) == pytest.approx(torch.tensor(one_by_one).numpy(), abs=1e-5)


def test_what_a_group_has_several_times_is_encoded_once(tmp_path: Path, monkeypatch) -> None:
    model = judge(save_judge(tmp_path, "process"), "process")
    asked: list[Steps] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda one: (asked.append(one), encode(one))[1])
    steps = [Steps(prompt, texts) for prompt in ("ab", "ab", "b") for texts in (("c", "d"), ("c",), ("c", "d"))]
    found, _ = scores_of(model, steps)
    assert asked == [steps[0], steps[1], steps[6], steps[7]]
    assert [found[i] for i in (0, 2, 3, 5)] == [found[0]] * 4
    assert found[6] == found[8] != found[0]


def test_a_row_beyond_the_budget_is_a_pass_of_its_own(tmp_path: Path) -> None:
    model = judge(save_judge(tmp_path, "outcome"), "outcome")
    rows = [model.encode(output) for output in OUTPUTS]
    assert logits_of(model, rows, budget=1) == pytest.approx(logits_of(model, rows), abs=1e-5)


def test_what_cannot_be_read_has_none_and_the_others_keep_their_places(tmp_path: Path) -> None:
    model = judge(save_judge(tmp_path, "process"), "process")
    model.limit = 8
    steps = [Steps("a", ("b", "c")), Steps("a", ("bcdefgh", "c")), Steps("a", ("d",)), Steps("a", ("?",))]
    found, unread = scores_of(model, steps)
    assert [None if one is None else len(one) for one in found] == [2, None, 1, None]
    assert "at most 8 fit" in unread[1]
    assert "'?'" in unread[3]
    assert found[2] == pytest.approx(scores_of(model, steps[2:3])[0][0], abs=1e-6)


@pytest.mark.parametrize("x", [-1000.0, -3.0, 0.0, 2.0, 1000.0])
def test_the_sigmoid(x: float) -> None:
    assert sigmoid(x) == pytest.approx(torch.tensor(x, dtype=torch.float64).sigmoid().item(), rel=1e-12)
    assert math.isnan(sigmoid(math.nan))
