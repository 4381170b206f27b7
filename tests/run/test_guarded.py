"""Outputs of an engine that a policy scores again: what agrees passes, what does not ends in an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import groupwise
from groupwise.engines.mailbox import Mailbox, generate
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.native.plain_decoder import PlainDecoder
from groupwise.errors import ModelError
from groupwise.learn.agreement import Guard
from groupwise.models.load import load_policy
from groupwise.run.guarded import GuardedSampler
from groupwise.tokenizer.codec import Codec
from groupwise.types import Request, Sampling
from tests.run.tiny import save_model, save_rewards, save_rows

SETTINGS = [
    Sampling(max_tokens=20), Sampling(temperature=0, max_tokens=20), Sampling(temperature=0.6, max_tokens=20),
    Sampling(temperature=1.3, top_p=0.7, max_tokens=20), Sampling(top_k=3, min_p=0.1, max_tokens=20),
]  # fmt: skip
Spoil = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def sampler_over(model: Path, layout: Any = "auto") -> tuple[GuardedSampler, list[str]]:
    warnings: list[str] = []
    loaded = load_policy(str(model), device="cpu", layout=layout)
    for parameter in loaded.policy.parameters():
        parameter.data *= 3  # so that distributions are far from flat
    own = NativeEngine(loaded.policy, Codec.load(str(model)))
    return GuardedSampler(Mailbox(own), Guard(loaded.policy, warnings.append), "In held-out outputs"), warnings


def requests(sampling: Sampling) -> list[Request]:
    return [Request(str(i), tuple(range(2, 3 + 2 * i)), 3, sampling, 7 * i) for i in range(1, 4)]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_what_the_policy_sampled_itself_passes(model: Path, layout: str, sampling: Sampling) -> None:
    sampler, warnings = sampler_over(model, layout)
    outputs = generate(sampler, requests(sampling))
    assert [len(of_request) for of_request in outputs] == [3, 3, 3]
    assert warnings == []


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_a_sampler_that_computes_something_else_is_found(
    model: Path, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PlainDecoder.step
    monkeypatch.setattr(PlainDecoder, "step", lambda self, token_R: step(self, token_R).roll(1, -1))
    sampler, _ = sampler_over(model, "plain")
    with pytest.raises(ModelError, match=r"In held-out outputs, log-probs of .* Qwen3ForCausalLM in the plain layout"):
        generate(sampler, requests(sampling))


def test_a_sampler_answers_several_and_again(model: Path) -> None:
    sampler, warnings = sampler_over(model)
    first = sampler.ask(requests(SETTINGS[0]))
    while sampler.take(first, timeout=0.0) is None:
        pass
    assert len(generate(sampler, requests(SETTINGS[1]))) == 3
    assert warnings == []


def job_of(tmp_path: Path, model: Path) -> dict[str, Any]:
    rows = save_rows(tmp_path / "rows.jsonl")
    return {
        "model": str(model), "data": str(rows), "reward": f"{save_rewards(tmp_path / 'rewards.py')}:share",
        "max_completion_length": 8, "num_generations": 4, "prompts_per_step": 2, "device": "cpu", "layout": "plain",
        "show": "quiet",
    }  # fmt: skip


def spoil_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PlainDecoder.step
    monkeypatch.setattr(PlainDecoder, "step", lambda self, token_R: step(self, token_R) * 3)


def test_a_run_ends_before_its_first_update(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_sampling(monkeypatch)
    with pytest.raises(ModelError, match="Sampler and trainer disagree: In the outputs of this step"):
        groupwise.train(run=tmp_path / "run", overrides=["train.steps=2"], **job_of(tmp_path, model))
    assert not list((tmp_path / "run").glob("checkpoints/step-0000000[12]"))


def test_so_does_its_first_evaluation(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_sampling(monkeypatch)
    job = job_of(tmp_path, model)
    with pytest.raises(ModelError, match="In held-out outputs"):
        groupwise.train(run=tmp_path / "run", eval_data=job["data"], overrides=["train.steps=2"], **job)


def test_and_labels_by_continuations(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_sampling(monkeypatch)
    job = job_of(tmp_path, model)
    with pytest.raises(ModelError, match="In outputs and continuations"):
        groupwise.label(
            model=job["model"], data=job["data"], reward=job["reward"], output=tmp_path / "labels.jsonl", n=2, limit=3,
            overrides=["sampling.max_completion_length=8", "model.layout='plain'", "model.device='cpu'"],
        )  # fmt: skip


def test_importance_sampling_lets_it_go_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil_sampling(monkeypatch)
    job = job_of(tmp_path, model) | {"show": "plain", "importance_sampling": "token_truncate"}
    result = groupwise.train(run=tmp_path / "run", overrides=["train.steps=2"], **job)
    assert result.steps == 2
    assert "".join(capfd.readouterr()).count("sampler and trainer are further apart") == 1
