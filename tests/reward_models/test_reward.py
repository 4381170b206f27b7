"""Reward models as rewards, whatever tokenizer the policy has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from groupwise.demo.model import character_tokenizer
from groupwise.errors import ModelError, RewardError
from groupwise.reward_models.reward import ModelReward, ModelStepReward
from groupwise.rewards.combine import score_groups
from groupwise.rewards.functions.load import load_reward
from groupwise.rewards.steps import by_pattern
from groupwise.rewards.stepwise import StepScorer
from groupwise.tokenizer.codec import Codec
from groupwise.types import Completion, Group, GroupKey, Prompt, Score, ScoredGroup
from groupwise.watch.metrics import unknown
from groupwise.wiring.reward_models import ModelOptions, open_reward, open_step_reward
from tests.rewards.groups import flat, group, listening
from tests.tiny_judges import ALPHABET, judge, save_judge, stock_logits
from tests.tiny_tokenizers import wrapped

TOKENIZER = character_tokenizer(ALPHABET)
END = TOKENIZER.eos_token_id
CPU = ModelOptions(device="cpu")
GROUPS = [group("a", "bb", "a", prompt="ab"), group("gh gh", "bb", prompt="cd", slot=1)]


def spanning() -> Codec:
    """A policy's tokenizer in which a line break and the `b` after it are one token."""
    vocab = {"<end>": 0, "a": 1, "b": 2, "\n": 3, "\nb": 4}
    core = Tokenizer(models.BPE(vocab, [("\n", "b")]))
    core.decoder = decoders.Fuse()
    return Codec(wrapped(core, eos_token="<end>"))


def sampled(codec: Codec, *texts: str) -> list[ScoredGroup]:
    """A group of outputs as the policy's tokens."""
    outputs = [Completion((*codec.encode_text(text), 0), text, (), "stop") for text in texts]
    one = Group(GroupKey(0, 0, "row"), Prompt("row", "ab", codec.encode_text("ab")), tuple(outputs))
    return [ScoredGroup(one, tuple(Score(None) for _ in outputs))]


def expected_score(folder: Path, text: str) -> float:
    return stock_logits(folder, "outcome", [*TOKENIZER(text)["input_ids"], END]).item()


def spoil(folder: Path) -> None:
    """Put a NaN into the head."""
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_outputs_are_scored_by_name_in_one_call(tmp_path: Path, monkeypatch) -> None:
    folder = save_judge(tmp_path / "mine", "outcome")
    reward = open_reward(f"model:{folder}", models=CPU)
    assert isinstance(reward, ModelReward)
    calls: list[Sequence[object]] = []
    logits = reward.model.logits
    monkeypatch.setattr(reward.model, "logits", lambda rows: calls.append(rows) or logits(rows))
    context, told = listening()
    found = flat(reward(GROUPS, context))
    texts = ["aba", "abbb", "aba", "cdgh gh", "cdbb"]
    assert found == pytest.approx([expected_score(folder, text) for text in texts], abs=1e-5)
    assert found[0] == found[2]
    assert [len(rows) for rows in calls] == [4], "both groups in one pass, the repeated output once"
    assert context.metrics == {"rewards/mine/version": 0.0, "rewards/mine/unread": 0.0}
    right = context.extras.pop("mine/right")
    assert right == pytest.approx([1 / (1 + math.exp(-score)) for score in found])
    assert context.extras == {"mine/version": [0] * 5}
    assert (told, unknown(context.metrics)) == ([], [])


def test_a_model_is_mixed_with_functions_by_weights(tmp_path: Path) -> None:
    folder = save_judge(tmp_path / "mine", "outcome")
    rewards = [open_reward(f"model:{folder}", models=CPU), load_reward(lambda prompt, completion: len(completion))]
    context, _ = listening()
    scored = score_groups(GROUPS, rewards, [2.0, 0.5], context)
    score = scored[0].scores[1]
    assert score.parts["mine"] == pytest.approx(expected_score(folder, "abbb"), abs=1e-5)
    assert score.reward == pytest.approx(2 * score.parts["mine"] + 0.5 * 2)
    assert context.metrics["rewards/mine/version"] == 0.0


def test_an_output_that_cannot_be_read_is_not_scored_and_told_of_once(tmp_path: Path) -> None:
    reward = ModelReward(judge(save_judge(tmp_path / "mine", "outcome"), "outcome"))
    context, told = listening()
    for _ in range(2):
        values = reward([group("a", "a" * 100, "?", prompt="b")], context)
    assert [value is None for value in flat(values)] == [False, True, True]
    assert context.metrics["rewards/mine/unread"] == 2.0
    [warning] = told
    assert "at most 64 fit" in warning
    assert "output 2 of 3" in warning


def test_a_truncated_output_has_no_end_token(tmp_path: Path) -> None:
    folder = save_judge(tmp_path, "outcome")
    reward = ModelReward(judge(folder, "outcome"))
    cut = Completion((1,), "a", (), "length")
    one = Group(GroupKey(0, 0, "row"), Prompt("row", "b", (1,)), (cut,))
    expected = stock_logits(folder, "outcome", TOKENIZER("ba")["input_ids"]).item()
    assert flat(reward([one], listening()[0])) == pytest.approx([expected], abs=1e-5)


