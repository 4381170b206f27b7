"""The reward model's learner: its losses and gradients by the formula, its rounds to the bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.errors import DataError, ModelError, RunFolderError
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.reward_models.learner import (
    Encoded,
    RewardLearner,
    RewardLearnerSettings,
    encode_examples,
    micro_batches,
    updates_in,
)
from groupwise.reward_models.text import Graded, Output, Preferred, Row, Steps, Stepwise
from tests.tiny_judges import pupil, save_judge

LETTERS = "abcdefgh"
GRADED = [
    Graded(Output(first, second * n), float(second < "e")) for n, first in enumerate("abc", 1) for second in LETTERS
]
PAIRS = [Preferred(Output(letter, "a" * n), Output(letter, "h")) for n, letter in enumerate(LETTERS, 1)]
STEPS = [Stepwise(Steps(x, ("ab", y * 3, "c")), (1.0, float(y < "e"), None)) for x in "ab" for y in LETTERS]
SETS: dict[str, tuple[str, list[Any]]] = {
    "labels": ("outcome", GRADED), "pairs": ("outcome", PAIRS), "steps": ("process", STEPS)
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("judges")
    return {kind: save_judge(at / kind, kind) for kind in ("outcome", "process", "causal")}


def learner(folder: Path, kind: Any, *, rate: float = 1e-3, **settings: Any) -> RewardLearner:
    made = RewardLearnerSettings(OptimizerSettings(rate, total_updates=100), **{"batch_size": 5, **settings})
    return RewardLearner(pupil(folder, kind), made)


def gradients(of: RewardLearner, examples: list[Any]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradients of an update over all examples, taken before the optimizer uses them."""
    taken: dict[str, torch.Tensor] = {}
    step = of.optimizer.step

    def spy() -> tuple[float, float]:
        taken.update({name: p.grad.clone() for name, p in of.model.model.named_parameters()})
        return step()

    of.optimizer.step = spy  # type: ignore[method-assign]
    encoded = encode_examples(of.model, examples).examples
    of.settings = dataclasses.replace(of.settings, batch_size=len(encoded))
    [metrics] = of.updates(encoded)
    return taken, metrics


