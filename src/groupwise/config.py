"""The job: every knob, its type, its default and what it does. Read from TOML by `groupwise.jobfile`.

`None` in `[objective]` means "as the preset says". Derived quantities (micro-batches, accumulation) are not knobs.
A field marked `_resumable` may differ when a run is resumed; any other difference needs `--fork`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

SCHEMA_VERSION: Final = 1
BUILTIN: Final = "builtin:arithmetic"
TRAINED_REWARD_MODEL: Final = "reward_model"
MODEL_PREFIX: Final = "model:"
"""Begins the name of a reward model among the rewards: `model:DIR`, or `model:ID` of the hub."""
"""Names, among a job's rewards, the reward model that its run trains."""

Preset = Literal["grpo", "deepseekmath", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo"]
PRESET_NAMES: Final[tuple[str, ...]] = get_args(Preset)
"""The names of `groupwise.objective.PRESETS`, known here so that a job can be read without torch."""

PRESET_JOB_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "deepseekmath": {  # arXiv:2402.03300, section 4.2; its 1,024 outputs per batch read as 16 questions
        "sampling.num_generations": 64,
        "sampling.max_completion_length": 1024,
        "train.prompts_per_step": 16,
        "train.learning_rate": 1e-6,
        "train.num_iterations": 1,
        "train.updates_per_batch": 1,
    },
}
"""Job defaults that a preset brings beside its objective; any key that the user gives wins over them."""


def _resumable(default: Any = ..., **constraints: Any) -> Any:
    """A field that may change between a checkpoint and the run that resumes from it."""
    return Field(default, json_schema_extra={"resumable": True}, **constraints)


class Section(BaseModel):
    """A table of the job file. Unknown keys are errors and values are never coerced between kinds."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )


class ModelSection(Section):
    """The policy."""

    path: str = BUILTIN
    """A Hugging Face folder, a hub id, or `builtin:arithmetic` (a 1M-parameter model made and warmed up in code)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    device: str = _resumable("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", examples=["auto", "cpu", "cuda", "cuda:1"])
    """Where the model lives and computes; `auto` is CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What forward and backward compute in (master weights are float32). `auto`: bfloat16 on CUDA, else float32."""
    layout: Literal["auto", "shared", "plain"] = "auto"
    """`shared` computes a prompt once per group, `plain` once per output; `auto`: shared where a probe proves it."""
    gradient_checkpointing: bool | None = _resumable(None)
    """Recompute activations in the backward pass: less memory, about a third more time. Default: where a step would
    not fit into memory otherwise."""


class DataSection(Section):
    """Where prompts come from."""

    path: str = BUILTIN
    """A `.jsonl`, `.json`, `.csv` or `.parquet` file, a `datasets` folder, a hub id, or `builtin:arithmetic`."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a `datasets` folder or hub data set."""
    prompt_column: str = "prompt"
    """The column with the prompt: a string, or a list of messages (rendered by the chat template; a last message of the
    assistant's is continued)."""
    chat: bool = False
    """Make a user's message of each prompt that is a string, as chat models want it."""
    system: str | None = Field(None, min_length=1)
    """A system message to begin every prompt with; prompts that are strings become users' messages."""
    drop_answer: bool = False
    """Leave off the messages of the assistant at the end of a prompt, which hold the answer in data for SFT."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options handed to the chat template, such as `enable_thinking`."""
    date: str | None = Field(None, pattern=r"^\d{4}-\d{2}-\d{2}$", examples=["2026-12-01"])
    """The day that a chat template is told it is. Default: that on which the run starts; it stands in the run's job."""
    max_prompt_length: int | None = Field(None, ge=1)
    """Longest prompt in tokens; default: what the context leaves beside `max_completion_length`."""
    long_prompts: Literal["drop", "error"] = "drop"
    """Prompts that are too long are counted and left out, or an error."""
    shuffle: bool = True
    """Draw each epoch in a new seeded order."""


