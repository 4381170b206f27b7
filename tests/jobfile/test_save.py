from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.config import Job, knobs
from groupwise.jobfile import Difference, differences, load_job, resumable_keys, to_toml
from groupwise.jobfile.presets import VALUES

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


def test_what_is_saved_is_what_was_resolved(tmp_path):
    resolved = load_job(
        overrides=["objective.preset=deepseekmath", "train.max_grad_norm=inf", "train.steps=3"],
        options={"model": "m", "data": "d.jsonl", "reward": ["a.py:f", "b.py:g"], "weights": [1, 0.5]},
    )
    (tmp_path / "job.toml").write_text(to_toml(resolved.job), encoding="utf-8")
    again = load_job(tmp_path / "job.toml").job
    assert again == resolved.job
    assert again.train.max_grad_norm == inf


@given(stop=st.lists(texts), path=texts, rate=st.floats(1e-12, 1e12), options=st.dictionaries(texts, texts))
@settings(max_examples=50, deadline=None)
def test_any_text_and_number_survives(tmp_path_factory, stop, path, rate, options):
    job = Job(
        model={"path": path},
        objective=VALUES["grpo"],
        sampling={"stop": stop},
        train={"learning_rate": rate},
        data={"chat_template_kwargs": options},
    )
    file = tmp_path_factory.mktemp("run") / "job.toml"
    file.write_bytes(to_toml(job).encode())
    assert load_job(file).job == job


def test_every_default_is_written_out():
    text = to_toml(Job())
    defaults = Job().model_dump()
    for key in knobs():
        section, _, name = key.rpartition(".")
        written = (defaults[section] if section else defaults)[name] is not None and name != "chat_template_kwargs"
        assert not written or f"{name} = " in text


def test_differences_say_what_changed_and_whether_a_resume_allows_it():
    old = Job()
    new = Job(seed=1, train={"steps": 200}, objective={"beta": 0.0})
    assert differences(old, old) == []
    assert differences(old, new) == [
        Difference("seed", 0, 1, resumable=False),
        Difference("objective.beta", None, 0.0, resumable=False),
        Difference("train.steps", 100, 200, resumable=True),
    ]


@pytest.mark.parametrize(
    "key", ["seed", "model.path", "sampling.num_generations", "objective.preset", "objective.beta"]
)
def test_what_decides_the_result_cannot_change_on_resume(key):
    assert key not in resumable_keys()


@pytest.mark.parametrize("key", ["run", "train.steps", "checkpoint.every", "train.tokens_per_micro_batch"])
def test_how_long_and_where_it_runs_can_change_on_resume(key):
    assert key in resumable_keys()
