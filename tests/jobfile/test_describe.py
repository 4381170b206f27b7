import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest

from groupwise.config import BUILTIN, Job, knobs
from groupwise.errors import ConfigError
from groupwise.jobfile import json_schema, load_job, reference, show, template, to_toml
from groupwise.jobfile.describe import batch_arithmetic

ROOT = Path(__file__).parents[2]
OWN = {"model": "m", "data": "d.jsonl", "reward": "r.py:f"}


def test_show_is_toml_that_gives_the_same_job():
    resolved = load_job(options=OWN, overrides=["train.max_grad_norm=inf", 'sampling.stop=["\\n", "#"]'])
    assert Job.model_validate(tomllib.loads(show(resolved))) == resolved.job


def test_show_gives_every_knob_with_its_origin_in_one_column():
    resolved = load_job(options=OWN, overrides=["objective.preset=deepseekmath", "train.steps=7"])
    text = show(resolved)
    lines = [line for line in text.splitlines() if re.search(r"  # (default|preset \w+|--[\w-]+)$", line)]
    assert len(lines) == len(knobs())
    assert len({line.rindex("#") for line in lines}) == 1
    assert re.search(r"^num_generations = 64 +# preset deepseekmath$", text, re.MULTILINE)
    assert re.search(r"^steps = 7 +# --set$", text, re.MULTILINE)
    assert re.search(r'^path = "m" +# --model$', text, re.MULTILINE)
    assert re.search(r"^beta = 0.04 +# preset deepseekmath$", text, re.MULTILINE)
    assert re.search(r"^# dual_clip: not set +# default$", text, re.MULTILINE)


def test_a_long_value_does_not_push_the_column_out():
    resolved = load_job(options=OWN | {"model": "x" * 200})
    assert re.search(r"^seed = 0 {1,60}# default$", show(resolved), re.MULTILINE)


def test_the_batch_arithmetic_is_said_in_words():
    job = Job(
        sampling={"num_generations": 16, "max_completion_length": 100}, train={"prompts_per_step": 32, "steps": 10}
    )
    first, second, third = batch_arithmetic(job)
    assert first == "32 prompts x 16 outputs = 512 outputs -> 1 update per step"
    assert second.startswith("at most 512 x 100 = 51,200 output tokens per step")
    assert third == "1 x 10 = 10 steps -> 5,120 outputs, 10 updates in all"
    several = Job(train={"num_iterations": 3, "updates_per_batch": 2})
    assert batch_arithmetic(several)[0].endswith("6 updates per step (num_iterations 3 x updates_per_batch 2)")
    assert "\n# 8 prompts x 8 outputs" in show(load_job(options=OWN))


def test_the_template_is_the_embedded_job(tmp_path):
    """Which learns: the defaults suit a model a thousand times as large, and would teach this one nothing."""
    file = tmp_path / "job.toml"
    file.write_text(template("job.toml"), encoding="utf-8")
    assert load_job(file).job == load_job("arithmetic", ["run=runs/job"]).job


def test_lines_that_only_the_embedded_model_wants_are_marked(tmp_path):
    """Without them, and with the names exchanged, it is the job of one's own that starts from the defaults."""
    lines = template("job.toml").splitlines()
    kept = "\n".join(line for line in lines if "# embedded" not in line)
    file = tmp_path / "job.toml"
    file.write_text(
        kept.replace('path = "builtin:arithmetic"', 'path = "m"', 1)
        .replace('path = "builtin:arithmetic"', 'path = "d.jsonl"', 1)
        .replace('["builtin:arithmetic"]', '["r.py:f"]')
    )
    assert load_job(file).job == load_job(options=OWN | {"run": "runs/job"}).job


def test_a_template_for_ones_own_holds_what_the_options_name(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(template("mine.toml", OWN), encoding="utf-8")
    assert load_job(file).job == load_job(options=OWN | {"run": "runs/mine"}).job
    assert "embedded" not in file.read_text().replace("the embedded", "")


@pytest.mark.parametrize("options", [None, OWN])
def test_the_template_has_every_knob_and_its_default(options):
    """With every other line active it is the same job: no key is missing, none is misspelt, each is at its default."""
    text = template("job.toml", options)
    active = re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE)
    chosen = Job.model_validate(tomllib.loads(text))
    assert Job.model_validate(tomllib.loads(active)) == chosen
    for key, field in knobs().items():
        name = key.rpartition(".")[2]
        assert re.search(rf"^#?{name} =", text, re.MULTILINE), field
    assert all(len(line) <= 120 for line in text.splitlines())


def test_every_knob_says_what_it_does():
    for key, field in knobs().items():
        assert field.description, key
        assert field.description.endswith("."), key


def test_the_json_schema_knows_sections_bounds_and_choices():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    train = schema["$defs"]["TrainSection"]
    assert train["additionalProperties"] is False
    assert train["properties"]["steps"]["minimum"] == 1
    assert train["properties"]["steps"]["resumable"] is True
    assert train["properties"]["steps"]["description"].startswith("Steps")
    assert "grpo" in schema["$defs"]["ObjectiveSection"]["properties"]["preset"]["enum"]
    json.dumps(schema, allow_nan=False)


def test_the_reference_has_a_row_per_knob():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) == len(knobs())
    assert "| `num_generations` | a whole number, at least 1 | `8` | Outputs per prompt: G. |" in rows
    assert any(row.startswith("| `steps` † |") for row in rows)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


@pytest.mark.parametrize("page", ["configuration.md", "job.schema.json"])
def test_committed_pages_are_what_the_code_says(page):
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == pages[page](), "run `make docs`"


def test_a_model_without_data_is_refused():
    """It would be trained on the sums that are made for the built-in model."""
    with pytest.raises(ConfigError, match=r"no data is named, .* Name prompts and a reward"):
        load_job(options={"model": "m"})
    with pytest.raises(ConfigError, match="no data is named"):
        load_job("arithmetic", ["model.path=m"])
    assert load_job(options={"model": "m", "data": BUILTIN}).job.model.path == "m"


def test_saving_and_showing_agree():
    resolved = load_job(options=OWN)
    assert tomllib.loads(to_toml(resolved.job)) == tomllib.loads(show(resolved))