class RewardSection(Section):
    """What scores an output."""

    functions: list[str] = Field(default_factory=lambda: [BUILTIN])
    """`file.py:name` (run in a worker process), `package.module:name`, `model:DIR` (a reward model, or a hub id in its
    place), `reward_model` (the one that the run trains), `builtin:arithmetic`, or `builtin:gsm8k` (the last number
    against the one after `####` in the column `answer`); none where steps alone are scored."""
    weights: list[float] | None = None
    """One weight per function; the reward is their weighted sum. Default: 1 each."""
    step_functions: list[str] = Field(default_factory=list)
    """Functions that score the steps of an output, named as above: process supervision."""
    step_weights: list[float] | None = None
    """One weight per step function; a step's reward is their weighted sum. Default: 1 each."""
    verifier: list[str] = Field(default_factory=list)
    """Functions that say, apart from what is trained on, how good an output is: their sum judges held-out outputs and,
    from `eval.threshold` on, says that one is right. Default: `functions`, unless a reward model is trained."""
    timeout: float = _resumable(60.0, gt=0)
    """Seconds that one call over a step's outputs may take before its worker is restarted."""
    output_timeout: float = _resumable(10.0, gt=0)
    """Seconds for an output that is tried alone after a batch failed or ran out of time."""
    patience: int = _resumable(5, ge=1)
    """Steps in a row in which a reward function may fail, or give no value, on every output before the run ends."""
    device: str | None = _resumable(None, pattern=r"^(auto|cpu|cuda(:\d+)?)$", examples=["cpu", "cuda:1"])
    """Where reward models compute; default: where the policy does."""
    step_tags: list[str] | None = None
    """For a causal model that was trained to say a word after each step: the tag that ends a step, the words for right
    and for wrong, as `["ки", "+", "-"]` of Math-Shepherd."""


class ProcessSection(Section):
    """Where the steps of an output end. The text after the last boundary is a step too."""

    segmenter: Literal["newline", "blank_line", "pattern", "token_ids", "function"] = "newline"
    """What a step ends with: its line, an empty line, a match of `pattern`, one of `token_ids`, or what `function`
    says."""
    pattern: str | None = None
    """For the segmenter `pattern`: a regular expression of Python's; a step ends where a match ends."""
    token_ids: list[int] | None = Field(None, min_length=1)
    """For the segmenter `token_ids`: a step ends with any of these tokens."""
    function: str | None = None
    """For the segmenter `function`: `file.py:name`, called as a reward function is; returns, per output, where in its
    text the steps end, as rising numbers of characters."""


class RewardModelSection(Section):
    """A reward model that the run trains: named `reward_model` in `reward.functions` or `reward.step_functions`."""

    path: str | None = None
    """The backbone, or a reward model to go on with: a Hugging Face folder or hub id. Default: the policy's."""
    revision: str | None = None
    """Branch, tag or commit of a hub id of `path`."""
    labels: str | None = None
    """What says what is right, never the model itself: `verifier` (for outputs), `pairs` (a right and a wrong output to
    one prompt, by the verifier), `monte_carlo` (for steps: as often as a continuation reaches what the verifier calls
    right), or a file of labelled examples, read anew each round."""
    continuations: int = Field(8, ge=1)
    """For `monte_carlo`: continuations of each step."""
    soft_labels: bool = False
    """For `monte_carlo`: label a step by the share of right continuations, not by whether there is any."""
    completer: str | None = None
    """For `monte_carlo`: the folder or hub id of what writes the continuations. Default: the policy before training."""
    first_prompts: int = Field(256, ge=0)
    """Prompts that the policy answers before the first step, to train a first reward model from; 0: `path` is one."""
    prompts_per_round: int = Field(256, ge=1)
    """Most prompts of an iteration whose outputs become its round's training set, chosen by the seed."""
    held_out_share: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts that a reward model is never trained on, but tested on in each round."""
    replay: float = Field(0.1, ge=0, lt=1)
    """Share of a round's examples that comes from earlier rounds (the paper's is the default)."""
    replay_size: int = Field(10_000, ge=1)
    """Most examples that are kept for replay."""
    epochs: int = Field(1, ge=1)
    """Passes over a round's examples."""
    first_epochs: int | None = Field(None, ge=1)
    """The same in the first round, which may have a new head to train. Default: `epochs`."""
    batch_size: int = Field(32, ge=1)
    """Examples per update of the reward model."""
    learning_rate: float = Field(2e-5, gt=0)
    """AdamW's, for the reward model (the default is the paper's)."""
    warmup_steps: int = Field(0, ge=0)
    """Updates of the reward model over which its learning rate rises, in all rounds together."""
    min_accuracy: float | None = _resumable(None, gt=0, le=1)
    """The run stops where the reward model's held-out accuracy is below this after a round."""


