"""From a job to objects: what each knob becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from groupwise.config import Job
from groupwise.errors import ConfigError, DataError, ModelError
from groupwise.models.load import load_policy
from groupwise.objective import PRESETS
from groupwise.tokenizer.codec import Codec
from groupwise.types import Sampling
from groupwise.wiring import memory, prompts
from groupwise.wiring.models import Model
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.settings import eval_sampling_of, objective_of, sampling_of
from tests.run.tiny import CONTEXT, save_model


def a_job(**sections: Any) -> Job:
    return Job.model_validate(sections)


def an_objective(**knobs: Any) -> Any:
    return objective_of(a_job(objective=knobs, sampling={"max_completion_length": 32}))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_alone_is_that_preset(name: str) -> None:
    found, preset = an_objective(preset=name), PRESETS[name]
    for field in ("baseline", "scale", "ratio", "surrogate", "weights", "kl", "beta", "epsilon", "epsilon_high"):
        assert getattr(found, field) == getattr(preset, field)
    assert found.max_completion_length == 32


def test_epsilon_is_both_ranges_where_the_preset_has_them_equal() -> None:
    both = an_objective(preset="grpo", epsilon=0.1)
    assert (both.epsilon, both.epsilon_high) == (0.1, 0.1)
    lower = an_objective(preset="dapo", epsilon=0.1)
    assert (lower.epsilon, lower.epsilon_high) == (0.1, 0.28)
    apart = an_objective(preset="grpo", epsilon=0.1, epsilon_high=0.3)
    assert (apart.epsilon, apart.epsilon_high) == (0.1, 0.3)


@pytest.mark.parametrize(
    "knob, value, field",
    [
        ("beta", 0.0, "beta"),
        ("kl", "k2", "kl"),
        ("dual_clip", 3.0, "dual_clip"),
        ("scale_rewards", "none", "scale"),
        ("importance_sampling", "token_mask", "importance_sampling"),
    ],
)
def test_a_knob_changes_its_field(knob: str, value: Any, field: str) -> None:
    assert getattr(an_objective(**{knob: value}), field) == value


def test_training_and_evaluation_sample_by_settings_of_their_own() -> None:
    job = a_job(
        sampling={"temperature": 0.7, "max_completion_length": 50, "stop": ["\n"]}, eval={"top_p": 0.9, "top_k": 5}
    )
    assert sampling_of(job) == Sampling(temperature=0.7, max_tokens=50, stop=("\n",))
    assert eval_sampling_of(job) == Sampling(temperature=0.0, top_p=0.9, top_k=5, max_tokens=50, stop=("\n",))
    longer = a_job(sampling={"max_completion_length": 50}, eval={"max_completion_length": 80, "temperature": 1.0})
    assert eval_sampling_of(longer) == Sampling(max_tokens=80)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = save_model(tmp_path_factory.mktemp("model"))
    return Model(load_policy(str(folder), device="cpu"), Codec.load(str(folder)), str(folder))


def with_rows(**sections: Any) -> Job:
    data = {"path": "python:rows", **sections.pop("data", {})}
    return a_job(data=data, reward={"functions": ["python:f"]}, **sections)


def test_prompts_leave_room_for_the_output(model: Model) -> None:
    objects = PythonObjects(rows=[{"prompt": "a" * length} for length in (CONTEXT - 16, CONTEXT - 15)])
    found = prompts.training_prompts(with_rows(sampling={"max_completion_length": 16}), model, objects)
    assert [len(prompt.token_ids) for prompt in found.prompts] == [CONTEXT - 16]
    assert found.dropped_long == 1


def test_held_out_prompts_leave_room_for_outputs_of_their_own_length(model: Model) -> None:
    objects = PythonObjects(eval_rows=[{"prompt": "a" * length} for length in (CONTEXT - 16, CONTEXT - 4)])
    job = with_rows(
        sampling={"max_completion_length": 16}, eval={"data": "python:rows", "max_completion_length": 4, "limit": 9}
    )
    found = prompts.held_out_prompts(job, model, objects)
    assert found is not None
    assert len(found.prompts) == 2


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"sampling": {"max_completion_length": CONTEXT}}, "`sampling.max_completion_length` = 64 leaves no room"),
        (
            {"sampling": {"max_completion_length": 32}, "data": {"max_prompt_length": 33}},
            r"no room for prompts of up to 33 tokens \(data.max_prompt_length\) in the model's context of 64 tokens",
        ),
    ],
)
def test_lengths_that_cannot_fit_are_refused(model: Model, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prompts.training_prompts(with_rows(**sections), model, PythonObjects(rows=[{"prompt": "a"}]))


def test_the_key_that_is_too_long_is_the_one_that_is_named(model: Model) -> None:
    job = with_rows(sampling={"max_completion_length": 8}, eval={"data": "python:rows", "max_completion_length": 64})
    with pytest.raises(ConfigError, match=r"`eval.max_completion_length` = 64"):
        prompts.held_out_prompts(job, model, PythonObjects(eval_rows=[{"prompt": "a"}]))


def test_another_split_of_the_same_data_is_of_the_same_revision(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    seen = []
    monkeypatch.setattr(prompts, "load_prompts", lambda section, *_, **__: seen.append(section))
    for path in ("org/data", "org/other"):
        data = {"path": "org/data", "revision": "v2", "subset": "main"}
        job = a_job(data=data, eval={"data": path, "split": "test"}, sampling={"max_completion_length": 8})
        prompts.held_out_prompts(job, model, PythonObjects())
    assert [(one.path, one.split, one.revision, one.subset) for one in seen] == [
        ("org/data", "test", "v2", "main"),
        ("org/other", "test", None, None),
    ]


def test_what_came_from_python_has_to_come_again(model: Model) -> None:
    with pytest.raises(DataError, match=r"hand it over again: data=rows"):
        prompts.training_prompts(with_rows(sampling={"max_completion_length": 8}), model, PythonObjects())


def check_memory(monkeypatch: pytest.MonkeyPatch, free_per_parameter: float, **knobs: Any) -> None:
    monkeypatch.setattr(memory, "parameter_count", lambda config: 1_000_000)
    monkeypatch.setattr(memory, "load_config", lambda *_, **__: None)
    monkeypatch.setattr(memory, "available_memory", lambda device: int(free_per_parameter * 1_000_000))
    memory.check_memory(a_job(model={"device": "cpu", **knobs.pop("model", {})}, objective=knobs), "org/base", False)


def test_a_model_that_cannot_be_trained_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masters, gradients and two means: 16 bytes a parameter; 2 more where there is a narrow copy."""
    check_memory(monkeypatch, 16.01, beta=0.0)
    with pytest.raises(ModelError, match=r"org/base does not fit on cpu: 16.0 MB are needed .* 1.0M parameters"):
        check_memory(monkeypatch, 15.99, beta=0.0)
    with pytest.raises(ModelError, match=r"18\.0 MB"):
        check_memory(monkeypatch, 17.99, beta=0.0, model={"dtype": "bfloat16"})


def test_beta_without_room_for_a_reference_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory(monkeypatch, 20.01, beta=0.04)
    with pytest.raises(ConfigError, match=r"`objective.beta` = 0.04 needs a reference .* no room for its 4.0 MB"):
        check_memory(monkeypatch, 19.99, beta=0.04)


def test_free_memory_is_what_the_machine_says() -> None:
    assert 1e6 < memory.available_memory(torch.device("cpu")) < 1e15
