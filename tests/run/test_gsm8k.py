"""GSM8K as people have it, local, by the shipped recipe: a text becomes a chat, `#### 42` is what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

import groupwise
from tests.run.tiny import events, rollouts, save_model, save_rows

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
ROWS = [
    {"question": f"Tom has {n} eggs and buys 1.", "answer": f"{n}+1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
    for n in range(4)
]
SMALL = ["sampling.num_generations=4", "sampling.max_completion_length=4", "train.prompts_per_step=2", "train.steps=2"]
SMALL += ["train.warmup_steps=0"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A chat model of characters."""
    folder = save_model(tmp_path / "model", alphabet="".join(map(chr, range(32, 127))) + "\n", max_length=256)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_local_copy_runs_by_the_recipe(kind: str, model: Path, tmp_path: Path) -> None:
    data = tmp_path / f"train.{kind}"
    if kind == "jsonl":
        save_rows(data, ROWS)
    else:
        parquet.write_table(pa.Table.from_pylist(ROWS), data)
    run = tmp_path / "run"
    groupwise.train("gsm8k", model=model, data=data, eval_data=data, run=run, overrides=SMALL, show="quiet")
    prompts: list[Any] = [line["prompt"] for line in rollouts(run)]
    assert {tuple(message["role"] for message in prompt) for prompt in prompts} == {("system", "user")}
    assert {prompt[1]["content"] for prompt in prompts} <= {row["question"] for row in ROWS}
    found = events(run)
    assert all(event.get("rewards/unscored", 0.0) == 0.0 for event in found)
    assert "eval/accuracy" in found[-1]
