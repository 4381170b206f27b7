"""Objects of a notebook given to the functions of the package: data sets work, loaded models get a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import groupwise
from groupwise.errors import ConfigError, DataError
from tests.run.tiny import rollouts, save_model

ROWS = [{"prompt": a + b, "want": "a", "note": "x"} for a in "abcd" for b in "ab"]
SMALL: dict[str, Any] = {
    "num_generations": 2, "max_completion_length": 4, "prompts_per_step": 2, "steps": 1, "show": "quiet",
}  # fmt: skip


def share(prompt: str, completion: str, want: str) -> float:
    return completion.count(want) / max(1, len(completion))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("given") / "model")


def test_a_generator_is_read_once_and_trained_on_whole(model: Path, tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from ROWS

    groupwise.train(model=model, data=rows(), reward=share, run=tmp_path / "run", **SMALL)
    assert len(rollouts(tmp_path / "run")) == 2


def test_splits_are_picked_by_the_jobs_keys(model: Path, tmp_path: Path) -> None:
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS[:4]), "test": datasets.Dataset.from_list(ROWS[4:])}
    )
    run = tmp_path / "run"
    groupwise.train(
        model=model, data=both, eval_data=both, reward=share, run=run,
        overrides=["data.split=test", "eval.split=train"], **SMALL,
    )  # fmt: skip
    assert {line["prompt"] for line in rollouts(run)} <= {row["prompt"] for row in ROWS[4:]}
    with pytest.raises(DataError, match=r"no split 'dev'; it has 'train', 'test'\. Name one in `eval\.split`"):
        groupwise.train(
            model=model, data=both, eval_data=both, reward=share, run=tmp_path / "other",
            overrides=["eval.split=dev"], **SMALL,
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"`data\.split` = \"test\" has no effect beside rows from Python"):
        groupwise.train(model=model, data=ROWS, reward=share, overrides=["data.split=test"], **SMALL)


def test_columns_that_nothing_reads_are_named_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = SMALL | {"show": "plain"}
    groupwise.train(model=model, data=ROWS, reward=share, run=tmp_path / "run", **options)
    assert capsys.readouterr().out.count("the column 'note' of the data is read by nothing") == 1

    def all_of_them(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    groupwise.train(model=model, data=ROWS, reward=all_of_them, run=tmp_path / "all", **options)
    assert "read by nothing" not in capsys.readouterr().out


@pytest.mark.parametrize("call", ["train", "doctor", "plan", "evaluate", "sample", "label"])
def test_a_loaded_model_gets_one_sentence(call: str, model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    calls = {"evaluate": ((loaded,), {}), "sample": ((loaded, "a"), {}), "label": ((), {"output": "labels.jsonl"})}
    given, options = calls.get(call, ((), {}))
    if not given:
        options = options | {"model": loaded, "data": ROWS, "reward": share}
    with pytest.raises(ConfigError, match="got a loaded Qwen3ForCausalLM, and a run begins from a folder") as caught:
        getattr(groupwise, call)(*given, **options)
    assert f'model="{model}" takes that' in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", ["tokenizer", "processing_class"])
def test_a_loaded_tokenizer_gets_one_sentence(name: str, model: Path) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` got a loaded .*, and a run begins from a folder"):
        groupwise.train(model=model, data=ROWS, reward=share, **{name: AutoTokenizer.from_pretrained(model)})


def test_options_of_a_template_that_renders_no_prompt_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`data\.chat_template_kwargs` \(mood\) has no effect: every prompt is a text"
    ):
        groupwise.train(
            model=model, data=ROWS, reward=share, run=tmp_path / "run", chat_template_kwargs={"mood": "calm"}, **SMALL
        )


@pytest.mark.parametrize("key", ["chat", "drop_answer"])
def test_a_key_that_no_prompt_gives_an_effect_is_refused(key: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    with pytest.raises(ConfigError, match=rf"`data\.{key}` = true has no effect: .*no prompt of the data"):
        groupwise.train(model=folder, data=rows, reward=share, run=tmp_path / "run", **{key: True}, **SMALL)


def test_an_answer_or_a_text_in_one_row_is_effect_enough(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    answered = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    rows = [*ROWS, {"prompt": answered, "want": "a", "note": "x"}]
    groupwise.train(model=folder, data=rows, reward=share, run=tmp_path / "run", chat=True, drop_answer=True, **SMALL)
    assert len(rollouts(tmp_path / "run")) == 2


def test_the_doctor_names_columns_that_nothing_reads_and_prompts_that_are_in_both(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = {name: value for name, value in SMALL.items() if name != "show"}
    groupwise.doctor(model=model, data=ROWS, eval_data=ROWS[:3], reward=share, **small)
    said = capfd.readouterr().err
    assert "the column 'note' of the data is read by nothing" in said
    assert "All 3 held-out prompts are among those that are trained on" in said


def test_held_out_prompts_that_are_trained_on_are_counted(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS[:2], {"prompt": "dd", "want": "a"}]
    groupwise.train(model=model, data=ROWS, eval_data=rows, reward=share, run=tmp_path / "run", **SMALL)
    assert "2 of 3 held-out prompts are among those that are trained on" in capfd.readouterr().err