def test_what_is_remarkable_about_a_model_is_said_once(tmp_path: Path) -> None:
    reward = ModelReward(judge(save_judge(tmp_path / "theirs", "outcome", pad_token_id=END), "outcome"))
    context, told = listening()
    for _ in range(2):
        reward(GROUPS, context)
    [warning] = told
    assert warning.startswith("reward model `theirs`: ")
    assert f"names as padding the token that its rows end with ({END})" in warning


def test_steps_keep_their_characters_under_another_tokenizer(tmp_path: Path) -> None:
    """A token of the policy lies across the end of the first step; the reward model's rows know nothing of it."""
    folder, policy = save_judge(tmp_path / "prm", "process"), spanning()
    texts = "a\nba", "ab\na\n", "aa"
    assert policy.encode_text(texts[0]) == (1, 4, 1)
    reward = open_step_reward(f"model:{folder}", models=CPU)
    assert isinstance(reward, ModelStepReward)
    context, _ = listening()
    [scored] = StepScorer(by_pattern(policy, "\n"), [reward], None)(sampled(policy, *texts), context, training=True)
    rows = ["aba\nba\n", "abab\na\n", "abaa\n"]
    judged = [(3, 6), (4, 6), (4,)]
    expected = []
    for row, places in zip(rows, judged, strict=True):
        logits = stock_logits(folder, "process", TOKENIZER(row)["input_ids"])
        expected.append(logits.softmax(-1)[list(places), 1].tolist())
    assert [[end for end, _ in steps] for steps in scored.steps] == [[2, 4], [3, 6], [3]]
    for steps, values in zip(scored.steps, expected, strict=True):
        assert [reward for _, reward in steps] == pytest.approx(values, abs=1e-6)
    assert context.metrics["step_rewards/prm/version"] == 0.0
    assert context.extras["prm/version"] == [0, 0, 0]
    assert unknown(context.metrics) == []


def test_a_causal_model_with_tags_scores_steps(tmp_path: Path) -> None:
    folder = save_judge(tmp_path, "causal")
    options = ModelOptions(device="cpu", step_tags=["#", "+", "-"])
    reward = open_step_reward(f"model:{folder}", models=options)
    policy = spanning()
    [scored] = StepScorer(by_pattern(policy, "\n"), [reward], None)(
        sampled(policy, "a\nba"), listening()[0], training=True
    )
    logits = stock_logits(folder, "causal", TOKENIZER("ab a #\nba #")["input_ids"])[[5, 10]]
    plus, minus = TOKENIZER("+-")["input_ids"]
    expected = logits[:, [plus, minus]].softmax(-1)[:, 0].tolist()
    assert [reward for _, reward in scored.steps[0]] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ModelError, match=r"set reward\.step_tags"):
        open_step_reward(f"model:{folder}", models=CPU)


def test_an_output_whose_steps_cannot_be_read_has_no_score_at_any(tmp_path: Path) -> None:
    model = judge(save_judge(tmp_path, "process"), "process")
    model.limit = 6
    policy = spanning()
    scorer = StepScorer(by_pattern(policy, "\n"), [ModelStepReward(model)], None)
    [scored] = scorer(sampled(policy, "a\na", "a\naaaaa"), listening()[0], training=True)
    assert [[reward is None for _, reward in steps] for steps in scored.steps] == [[False, False], [True, True]]


def test_a_number_that_is_none_names_the_model_and_the_output(tmp_path: Path) -> None:
    for kind in ("outcome", "process"):
        spoil(save_judge(tmp_path / kind, kind))
    with pytest.raises(RewardError, match=r"(?s)`outcome` returned nan.*row-0.*output 1 of 3"):
        open_reward(f"model:{tmp_path / 'outcome'}", models=CPU)(GROUPS, listening()[0])
    policy = spanning()
    scorer = StepScorer(by_pattern(policy, "\n"), [open_step_reward(f"model:{tmp_path / 'process'}", models=CPU)], None)
    with pytest.raises(RewardError, match=r"(?s)reward model `process` returned nan.*output 1 of 1"):
        scorer(sampled(policy, "a"), listening()[0], training=True)


def test_each_score_says_which_version_gave_it(tmp_path: Path) -> None:
    """A model that is being trained is met as it is at each call."""
    model = judge(save_judge(tmp_path, "outcome"), "outcome")
    reward = ModelReward(model, "learned")
    before, context = flat(reward(GROUPS, listening()[0])), listening()[0]
    model.version += 1
    with torch.no_grad():
        model.model.score.weight.mul_(2)
    after = flat(reward(GROUPS, context))
    assert after == pytest.approx([2 * value for value in before], abs=1e-5)
    assert context.metrics["rewards/learned/version"] == 1.0
    assert context.extras["learned/version"] == [1] * 5


def test_a_run_folder_stands_for_its_model(tmp_path: Path) -> None:
    save_judge(tmp_path / "run" / "model", "outcome")
    reward = open_reward(f"model:{tmp_path / 'run'}", models=CPU)
    assert reward.name == "run"
    assert isinstance(reward, ModelReward)
    with pytest.raises(ModelError, match="is no folder"):
        open_reward(f"model:{tmp_path / 'nothing'}", models=CPU)