def by_hand(folder: Path, kind: Any, examples: list[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss, one row at a time by the stock model, and its gradients."""
    model = pupil(folder, kind)

    def score(judged: Any) -> torch.Tensor:
        row = model.encode(judged)
        logits = model.model(input_ids=torch.tensor([row.token_ids]), use_cache=False).logits[0]
        return logits if kind == "outcome" else logits[list(row.places)].log_softmax(-1)

    terms = []
    for one in examples:
        if isinstance(one, Preferred):
            terms.append(-torch.nn.functional.logsigmoid(score(one.chosen) - score(one.rejected))[0])
        elif isinstance(one, Graded):
            p = score(one.output).sigmoid()[0]
            terms.append(-(one.label * p.log() + (1 - one.label) * (1 - p).log()))
        else:
            logs = score(one.steps)
            terms += [-(y * logs[j, 1] + (1 - y) * logs[j, 0]) for j, y in enumerate(one.labels) if y is not None]
    loss = torch.stack(terms).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.model.named_parameters()}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("budget", [16384, 20])
def test_loss_and_gradient_are_those_of_the_formula_however_it_is_cut(folders, name: str, budget: int) -> None:
    kind, examples = SETS[name]
    soft = [dataclasses.replace(one, label=0.25) if isinstance(one, Graded) else one for one in examples[:3]]
    examples = soft + examples[3:]
    loss, expected = by_hand(folders[kind], kind, examples)
    found, metrics = gradients(learner(folders[kind], kind, tokens_per_micro_batch=budget), examples)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in expected.items():
        # Keys take no gradient from softmax's bias; what is 0 by symmetry is noise here and there.
        assert found[parameter] == pytest.approx(gradient.numpy(), abs=2e-6 + 1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("name", SETS)
def test_stopped_anywhere_and_restored_it_is_the_same_round(folders, name: str) -> None:
    kind, examples = SETS[name]
    whole = learner(folders[kind], kind, epochs=2)
    events: list[dict[str, float]] = []
    whole.fit(examples, events.append)
    total = updates_in(len(examples), whole.settings)
    assert len(events) == total == 2 * math.ceil(len(examples) / 5)
    first = learner(folders[kind], kind, epochs=2)
    stopped_at = total - 2
    updates = first.updates(encode_examples(first.model, examples).examples)
    seen = [next(updates) for _ in range(stopped_at)]
    assert (first.version, first.done) == (0, stopped_at)
    tensors, counters = first.state_dict()
    saved = {stem: {name: t.clone() for name, t in named.items()} for stem, named in tensors.items()}
    second = learner(folders[kind], kind, epochs=2)
    second.load_state_dict(saved, counters)
    second.fit(examples, seen.append)
    assert seen == events
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours[1] == theirs[1]
    for stem, named in theirs[0].items():
        assert all(tensor.equal(ours[0][stem][key]) for key, tensor in named.items()), stem


def test_a_round_counts_one_version_and_the_next_has_another_order(folders) -> None:
    model = learner(folders["outcome"], "outcome")
    encoded = encode_examples(model.model, GRADED).examples
    first = list(model._batches(encoded, 1))
    assert sorted(one for batch in first for one in batch) == sorted(encoded)
    assert [len(batch) for batch in first] == [5, 5, 5, 5, 4]
    found = model.fit(GRADED)
    assert [len(batch) for batch in model._batches(encoded, 2)] == [5, 5, 5, 5, 4] * 2
    assert (model.version, model.done, found["version"], found["updates"]) == (1, 0, 1.0, 5.0)
    assert list(model._batches(encoded, 1)) != first
    assert list(learner(folders["outcome"], "outcome")._batches(encoded, 1)) == first
    assert list(learner(folders["outcome"], "outcome", seed=1)._batches(encoded, 1)) != first


@pytest.mark.parametrize("name", SETS)
def test_it_learns_what_can_be_told_apart(folders, name: str) -> None:
    kind, examples = SETS[name]
    model = learner(folders["causal"], kind, rate=3e-3, epochs=20, batch_size=8)
    before = model.evaluate(examples)
    model.fit(examples)
    after = model.evaluate(examples)
    assert after["accuracy"] > 0.95 > before["accuracy"]
    assert after["loss"] < 0.3 * before["loss"]
    if kind == "process":
        assert after["first_error_found"] > 0.9
        assert after["step_f1"] > 0.9


def test_scores_are_logits_of_outputs_and_probabilities_of_steps(folders) -> None:
    outcome = learner(folders["outcome"], "outcome")
    rows = [outcome.model.encode(Output("a", text)) for text in ("b", "cc")]
    expected = outcome.model.logits(rows).tolist()
    assert outcome.score_outputs([Output("a", "b"), Output("a", "?"), Output("a", "cc")]) == pytest.approx(
        [expected[0], None, expected[1]], abs=1e-6
    )
    process = learner(folders["process"], "process")
    [scores] = process.score_steps([Steps("a", ("b", "c"))])
    logits = process.model.logits([process.model.encode(Steps("a", ("b", "c")))])
    assert scores == pytest.approx(logits.sigmoid().tolist(), abs=1e-6)


def test_dropout_is_off_while_it_trains(tmp_path: Path) -> None:
    folder = save_judge(tmp_path, "process", classifier_dropout=0.5)
    assert learner(folder, "process").evaluate(STEPS) == learner(folder, "process").evaluate(STEPS)
    found = [gradients(learner(folder, "process"), STEPS)[1]["loss"] for _ in range(2)]
    assert found[0] == found[1]
    assert pupil(folder, "process").model.config.classifier_dropout == 0.5, "what is saved says what it said"


def test_what_cannot_be_read_is_left_out_and_counted(folders) -> None:
    model = learner(folders["outcome"], "outcome")
    bad = [Graded(Output("a", "?"), 1.0), Graded(Output("a", "a" * 80), 0.0)]
    found = encode_examples(model.model, [*bad, *GRADED])
    assert (len(found.examples), found.dropped) == (len(GRADED), 2)
    assert "'?'" in found.reason
    assert model.fit([*bad, *GRADED])["dropped"] == 2.0
    with pytest.raises(DataError, match="All 2 examples were left out, the first because"):
        model.fit(bad)
    with pytest.raises(DataError, match="nothing for a reward model"):
        model.evaluate([])
    process = learner(folders["process"], "process")
    with pytest.raises(DataError, match="None of its steps has a label"):
        process.fit([Stepwise(Steps("a", ("b",)), (None,))])


def test_a_round_is_not_gone_on_with_on_other_examples(folders) -> None:
    model = learner(folders["outcome"], "outcome")
    next(model.updates(encode_examples(model.model, GRADED).examples))
    with pytest.raises(RunFolderError, match="begun on other examples"):
        model.fit(GRADED[:-1])


def test_a_checkpoint_of_another_reward_model_is_refused(folders, tmp_path: Path) -> None:
    tensors, counters = learner(folders["process"], "process").state_dict()
    with pytest.raises(RunFolderError, match=r"another reward model: kind process.*kind outcome"):
        learner(folders["outcome"], "outcome").load_state_dict(tensors, counters)
    smaller = save_judge(tmp_path, "process", hidden_size=16, head_dim=8)
    with pytest.raises(RunFolderError, match=r"embed_tokens\.weight is \[.*, 32\].*\[.*, 16\]"):
        learner(smaller, "process").load_state_dict(tensors, counters)


def test_numbers_that_are_none_end_the_training(folders) -> None:
    model = learner(folders["outcome"], "outcome")
    with torch.no_grad():
        model.model.model.score.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="loss became nan at update 1"):
        model.fit(GRADED)
    with pytest.raises(ModelError, match="scores that are not finite"):
        model.evaluate(GRADED)


def test_passes_keep_pairs_together_and_keep_within_the_budget() -> None:
    def example(*lengths: int) -> Encoded:
        return Encoded(tuple(Row((0,) * n) for n in lengths), ())

    examples = [example(3, 5), example(2, 2), example(9, 1), example(5, 5)]
    parts = list(micro_batches(examples, 20))
    assert parts == [[examples[2]], [examples[0], examples[3]], [examples[1]]]
    assert list(micro_batches(examples, 1)) == [[examples[2]], [examples[0]], [examples[3]], [examples[1]]]
