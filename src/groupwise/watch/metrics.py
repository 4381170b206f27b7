"""Every metric an event may hold: its name, its unit, what it means. `docs/metrics.md` is made from this table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """What a name stands for. In `rewards/<name>/mean`, `<name>` is any text without a slash."""

    name: str
    unit: str
    meaning: str


SECTIONS: Mapping[str, tuple[Metric, ...]] = {
    "Progress": (
        Metric("step", "steps", "Steps done, this one included; 0 is the evaluation before the first."),
        Metric("iteration", "iterations", "The outer iteration that the step belongs to."),
        Metric("epoch", "passes", "Passes over the prompts so far, as a fraction."),
        Metric("policy_version", "versions", "Version of the weights after the step: one more per update not refused."),
        Metric("updates", "updates", "Optimizer updates made in this step."),
        Metric("updates/refused", "updates", "Updates left out because the gradient was not finite."),
        Metric("micro_batches", "passes", "Forward and backward passes that this step's updates were split into."),
    ),
    "Reward": (
        Metric("reward", "reward", "Mean reward of the step's scored outputs."),
        Metric("reward_std", "reward", "Sample standard deviation of the rewards in a group, averaged over groups."),
        Metric("frac_reward_zero_std", "share", "Groups whose rewards are all equal, so that they teach nothing."),
        Metric("rewards/<name>/mean", "reward", "Mean value of one reward function, before its weight."),
        Metric("rewards/<name>/std", "reward", "Standard deviation of one reward function's values over the step."),
        Metric("rewards/<name>/failed", "outputs", "Outputs that the function gave no value for because it failed."),
        Metric("rewards/<name>/timeouts", "calls", "Calls of the function that ran past their time limit."),
        Metric("rewards/<name>/worker_restarts", "restarts", "Times that the function's worker process was restarted."),
        Metric("rewards/unscored", "outputs", "Outputs without a reward: out of mean and std, advantage 0."),
        Metric("frac_advantage_zero", "share", "Groups in which every token's advantage is 0: nothing to learn from."),
        Metric("reward/kl_penalty", "reward", "Mean KL penalty taken off a reward (only with `k1_in_reward`)."),
    ),
    "Steps of outputs": (
        Metric("step_reward", "reward", "Mean reward of the steps that were scored (only where steps are)."),
        Metric("steps/per_output", "steps", "Mean number of steps that an output was cut into."),
        Metric("steps/first_right", "share", "Outputs whose first step's reward is at least 0.5."),
        Metric("steps/unscored", "outputs", "Outputs without a scored step: out of the set, adding no advantage."),
        Metric("step_rewards/<name>/mean", "reward", "Mean value of one step function, before its weight."),
        Metric("step_rewards/<name>/std", "reward", "Standard deviation of one step function's values."),
        Metric("step_rewards/<name>/failed", "outputs", "Outputs whose steps the function failed on."),
        Metric("step_rewards/<name>/timeouts", "calls", "Calls of the step function past their time limit."),
        Metric("step_rewards/<name>/worker_restarts", "restarts", "Restarts of the step function's worker process."),
        Metric("segmenter/<name>/failed", "outputs", "Outputs that the segmenter's function failed on: not scored."),
        Metric("segmenter/<name>/timeouts", "calls", "Calls of the segmenter's function past their time limit."),
        Metric("segmenter/<name>/worker_restarts", "restarts", "Restarts of the segmenter's worker process."),
    ),
    "Outputs": (
        Metric("completions/mean_length", "tokens", "Mean length of an output, its end token included."),
        Metric("completions/min_length", "tokens", "Length of the shortest output."),
        Metric("completions/max_length", "tokens", "Length of the longest output."),
        Metric("completions/clipped_ratio", "share", "Outputs that were cut by the length limit."),
    ),
    "Objective": (
        Metric("loss", "loss", "The loss minimised, averaged over the step's updates; near 0 is normal, see below."),
        Metric("kl", "nats", "Mean over trained tokens of the KL estimate against the reference; absent without one."),
        Metric("entropy", "nats", "Mean entropy of the policy over trained tokens, at the sampling temperature."),
        Metric("grad_norm", "norm", "Norm of the gradient before it is clipped."),
        Metric("learning_rate", "rate", "Learning rate of the step's last update."),
        Metric("clip_ratio/low_mean", "share", "Trained tokens whose ratio is below the clip range with A < 0."),
        Metric("clip_ratio/high_mean", "share", "Trained tokens whose ratio is above the clip range with A > 0."),
        Metric("clip_ratio/region_mean", "share", "Trained tokens left without gradient by the clip: low or high."),
        Metric("ratio/max", "ratio", "Largest probability ratio of policy to old policy in the step."),
    ),
    "Sampling": (
        Metric("sampling/logp_difference/mean", "nats", "Mean distance of sampler and trainer in log-probs."),
        Metric("sampling/logp_difference/max", "nats", "Largest distance of sampler and trainer in log-probs."),
        Metric("sampling/logp_difference/stray", "share", "Tokens whose distance is more than rounding, see below."),
    ),
    "Tokens": (
        Metric("tokens/sampled", "tokens", "Output tokens sampled in this step."),
        Metric("tokens/trained", "tokens", "Output tokens that were forwarded and have a weight in the loss."),
        Metric("tokens/skipped", "tokens", "Tokens of outputs not forwarded: advantage 0, or kept out of the loss."),
        Metric("tokens/per_second", "tokens/s", "`tokens/sampled` divided by `time/step`."),
    ),
    "Time and memory": (
        Metric("time/step", "seconds", "The whole step."),
        Metric("time/sample", "seconds", "Sampling the outputs."),
        Metric("time/reward", "seconds", "Scoring the outputs."),
        Metric("time/prepare", "seconds", "Credit, packing, old and reference log-probs."),
        Metric("time/update", "seconds", "Forward, backward and optimizer."),
        Metric("time/verify", "seconds", "Calling the verifier, where a reward model is trained."),
        Metric("time/label", "seconds", "Labelling the outputs of a round."),
        Metric("time/reward_model", "seconds", "Training the reward model in a round."),
        Metric("time/eval", "seconds", "The evaluation."),
        Metric("time/checkpoint", "seconds", "Writing the checkpoint before this event."),
        Metric("terminal/lost", "streams", "Of standard output and error, those that cannot be written any more."),
        Metric(
            "memory/peak_bytes", "bytes", "Most memory that this process has held: allocated on CUDA, else resident."
        ),
        Metric("memory/budget_halved", "times", "How often memory ran out and the token budget was halved."),
    ),
    "Evaluation": (
        Metric("eval/reward", "reward", "Mean reward of the held-out outputs."),
        Metric("eval/reward_ci95", "reward", "Half the width of the 95 % confidence interval of `eval/reward`."),
        Metric("eval/accuracy", "share", "Right held-out outputs, by the verifier or an only reward that is 0 or 1."),
        Metric("eval/accuracy_ci95", "share", "Half the width of the 95 % confidence interval of `eval/accuracy`."),
        Metric("eval/above_threshold", "share", "Held-out outputs whose other rewards reach `[eval] threshold`."),
        Metric("eval/above_threshold_ci95", "share", "Half the width of the 95 % interval of `eval/above_threshold`."),
        Metric("eval/rewards/<name>", "reward", "Mean of one of several rewards over held-out outputs."),
        Metric("eval/step_accuracy", "share", "Steps of held-out outputs with a reward of at least 0.5."),
        Metric("eval/step_accuracy_ci95", "share", "Half the width of the 95 % interval of `eval/step_accuracy`."),
        Metric("eval/first_step_accuracy", "share", "Held-out outputs whose first step's reward is at least 0.5."),
        Metric("eval/right_by_luck", "share", "Right held-out outputs that have a wrong step."),
        Metric("eval/pass@<k>", "share", "Chance that one of k outputs of a held-out prompt is right (unbiased)."),
        Metric("eval/mean_length", "tokens", "Mean length of a held-out output."),
        Metric(
            "eval/unscored", "outputs", "Held-out outputs without a reward: wrong in accuracy, out of `eval/reward`."
        ),
    ),
    "Reward models": (
        Metric(
            "rewards/<name>/version", "versions", "Version of the reward model that scored: its rounds of training."
        ),
        Metric("rewards/<name>/unread", "outputs", "Outputs too long for the reward model, or refused: not scored."),
        Metric("step_rewards/<name>/version", "versions", "Version of the reward model that scored the steps."),
        Metric(
            "step_rewards/<name>/unread", "outputs", "Outputs whose steps the reward model cannot read: not scored."
        ),
        Metric("reward_model/loss", "loss", "Mean loss of the update's labels or pairs, before the update."),
        Metric("reward_model/accuracy", "share", "Labels or pairs of the update judged right, before the update."),
        Metric("reward_model/grad_norm", "norm", "Norm of the reward model's gradient before it is clipped."),
        Metric("reward_model/learning_rate", "rate", "Learning rate of the update."),
        Metric("reward_model/tokens", "tokens", "Tokens of the update's examples."),
        Metric("reward_model/epoch", "passes", "Passes over the examples so far, as a fraction."),
        Metric("reward_model/predicted", "share", "Mean probability of being right that the trained model gives."),
        Metric("reward_model/verified", "share", "Share of the same outputs that the verifier calls right."),
        Metric(
            "reward_model/budget_halved", "times", "How often its training ran out of memory and halved its passes."
        ),
        Metric("reward_model/unverified", "outputs", "Outputs of the step that the verifier did not score."),
        Metric(
            "reward_model/ranked_right", "share", "Pairs of a right and a wrong output of a group that it ranks so."
        ),
        Metric(
            "reward_model/gap", "share", "`predicted` minus `verified`: grows where the policy only pleases the model."
        ),
        Metric(
            "reward_model/round", "rounds", "Number of the round that the event tells of; 0 is before the first step."
        ),
        Metric("reward_model/new", "examples", "Labelled examples of the round that are new."),
        Metric("reward_model/unlabelled", "outputs", "Outputs of the round that got no label: not learned from."),
        Metric("reward_model/replayed", "examples", "Examples of earlier rounds that were learned with them."),
        Metric("reward_model/held_out", "examples", "New examples of prompts that the model is never trained on."),
        Metric("reward_model/before/<name>", "as there", "As `reward_model/eval/<name>`, before the round's updates."),
        Metric("reward_model/updates", "updates", "Updates of a round inside a policy's run."),
        Metric("reward_model/updates/refused", "updates", "Updates left out because the gradient was not finite."),
        Metric("reward_model/version", "versions", "Version of the reward model after the round."),
        Metric("reward_model/dropped", "examples", "Examples of the round that the model cannot read: left out."),
        Metric("reward_model/eval/loss", "loss", "Mean loss of the held-out labels or pairs."),
        Metric("reward_model/eval/accuracy", "share", "Held-out labels on the right side of 0.5, or pairs in order."),
        Metric("reward_model/eval/auc", "share", "Chance that a right output (or step) scores above a wrong one."),
        Metric("reward_model/eval/calibration_error", "share", "Distance of probabilities and labels, over ten bins."),
        Metric("reward_model/eval/step_f1", "share", "F1 of finding wrong steps."),
        Metric("reward_model/eval/first_error_found", "share", "Outputs with a wrong step whose first one is found."),
        Metric("reward_model/eval/false_alarms", "share", "Outputs without a wrong step in which one is called wrong."),
    ),
    "Data": (Metric("data/dropped_long", "prompts", "Prompts left out because they were too long."),),
}
METRICS: tuple[Metric, ...] = tuple(metric for metrics in SECTIONS.values() for metric in metrics)

_HEAD = """\
# Metrics

