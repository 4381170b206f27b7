from pathlib import Path

import pytest

from groupwise import jobfile
from groupwise.config import BUILTIN, PRESET_JOB_DEFAULTS, Job, knobs
from groupwise.errors import ConfigError
from groupwise.jobfile import load_job

OWN = {"model": "my-model", "data": "prompts.jsonl", "reward": "rewards.py:score"}


@pytest.fixture(autouse=True)
def recipes(tmp_path, monkeypatch):
    """A folder of shipped recipes with one in it, so that these tests do not depend on what it sets."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "arithmetic.toml").write_text("[train]\nlearning_rate = 3e-4\nsteps = 40\n")
    monkeypatch.setattr("groupwise.jobfile.load._recipes", lambda: folder)
    return folder


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes `job.toml` into the current folder and gives its name back."""
    monkeypatch.chdir(tmp_path)

    def write_job(text):
        Path("job.toml").write_text(text, encoding="utf-8")
        return "job.toml"

    return write_job


def refusal(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        load_job(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


OPTIONS = {"steps": 20, "model": "gpt", "data": BUILTIN, "run": None}


def test_later_layers_win_and_each_value_knows_its_origin(write):
    source = write('[objective]\npreset = "deepseekmath"\n[train]\nsteps = 10\nprompts_per_step = 2\n')
    resolved = load_job(
        source, ["train.steps=30", "seed=7"], {"steps": 20, "model": "gpt", "data": BUILTIN, "run": None}
    )
    job, origins = resolved.job, resolved.origins
    assert (job.train.steps, origins["train.steps"]) == (30, "--set")
    assert (job.model.path, origins["model.path"]) == ("gpt", "--model")
    assert (job.train.prompts_per_step, origins["train.prompts_per_step"]) == (2, "job.toml")
    assert (job.sampling.num_generations, origins["sampling.num_generations"]) == (64, "preset deepseekmath")
    assert (job.run, origins["run"]) == ("runs/demo", "default")
    assert job.seed == 7
    assert list(origins) == list(knobs())


def test_an_option_is_named_as_on_the_command_line():
    assert load_job(options={"learning_rate": 1e-5}).origins["train.learning_rate"] == "--learning-rate"


def test_without_a_file_the_embedded_recipe_is_used():
    resolved = load_job()
    assert resolved.job.train.learning_rate == 3e-4
    assert resolved.origins["train.learning_rate"] == "recipe arithmetic"
    assert load_job(options={"reward": "rewards.py:score"}).job.train.steps == 40


@pytest.mark.parametrize("options", [{"model": "my-model", "data": BUILTIN}, OWN])
def test_a_job_of_ones_own_starts_from_the_defaults(options):
    assert load_job(options=options).job.train == Job().train


def test_a_recipe_goes_by_its_name_and_can_be_changed():
    assert load_job("arithmetic", ["train.steps=5"]).job.train.steps == 5


def test_a_preset_brings_its_job_defaults_wherever_it_is_chosen(write):
    expected = PRESET_JOB_DEFAULTS["deepseekmath"]
    for resolved in (
        load_job(write('objective.preset = "deepseekmath"')),
        load_job(options=OWN | {"preset": "deepseekmath"}),
        load_job(overrides=["objective.preset=deepseekmath"], options=OWN),
    ):
        found = {key: getattr(getattr(resolved.job, key.split(".")[0]), key.split(".")[1]) for key in expected}
        assert found == expected


def test_a_preset_that_is_overridden_brings_nothing(write):
    source = write('objective.preset = "deepseekmath"')
    assert (
        load_job(source, ["objective.preset=rloo"]).job
        == load_job(overrides=["objective.preset=rloo"], source=write("")).job
    )


@pytest.mark.parametrize(
    "text, section, name, expected",
    [
        ("train.learning_rate=1e-5", "train", "learning_rate", 1e-5),
        ("train.learning_rate=1", "train", "learning_rate", 1.0),
        ("train.max_grad_norm=inf", "train", "max_grad_norm", float("inf")),
        ("data.shuffle=false", "data", "shuffle", False),
        ("objective.kl=k2", "objective", "kl", "k2"),
        ("model.path=./folder/model-1", "model", "path", "./folder/model-1"),
        ('model.path="quoted = text"', "model", "path", "quoted = text"),
        ("model.path=a=b", "model", "path", "a=b"),
        ('sampling.stop=["\\n", "END"]', "sampling", "stop", ["\n", "END"]),
        (" train.steps = 3 ", "train", "steps", 3),
        ("data.chat_template_kwargs.enable_thinking=false", "data", "chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_set_takes_toml_values_and_bare_words(text, section, name, expected):
    value = getattr(getattr(load_job(overrides=[text], options={"data": BUILTIN}).job, section), name)
    assert value == expected
    assert type(value) is type(expected)


def test_tables_merge_over_the_layers(write):
    source = write("[data.chat_template_kwargs]\nenable_thinking = true\nlanguage = 'en'\n")
    job = load_job(source, ["data.chat_template_kwargs.enable_thinking=false"]).job
    assert job.data.chat_template_kwargs == {"enable_thinking": False, "language": "en"}


def test_python_options_may_be_paths_tuples_and_dotted_keys():
    job = load_job(options={"model": Path("a/b"), "reward": ("x.py:f", "y.py:g"), "eval.every": 5, "data": BUILTIN}).job
    assert job.model.path == "a/b"
    assert job.reward.functions == ["x.py:f", "y.py:g"]
    assert job.eval.every == 5


@pytest.mark.parametrize(
    "key, offered",
    [
        ("num_generations", "`sampling.num_generations`"),
        ("sampling.num_generation", "`sampling.num_generations`"),
        ("sampling.learning_rte", "`train.learning_rate`"),
        ("lr", "`train.learning_rate`"),
        ("samplng.top_k", "`sampling`"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key, offered):
    message = refusal(overrides=[f"{key}=4"])
    assert message.startswith("--set: there is no key")
    assert offered in message


def test_an_unknown_key_that_is_like_nothing_offers_nothing():
    assert "Did you mean" not in refusal(overrides=["zzz=1"])


def test_an_unknown_key_names_its_file(write):
    message = refusal(write("[train]\nstep = 4\n"))
    assert message == "job.toml: there is no key `train.step`. Did you mean `train.steps`?"


def test_an_ambiguous_option_asks_which():
    assert "`eval.every` or `checkpoint.every`" in refusal(options={"every": 5})


@pytest.mark.parametrize(
    "text, parts",
    [
        ('train.steps = "ten"', ["`train.steps`", "a whole number, at least 1", '"ten"', "without quotes"]),
        ("train.steps = 2.5", ["a whole number", "2.5"]),
        ("train.steps = true", ["a whole number", "true"]),
        ("train.steps = 0", ["at least 1", "0"]),
        ("train.learning_rate = false", ["a number, more than 0", "false"]),
        ("train.learning_rate = inf", ["a number", "inf"]),
        ("train.max_grad_norm = nan", ["a number", "nan"]),
        ("eval.threshold = nan", ["a number", "nan"]),
        ("data.shuffle = 1", ["true or false", "1"]),
        ("model.revision = 123", ["a string", 'Write "123"']),
        ('model.device = "gpu"', ["`cuda`", '"gpu"']),
        ('reward.functions = "a.py:f"', ["a list of strings", 'Write ["a.py:f"]']),
        ("process.token_ids = []", ["a list of whole numbers, not empty"]),
        ('reward.weights = [1, "2"]', ["a list of numbers", '[1, "2"]']),
        ("data.chat_template_kwargs = 3", ["a table", "3"]),
        ("train = 3", ["`train` is a section", "3"]),
        ('objective.kl = "k4"', ["`k1_in_reward`, `k2`", '"k4"']),
        ('objective.kl = "k1"', ["expected gradient is zero", '"k1_in_reward"']),
        ('objective.preset = "dr-grpo"', ["Did you mean `dr_grpo`?"]),
        ("schema_version = 2", ["schema_version is 2", "reads version 1"]),
    ],
)
def test_a_value_of_the_wrong_kind_says_what_is_wanted_and_what_was_found(write, text, parts):
    message = refusal(write(text))
    assert message.startswith("job.toml: ")
    for part in parts:
        assert part in message


def test_a_whole_number_serves_as_a_number(write):
    job = load_job(write("[reward]\ntimeout = 30\nweights = [2]\n")).job
    assert (job.reward.timeout, job.reward.weights) == (30.0, [2.0])
    assert isinstance(job.reward.timeout, float)


@pytest.mark.parametrize(
    "text", ["train.steps", "=3", "run=", "train.steps=1\ntrain.x=2", "reward.functions=[a.py:f]", 'run="a']
)
def test_a_malformed_set_says_how_to_write_it(text):
    with pytest.raises(ConfigError, match=r"--set .*="):
        load_job(overrides=[text])


def test_broken_toml_names_file_and_line(write):
    message = refusal(write('run = "a"\n[train]\nsteps = ten\n'))
    assert "job.toml is not valid TOML" in message
    assert "line 3" in message
    assert "`steps = ten`" in message


@pytest.mark.parametrize("text", ["[train", "a = '''", "= 1", "[train]\nsteps = 1\nsteps = 2\n", "\x00"])
def test_no_broken_toml_escapes_as_another_error(write, text):
    assert "not valid TOML" in refusal(write(text))


def test_a_missing_file_names_what_there_is():
    message = refusal("arithmetics")
    assert "Did you mean `arithmetic`?" in message
    assert "`groupwise init`" in message
    assert "`no.toml`" in refusal("no.toml")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "job.toml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "job.toml")
    assert "cannot be read" in refusal(tmp_path)


def test_a_byte_order_mark_is_no_error(tmp_path):
    (tmp_path / "job.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert load_job(tmp_path / "job.toml").job.seed == 3


def test_an_option_that_toml_cannot_hold_is_refused():
    assert "cannot be written in a job file" in refusal(options={"chat_template_kwargs": {"a": object()}})
    assert "cannot be written in a job file" in refusal(options={"stop": [None]})


def test_every_knob_can_be_set_from_the_command_line():
    defaults = Job().model_dump()
    for key, field in knobs().items():
        section, _, name = key.rpartition(".")
        value = (defaults[section] if section else defaults)[name]
        if value is not None:
            resolved = load_job(overrides=[f"{key}={jobfile.phrases.as_toml(value)}"])
            assert resolved.origins[key] == "--set", field


def test_the_built_in_names_are_the_defaults():
    assert Job().model.path == Job().data.path == Job().reward.functions[0] == BUILTIN
