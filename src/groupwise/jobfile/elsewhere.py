"""What users of TRL, verl and OpenRLHF call a knob, and what it is called here, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping

_PASSES = "Sampling and passes are cut by themselves: `train.tokens_per_micro_batch` bounds a pass, "
_BATCH = (
    "A batch is counted in prompts here: `train.prompts_per_step`, each with `sampling.num_generations` outputs, "
    "in passes of at most `train.tokens_per_micro_batch` tokens."
)
_STEPS = "Training is counted in steps, not in epochs: `train.steps`, of `train.prompts_per_step` prompts each."
_LOG = "Every step is written to `events.jsonl` of the run folder; there is nothing to set."
_SINKS = "Events go to `events.jsonl` of the run folder, and to TensorBoard with `watch.tensorboard` = true."
_SHARDS = "There is one process and one device here, so nothing is sharded: remove it."
_ENGINE = "Sampling is groupwise's own engine in the same process, which needs no setting: remove it."
_KL_KIND = "Which KL estimate it is says `objective.kl`, and how much it weighs `objective.beta`."
_ADAPTERS = "All weights are trained; adapters (LoRA) are not supported: remove it."
_CLIP = "the lower bound of the ratio is 1 - `objective.epsilon`, the upper one 1 + `objective.epsilon_high`"

_ANSWERS: tuple[tuple[str, str], ...] = (
    # Where it is and what it is called
    ("output_dir run_dir save_path default_local_dir experiment_name run_name", "run"),
    ("model_name_or_path model_name pretrain actor_model_name", "model.path"),
    ("model_revision", "model.revision"),
    ("torch_dtype bf16 fp16 precision half_precision_backend", "model.dtype"),
    ("use_cpu no_cuda", "model.device"),
    ("enable_gradient_checkpointing gradient_checkpointing_kwargs", "model.gradient_checkpointing"),
    ("dataset_name train_dataset prompt_data train_files train_file dataset dataset_path data_path", "data.path"),
    ("dataset_config dataset_config_name", "data.subset"),
    ("dataset_train_split prompt_split", "data.split"),
    ("input_key prompt_key prompt_field text_column", "data.prompt_column"),
    ("max_prompt_len prompt_max_len truncate_prompt_length", "data.max_prompt_length"),
    ("filter_overlong_prompts", "data.long_prompts"),
    ("shuffle_dataset", "data.shuffle"),
    # Rewards
    ("reward_funcs reward_function reward_functions reward_fn remote_rm_url", "reward.functions"),
    ("custom_reward_function reward_pretrain reward_model_path reward_model_name_or_path", "reward.functions"),
    ("reward_weights", "reward.weights"),
    ("step_rewards", "reward.step_functions"),
    # Sampling
    ("n rollout_n n_samples_per_prompt group_size num_samples num_return_sequences", "sampling.num_generations"),
    ("max_new_tokens max_tokens max_response_length", "sampling.max_completion_length"),
    ("generate_max_len response_length", "sampling.max_completion_length"),
    ("min_new_tokens", "sampling.min_completion_length"),
    ("stop_strings stop_sequences", "sampling.stop"),
    ("max_num_seqs", "sampling.max_live_outputs"),
    # The objective
    ("loss_type adv_estimator advantage_estimator algorithm", "objective.preset"),
    ("kl_coef init_kl_coef kl_loss_coef kl_coeff", "objective.beta"),
    ("kl_estimator kl_loss_type kl_penalty", "objective.kl"),
    ("epsilon_low clip_ratio clip_ratio_low eps_clip eps_clip_low cliprange clip_range", "objective.epsilon"),
    ("clip_ratio_high eps_clip_high", "objective.epsilon_high"),
    ("clip_ratio_c delta", "objective.dual_clip"),
    ("norm_adv_by_std_in_grpo", "objective.scale_rewards"),
    # Training
    ("max_steps total_training_steps num_training_steps num_steps", "train.steps"),
    ("mu ppo_epochs num_ppo_epochs max_epochs", "train.num_iterations"),
    ("lr actor_learning_rate", "train.learning_rate"),
    ("lr_scheduler scheduler lr_warmup_style warmup_style", "train.lr_scheduler_type"),
    ("lr_warmup_steps num_warmup_steps", "train.warmup_steps"),
    ("num_mini_batches", "train.updates_per_batch"),
    ("rollout_batch_size num_unique_prompts_rollout gen_batch_size", "train.prompts_per_step"),
    ("grad_clip max_norm clip_grad gradient_clipping", "train.max_grad_norm"),
    ("adam_eps eps", "train.adam_epsilon"),
    ("l2", "train.weight_decay"),
    ("max_token_len_per_gpu ppo_max_token_len_per_gpu max_tokens_per_gpu", "train.tokens_per_micro_batch"),
    # Evaluation, checkpoints, what is shown
    ("eval_dataset val_files eval_file dataset_test_split", "eval.data"),
    ("eval_steps test_freq eval_freq", "eval.every"),
    ("save_steps save_freq save_interval checkpoint_every checkpoint_steps", "checkpoint.every"),
    ("save_total_limit max_ckpt_num max_actor_ckpt_to_keep", "checkpoint.keep"),
    ("load_best_model_at_end save_best", "checkpoint.best"),
    ("log_completions num_completions_to_print rollout_data_dir", "watch.rollouts"),
    ("use_tensorboard", "watch.tensorboard"),
    # What is another thing here
    ("epoch epochs num_train_epochs num_epochs total_epochs num_episodes total_episodes", _STEPS),
    ("train_batch_size batch_size per_device_train_batch_size generation_batch_size global_batch_size", _BATCH),
    ("steps_per_generation", "Set `train.num_iterations` (passes) and `train.updates_per_batch` (updates per pass)."),
    ("ppo_mini_batch_size mini_batch_size", "Set `train.updates_per_batch`: updates per pass over a step's outputs."),
    ("gradient_accumulation_steps", _PASSES + "and what is accumulated follows from it. Remove this key."),
    ("micro_batch_size micro_train_batch_size ppo_micro_batch_size", _PASSES + "in tokens."),
    ("ppo_micro_batch_size_per_gpu log_prob_micro_batch_size_per_gpu micro_rollout_batch_size", _PASSES + "in tokens."),
    ("per_device_eval_batch_size", _PASSES + "in tokens."),
    ("warmup_ratio lr_warmup_steps_ratio lr_warmup_ratio", "The warm-up is counted in updates: `train.warmup_steps`."),
    ("optim optimizer", "It is AdamW: see `train.weight_decay`, `train.adam_beta1`, `train.adam_beta2`."),
    ("beta1 beta2 adam_betas betas", "They are `train.adam_beta1` and `train.adam_beta2`."),
    ("eval_strategy evaluation_strategy do_eval", "Set `eval.every`, steps between evaluations, and `eval.data`."),
    ("save_strategy", "Set `checkpoint.every` to the steps between checkpoints."),
    ("save_only_model", "`checkpoint.best` keeps weights alone; other checkpoints are for resuming."),
    ("resume_from_checkpoint resume_mode load_checkpoint", "A run is continued by `groupwise resume RUN`."),
    ("logging_steps logging_strategy logging_dir", _LOG),
    ("report_to logger use_wandb wandb_project log_with", _SINKS),
    ("clip_higher", f"Set both bounds: {_CLIP}."),
    ("use_kl_loss use_kl_in_reward kl_ctrl", _KL_KIND),
    ("sync_ref_model ref_model_sync_steps ref_model_mixup_alpha", "The reference is refreshed at the start of each of "
     "`train.iterations`."),
    ("entropy_coeff entropy_coef entropy_loss_coef", "There is no entropy bonus: the paper's objective has none."),
    ("gamma gae_lambda lambd lam", "There is no value model here, so nothing is discounted: remove it."),
    ("overlong_filter", "Set `objective.mask_truncated_completions` = true."),
    ("vllm_importance_sampling_correction tis_imp_ratio_cap", "See `objective.importance_sampling`, "
     "`objective.importance_sampling_cap`."),
    ("use_vllm vllm_mode vllm_gpu_memory_utilization gpu_memory_utilization rollout_engine", _ENGINE),
    ("vllm_tensor_parallel_size tensor_model_parallel_size enforce_eager enable_prefix_caching", _ENGINE),
    ("deepspeed fsdp fsdp_config zero_stage n_gpus_per_node nnodes num_gpus ddp_find_unused_parameters", _SHARDS),
    ("param_offload optimizer_offload adam_offload colocate_all_models", _SHARDS),
    ("use_peft lora_r lora_rank lora_alpha lora_dropout lora_target_modules peft_config load_in_4bit", _ADAPTERS),
    ("attn_implementation flash_attn use_flash_attn", "Attention follows from `model.layout`, which a probe decides."),
    ("use_liger_kernel use_liger_loss", "Log-probs are chunked by themselves where the model allows it: remove it."),
    ("trust_remote_code", "It is consent rather than a setting: give `--trust-remote-code`, or in Python "
     "`trust_remote_code=True`."),
    ("system_prompt", "data.system"),
    ("apply_chat_template", "data.chat"),
    ("chat_template", "It is the tokenizer's, used where a prompt is a list of messages (`data.chat` makes one of a "
     "text); its options are `data.chat_template_kwargs`."),
    ("remove_unused_columns", "Every column reaches the reward by its name; there is nothing to set."),
    ("repetition_penalty", "Training draws from the model's own distribution, so nothing is penalised: remove it."),
    ("dynamic_sampling filter_groups", "Groups whose rewards are all equal are sampled all the same: remove it."),
    ("disable_dropout", "Dropout is always off: remove it."),
    ("dataloader_num_workers", "Prompts are in memory: there is nothing to set."),
    ("push_to_hub hub_model_id", "Nothing is uploaded: `groupwise export RUN DIR` writes a folder that can be."),
    ("max_length max_seq_length max_model_len max_seq_len", "Lengths are set apart: `data.max_prompt_length` and "
     "`sampling.max_completion_length`, within the model's context."),
    ("do_sample", "Training samples; evaluation is greedy at `eval.temperature` = 0."),
    ("verbose silent disable_tqdm", "It is said on the command line, by `--quiet` or `--json`; in Python `show=`."),
)  # fmt: skip

ELSEWHERE: Mapping[str, str] = {name: answer for names, answer in _ANSWERS for name in names.split()}
"""By another trainer's name: the key here, or a sentence that says what to do instead."""

OF_REWARD_MODELS: Mapping[str, str] = {
    name: key
    for names, key in (
        ("output_dir", "run"),
        ("model_name_or_path model_name pretrain", "model"),
        ("dataset_name train_dataset dataset", "data"),
        ("eval_dataset dataset_test_split", "eval_data"),
        ("num_train_epochs num_epochs", "epochs"),
        ("per_device_train_batch_size train_batch_size", "batch_size"),
        ("lr", "learning_rate"),
        ("eval_steps", "eval_every"),
        ("save_steps", "checkpoint_every"),
        ("step_separator", "separator"),
        ("max_seq_length", "max_length"),
        ("torch_dtype bf16 fp16", "dtype"),
    )
    for name in names.split()
}
"""The same for the training of a reward model."""
