"""The job of a reward model's training: its keys as a frozen list, and its page."""

from pathlib import Path

from groupwise.jobfile.reward_model import RewardModelJob, changed_keys, is_reward_model_run, load_reward_job, reference

KEYS = (
    "schema_version task kind model data run revision split eval_data eval_share eval_every seed device dtype separator"
    " date max_length epochs batch_size learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm"
    " tokens_per_micro_batch checkpoint_every checkpoint_minutes"
)
PAGE = Path(__file__).parents[2] / "docs" / "reward-models.md"
NAMED = {"kind": "outcome", "model": "m", "data": "d"}


def test_the_keys_are_these():
    assert list(RewardModelJob.model_fields) == KEYS.split()


def test_the_page_has_the_table_of_keys():
    assert reference() in PAGE.read_text(encoding="utf-8"), "run docs/generate.py"


def test_options_go_over_a_file_and_overrides_over_both(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('task = "reward-model"\nkind = "process"\nmodel = "m"\ndata = "d"\nepochs = 3\nseed = 4\n')
    job = load_reward_job({"data": "other", "run": None}, ["epochs=5"], base=file)
    assert (job.kind, job.data, job.epochs, job.seed, job.run) == ("process", "other", 5, 4, "runs/reward-model")
    assert is_reward_model_run(tmp_path)
    file.write_text("seed = 3\n")
    assert not is_reward_model_run(tmp_path)
    assert not is_reward_model_run(tmp_path / "nowhere")


def test_what_may_change_is_told_apart():
    old, new = load_reward_job(NAMED), load_reward_job(NAMED, ["run=other", "epochs=2"])
    assert changed_keys(old, new) == {"run": True, "epochs": False}