class SamplingSection(Section):
    """How outputs are drawn for training."""

    num_generations: int = Field(8, ge=1)
    """Outputs per prompt: G."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits, in sampling and in every log-prob of training alike."""
    max_completion_length: int = Field(256, ge=1)
    """Most tokens of one output, the end token included."""
    min_completion_length: int = Field(0, ge=0)
    """Refused in training unless 0: it takes the end token out of the distribution that is sampled."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Refused in training unless 1: see `docs/algorithm.md`."""
    top_k: int = Field(0, ge=0)
    """Refused in training unless 0."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Refused in training unless 0."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end an output (besides the model's end tokens)."""
    skip_special_tokens: bool = False
    """Leave special tokens, such as the `<think>` of some models, out of the text that rewards and files see, as TRL
    does. End and pad tokens are never part of it."""
    max_live_outputs: int = _resumable(256, ge=1)
    """Most outputs decoded together; bounds the memory of the key/value stores."""


class EngineSection(Section):
    """What samples."""

    kind: Literal["auto", "native", "processes"] = "auto"
    """`native`: this process; `processes`: a process per thread, copies of this one, where the model is on a CPU and
    there is enough to sample; `auto`: `processes` where that is possible."""


class ObjectiveSection(Section):
    """Which objective: a preset, and what to change in it."""

    preset: Preset = "grpo"
    """The named algorithm that fills in what this section leaves open; `deepseekmath` also brings job defaults."""
    beta: float | None = Field(None, ge=0)
    """Weight of the KL penalty; 0 loads no reference model."""
    kl: Literal["k1_in_reward", "k2", "k3", "k3_unbiased"] | None = None
    """The KL estimator. `k1` exists only as a penalty in the reward."""
    epsilon: float | None = Field(None, ge=0, allow_inf_nan=True)
    """Lower clip range, less than 1, and the upper one too where the preset has them equal; `inf` turns it off."""
    epsilon_high: float | None = Field(None, ge=0, allow_inf_nan=True)
    """Upper clip range (clip-higher), `inf` turns it off; for `cispo`, the cap of the ratio itself."""
    dual_clip: float | None = Field(None, gt=1)
    """For negative advantages the loss of a token is at most this times |A|."""
    baseline: Literal["group_mean", "leave_one_out", "batch_mean"] | None = None
    """What a reward is compared with: the group's mean, the mean of the others in the group, or the batch's."""
    ratio: Literal["token", "sequence_mean", "sequence_product"] | None = None
    """The importance ratio: per token, or per output as the geometric mean or the product of its tokens'."""
    surrogate: Literal["clip", "cispo", "sapo"] | None = None
    """How the ratio meets the advantage: hard clip (PPO), capped and detached weight (CISPO), soft gate (SAPO)."""
    weights: Literal["sequence_mean", "sequence_sum", "token_mean", "constant_length"] | None = None
    """How tokens are averaged: each output's mean, its sum, all tokens of the update alike, or by a constant length."""
    sapo_temperature_pos: float | None = Field(None, gt=0)
    """Steepness of the soft gate of `sapo` where the advantage is positive."""
    sapo_temperature_neg: float | None = Field(None, gt=0)
    """Steepness of the soft gate of `sapo` elsewhere."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """What advantages are divided by: the group's std, the batch's, or nothing."""
    outcome_weight: float | None = Field(None, ge=0)
    """Times the advantages of outputs' rewards, which `reward.functions` give."""
    process_weight: float | None = Field(None, ge=0)
    """Times the advantages of steps' rewards, which `reward.step_functions` give."""
    step_return: Literal["sum", "mean"] | None = None
    """A token's advantage from the steps that end at it or later: the sum of their normalised rewards (the paper and
    the default), or their mean, which does not grow with the steps that remain."""
    step_normalization: Literal["group", "index"] | None = None
    """What a step's reward is normalised with: all steps of the group (the paper and the default), or those of the
    same number in their outputs (first with first)."""
    mask_truncated_completions: bool = False
    """Leave outputs that met the length limit out of the loss; their rewards stay in the group's mean and std."""
    importance_sampling: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Weighs the loss by `exp(old - sampled)`, for a sampler that differs from the policy: truncated at the cap or
    zeroed beyond it, per token or by the product over the output."""
    importance_sampling_cap: float = Field(3.0, ge=1)
    """The largest weight of `importance_sampling`."""


class TrainSection(Section):
    """The optimisation."""

    iterations: int = _resumable(1, ge=1)
    """Outer iterations; the reference is refreshed at the start of each."""
    steps: int = _resumable(100, ge=1)
    """Steps (batches of prompts) per iteration."""
    prompts_per_step: int = Field(8, ge=1)
    """Prompts per step: Q. A step samples `Q * num_generations` outputs."""
    num_iterations: int = Field(1, ge=1)
    """Passes over one batch of outputs: mu."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer updates per pass, each over whole groups in a seeded order."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up; `linear` and `cosine` would reach 0 at the update after the last."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the learning rate rises to its peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay; not applied to biases and norms."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True)
    """The gradient is scaled down to this norm; `inf` turns it off."""
    tokens_per_micro_batch: int | None = _resumable(None, ge=1)
    """Most tokens of one forward; groups are split where needed. Memory, not mathematics. Default: 16384, or what fits
    into memory; halved when memory runs out all the same."""


