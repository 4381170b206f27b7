"""The job's knobs as a list: a new one is added here on purpose, after it has earned its place."""

from groupwise.config import PRESET_JOB_DEFAULTS, PRESET_NAMES, Job, knobs

KNOBS = {
    "": "schema_version run seed",
    "model": "path revision device dtype layout gradient_checkpointing",
    "data": "path revision subset split prompt_column chat system drop_answer"
    " chat_template_kwargs date max_prompt_length long_prompts shuffle",
    "reward": "functions weights step_functions step_weights verifier timeout output_timeout patience device step_tags",
    "process": "segmenter pattern token_ids function",
    "reward_model": "path revision labels continuations soft_labels completer first_prompts prompts_per_round"
    " held_out_share replay replay_size epochs first_epochs batch_size learning_rate warmup_steps min_accuracy",
    "sampling": "num_generations temperature max_completion_length min_completion_length top_p top_k min_p stop"
    " skip_special_tokens max_live_outputs",
    "engine": "kind",
    "objective": "preset beta kl epsilon epsilon_high dual_clip baseline ratio surrogate weights"
    " sapo_temperature_pos sapo_temperature_neg scale_rewards outcome_weight process_weight"
    " step_return step_normalization mask_truncated_completions"
    " importance_sampling importance_sampling_cap",
    "train": "iterations steps prompts_per_step num_iterations updates_per_batch learning_rate lr_scheduler_type"
    " warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm tokens_per_micro_batch",
    "eval": "data split every limit num_generations temperature top_p top_k max_completion_length threshold",
    "checkpoint": "every minutes keep best",
    "watch": "tensorboard rollouts rollouts_max_bytes",
}


def test_the_knobs_are_these():
    frozen = [f"{section}.{name}".lstrip(".") for section, names in KNOBS.items() for name in names.split()]
    assert list(knobs()) == frozen


def test_a_presets_job_defaults_are_knobs_of_a_known_preset():
    for preset, defaults in PRESET_JOB_DEFAULTS.items():
        assert preset in PRESET_NAMES
        assert set(defaults) <= set(knobs())


def test_the_presets_are_those_of_the_objective():
    from groupwise.objective import PRESETS  # here, since it brings torch

    assert tuple(PRESETS) == PRESET_NAMES


def test_a_job_cannot_be_changed():
    assert Job.model_config["frozen"]
    assert all(type(section).model_config["frozen"] for section in (Job().model, Job().train, Job().watch))