A run writes `events.jsonl`: one JSON object per step, with `step` and the metrics below that apply to it. An
evaluation before the first step is an event of its own, with step 0. The terminal and TensorBoard show the same
events. Shares go from 0 to 1; KL and entropy are in nats. A number that is not finite is written as `null`.

`<name>` is a reward function's name, `<k>` a number of outputs. A reward function may log numbers of its own: they
appear under the names that it gives them.

This page is made from `src/groupwise/watch/metrics.py`; a test compares the two.
"""

_NOTES = """\
## How to read some of them

**A loss of 0 or close to it.** With one update per batch the ratio is 1, and the loss is then the weighted mean of
the advantages with its sign turned: within a group they sum to 0, so the loss is close to 0 while its gradient is
not. Look at `grad_norm`. A loss of *exactly* 0 with `frac_reward_zero_std` 1 means that no group had outputs with
different rewards: nothing is learned in that step, and the terminal says so.

**`frac_reward_zero_std` near 1 for long.** The prompts are all too easy or all too hard for the policy. More outputs
per prompt, prompts of another difficulty or a finer reward help.

**`sampling/logp_difference/*`.** Sampler and trainer compute the same numbers in different ways. In float32 they agree
to about 1e-5; much more than that means that the two do not see the same weights, tokens or temperature. Before the
updates of a step are made, and at every evaluation (of a few outputs), the difference is judged by the type that is
computed in:

| type | warned of: mean, worst | ends the run: mean, or a tenth of the tokens beyond (`stray`) |
|---|---|---|
| float32 | 1e-4, 1e-3 | 0.01, 0.02 |
| float16 | 0.01, 0.25 | 0.1, 0.25 |
| bfloat16 | 0.05, 1 | 0.3, 1 |

With `objective.importance_sampling` a sampler that differs is meant: then it is only warned of.

**`clip_ratio/*` of 0.** The clip cannot bind in the first update of a batch, where the ratio is 1.
"""


def document() -> str:
    """The page `docs/metrics.md`."""
    return "\n".join([_HEAD, *(_table(title, metrics) for title, metrics in SECTIONS.items()), _NOTES])


def _table(title: str, metrics: Iterable[Metric]) -> str:
    rows = "".join(f"| `{metric.name}` | {metric.unit} | {metric.meaning} |\n" for metric in metrics)
    return f"## {title}\n\n| metric | unit | meaning |\n|---|---|---|\n{rows}"


def unknown(names: Iterable[str]) -> list[str]:
    """Those of `names` that no metric of the table covers, in their order."""
    return [name for name in names if not _KNOWN.fullmatch(name)]


def _pattern(name: str) -> str:
    return "[^/]+".join(re.escape(part) for part in re.split(r"<\w+>", name))


_KNOWN = re.compile("|".join(_pattern(metric.name) for metric in METRICS))