class EvalSection(Section):
    """Held-out evaluation: at step 0, every so often, and at the end."""

    data: str | None = None
    """Held-out prompts in any form `[data] path` takes; none: no evaluation (the built-in data brings its own)."""
    split: str = "train"
    """Split of a `datasets` folder or hub data set."""
    every: int = _resumable(0, ge=0)
    """Steps between evaluations; 0: only before the first step and after the last."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many prompts."""
    num_generations: int = Field(1, ge=1)
    """Outputs per held-out prompt; pass@k is reported for k = 1, 2, 4 .. up to this."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling, allowed in evaluation."""
    top_k: int = Field(0, ge=0)
    """Keep only the k likeliest tokens, allowed in evaluation."""
    max_completion_length: int | None = Field(None, ge=1)
    """Default: as in `[sampling]`."""
    threshold: float = 1.0
    """An output whose reward is at least this counts as right for a verifier, or where the one reward is 0 or 1: in
    accuracy and pass@k. Of other rewards the share of outputs that reach it is told as `above_threshold`."""


class CheckpointSection(Section):
    """What is saved, and how much of it is kept."""

    every: int = _resumable(50, ge=0)
    """Steps between checkpoints; 0: none by their number."""
    minutes: float = _resumable(10.0, ge=0)
    """A step that ends so many minutes after the last checkpoint makes one too, whatever `every` says; 0: none by time.
    There is always one at the end and when a run is interrupted."""
    keep: int = _resumable(2, ge=1)
    """How many of the latest are kept (the one before the last serves when the last is damaged)."""
    best: bool = _resumable(True)
    """Also keep the weights with the best evaluation, without optimizer."""


class WatchSection(Section):
    """What is written for people to look at."""

    tensorboard: bool = _resumable(False)
    """Also write TensorBoard files into the run folder (needs the extra `tensorboard`)."""
    rollouts: bool = _resumable(True)
    """Write sampled groups with rewards and advantages to `rollouts.jsonl`."""
    rollouts_max_bytes: int = _resumable(100_000_000, ge=1_000)
    """Start a new rollouts file at this size; the current and the last full one are kept."""


class Job(Section):
    """A whole training job."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this format."""
    run: str = _resumable("runs/demo")
    """The run folder."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides data order, draws, and the built-in model's weights."""
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    reward: RewardSection = Field(default_factory=RewardSection)
    process: ProcessSection = Field(default_factory=ProcessSection)
    reward_model: RewardModelSection = Field(default_factory=RewardModelSection)
    sampling: SamplingSection = Field(default_factory=SamplingSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    watch: WatchSection = Field(default_factory=WatchSection)


def knobs() -> dict[str, FieldInfo]:
    """Every key of the job file by its dotted name, in the order of the file: `{"run": ..., "model.path": ...}`."""
    found: dict[str, FieldInfo] = {}
    for name, field in Job.model_fields.items():
        section = section_type(name)
        if section is None:
            found[name] = field
        else:
            found |= {f"{name}.{key}": inner for key, inner in section.model_fields.items()}
    return found


def section_type(name: str) -> type[Section] | None:
    """The class behind `[name]`; None where `name` is a plain key or nothing at all."""
    field = Job.model_fields.get(name)
    if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
        return None
    return field.annotation


def is_resumable(field: FieldInfo) -> bool:
    """Whether the knob may change between a checkpoint and the run that resumes from it."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get("resumable") is True
