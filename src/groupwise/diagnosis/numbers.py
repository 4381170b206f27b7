"""The doctor's checks of numbers: properties that hold for every model, tested on this one.

Log-probs are compared token by token, gradients by the norm of their difference over their norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groupwise.diagnosis.findings import Finding, measured
from groupwise.diagnosis.opened_job import OpenedJob, credit, unscored
from groupwise.errors import ModelError
from groupwise.learn import agreement
from groupwise.learn.learner import PolicyLearner
from groupwise.learn.pack import Batch
from groupwise.learn.reference import NoReference
from groupwise.models.layout import Tokens
from groupwise.models.policy import LogProbs, Policy
from groupwise.types import ScoredGroup

Pairs = Sequence[tuple[Tokens, Sequence[Tokens]]]
Gradient = list[Tensor]
KEPT = 1 << 16
"""Most entries of each parameter's gradient that are compared, evenly spread: two whole ones may not fit."""


@dataclass(frozen=True)
class Bounds:
    """The most that rounding may do, by the type that is computed in.

    Log-probs, in nats: `token` for the worst one, `mean` on average. `gradient`: relative, by norms.
    """

    token: float
    mean: float
    gradient: float


_GRADIENT = {4: 1e-3, 2: 0.15}
"""By bytes of a number. Gradients pass through the same sums as log-probs twice; the faults that are looked for move
them by 1e-2 and more. In bfloat16 a matmul's relative error is up to 2**-8 = 0.4 %, over tens of layers and back some
percent of a gradient, and what cancels between good and bad outputs makes that larger."""


def bounds(dtype: torch.dtype) -> Bounds:
    """The bounds for what is computed in `dtype`: of log-probs, those that a run is held to."""
    allowed = agreement.bounds(dtype)
    return Bounds(allowed.token, allowed.mean, _GRADIENT[min(4, dtype.itemsize)])


def shared_is_plain(opened: OpenedJob) -> list[Finding]:
    """The prompt once per group, against stock attention over each output with its own prompt."""
    name, policy = "shared = plain", opened.learner.policy
    if policy.layout != "shared":
        return [Finding(name, "not used", words=opened.model.loaded.line.partition(": ")[2])]
    shared = _with_gradient(opened, policy, [pairs(opened.few)])
    with _stock_attention(policy):
        plain = Policy(policy.model, "plain", policy.head, policy.cached)
        one_by_one = _with_gradient(opened, plain, [pairs([group]) for group in opened.few])
    fault = "The shared layout computes something else than this model does: set model.layout to 'plain'."
    return _compared(opened, name, shared, one_by_one, fault)


def micro_batches(opened: OpenedJob) -> list[Finding]:
    """The gradient of one update in one forward pass, and with every output in a pass of its own."""
    whole, small = (update_gradient(opened.learner, opened.batch, budget) for budget in (10**9, 1))
    fault = "The gradient depends on how outputs are cut into micro-batches, which is memory and no mathematics."
    return [measured("micro-batches", distance(small, whole), bounds(opened.dtype).gradient, fault=fault)]


def order(opened: OpenedJob) -> list[Finding]:
    """The gradient with groups and outputs in the opposite order, and so packed in other ways."""
    learner, groups = opened.learner, opened.few
    turned = [_turned(group) for group in reversed(groups)]
    turned_credit = [of_group[::-1] for of_group in reversed(credit(groups))]
    batch = learner.prepare(turned, turned_credit)
    longest = max(len(o.prompt) + len(o.token_ids) for o in batch.outputs)
    forward = update_gradient(learner, opened.batch, 3 * longest)
    backward = update_gradient(learner, batch, 2 * longest)
    fault = "The gradient depends on the order of outputs, or on what else lies in their forward pass."
    return [measured("order", distance(backward, forward), bounds(opened.dtype).gradient, fault=fault)]


def chunked_head(opened: OpenedJob) -> list[Finding]:
    """Log-probs from the head's matrix in chunks, against the logits of the model's own forward."""
    name, policy = "chunked head", opened.learner.policy
    if policy.head is None:
        return [Finding(name, "not used", words="whole logits, because its head is more than a matrix")]
    passes = [[(prompt, outputs[:2]) for prompt, outputs in pairs(opened.few[:1])]]  # whole logits are large
    chunked = _with_gradient(opened, policy, passes)
    whole = _with_gradient(opened, Policy(policy.model, policy.layout, None, policy.cached), passes)
    fault = "The head is not what the probe took it for: please report this model."
    return _compared(opened, name, chunked, whole, fault)


def ratio_one(opened: OpenedJob) -> list[Finding]:
    """Old log-probs, by a forward pass of their own, against those of the update's pass."""
    old_T = opened.batch.old_logprobs_T
    assert old_T is not None
    error = (_update_logprobs(opened) - old_T).exp().sub(1).abs().max().item()
    fault = "Before the first update no ratio may differ from 1: two passes over one output disagree."
    return [measured("ratio 1 at step 0", error, bounds(opened.dtype).token, fault=fault)]


def kl_zero(opened: OpenedJob) -> list[Finding]:
    """Log-probs of the reference, which is the policy before the first step, against the policy's."""
    if isinstance(opened.learner.reference, NoReference):
        return [Finding("KL 0 at step 0", "not used", words="objective.beta is 0: there is no reference")]
    found_T = opened.batch.ref_logprobs_T
    if found_T is None:  # the penalty is in the reward
        found_T = opened.learner.reference_logprobs(opened.batch)
    error = (found_T - _update_logprobs(opened)).abs().max().item()
    fault = "The reference is not the policy that training starts from, or does not compute the same each time."
    return [measured("KL 0 at step 0", error, bounds(opened.dtype).token, fault=fault)]


def sampler_is_trainer(opened: OpenedJob) -> list[Finding]:
    """What the engine said of the tokens that it drew, against what the learner says of them."""
    learner, groups = opened.learner, [unscored(group) for group in (*opened.groups, *opened.cut)]
    batch = learner.pack(groups, credit(groups))
    difference_T = (learner.logprobs(batch) - batch.sampled_logprobs_T).abs()
    lengths = [len(output.token_ids) for output in batch.outputs]
    allowed = bounds(opened.dtype)
    words = f"{len(lengths)} outputs of {min(lengths)} to {max(lengths)} tokens"
    fault = "The sampler draws from another distribution than the one that is trained."
    return [
        measured("sampler = trainer, mean", difference_T.mean().item(), allowed.mean, words=words, fault=fault),
        measured("sampler = trainer, worst", difference_T.max().item(), allowed.token, fault=fault),
    ]


def pairs(groups: Sequence[ScoredGroup]) -> Pairs:
    """`(prompt, outputs)` as a policy lays them out."""
    return [(g.group.prompt.token_ids, [c.token_ids for c in g.group.completions]) for g in groups]


def update_gradient(learner: PolicyLearner, batch: Batch, budget: int) -> Gradient:
    """The gradient that an update hands to Adam with micro-batches of `budget` tokens. Raises ModelError if not finite.

    Adam steps at a rate of 0, which moves nothing.
    """
    own, found = learner.token_budget.budget, list[Gradient]()
    hook = learner.optimizer.adam.register_step_pre_hook(lambda *_: found.append(_gathered(learner)))
    learner.token_budget.budget = budget
    try:
        learner.update(batch)
    finally:
        learner.token_budget.budget = own
        hook.remove()
    if not found:
        raise ModelError("The gradient is not finite: no update would be made. Try model.dtype = 'float32'.")
    return found[0]


def distance(found: Gradient, expected: Gradient) -> float:
    """The norm of the difference over that of `expected`; NaN where there is no gradient at all."""
    size = _norm(expected)
    return _norm([a - b for a, b in zip(found, expected, strict=True)]) / size if size else math.nan


def _norm(gradient: Gradient) -> float:
    return math.sqrt(sum(part.square().sum().item() for part in gradient))


def _with_gradient(opened: OpenedJob, policy: Policy, passes: Sequence[Pairs]) -> tuple[Tensor, Gradient]:
    """Log-probs `[T]` of some forward passes, and the gradient of an uneven sum of them."""
    learner = opened.learner
    learner.optimizer.zero_grad()
    sizes = [sum(len(output) for _, outputs in one for output in outputs) for one in passes]
    found = []
    for one, weights_T in zip(passes, torch.linspace(-1, 2, sum(sizes)).split(sizes), strict=True):
        logprobs_T = policy(policy.stream(one), learner.settings.temperature).logprobs_T
        (logprobs_T * weights_T.to(logprobs_T)).sum().backward()
        found.append(logprobs_T.detach().double().cpu())
    gradient = _gathered(learner)
    learner.optimizer.zero_grad()
    return torch.cat(found), gradient


def _compared(
    opened: OpenedJob, name: str, found: tuple[Tensor, Gradient], expected: tuple[Tensor, Gradient], fault: str
) -> list[Finding]:
    allowed = bounds(opened.dtype)
    error = (found[0] - expected[0]).abs().max().item()
    return [
        measured(f"{name}, log-probs", error, allowed.token, fault=fault),
        measured(f"{name}, gradient", distance(found[1], expected[1]), allowed.gradient, fault=fault),
    ]


def _update_logprobs(opened: OpenedJob) -> Tensor:
    """Log-probs `[T]` of the few outputs as an update computes them: with gradient and entropy, in one pass."""
    policy = opened.learner.policy
    found: LogProbs = policy(policy.stream(pairs(opened.few)), opened.learner.settings.temperature, entropy=True)
    return found.logprobs_T.detach()


def _gathered(learner: PolicyLearner) -> Gradient:
    found = []
    for master in learner.optimizer.master_weights.values():
        assert master.grad is not None
        spread = max(1, master.numel() // KEPT)
        found.append(master.grad.flatten()[::spread].to("cpu", torch.float64, copy=True))
    return found


def _turned(group: ScoredGroup) -> ScoredGroup:
    return unscored(replace(group.group, completions=group.group.completions[::-1]))


@contextmanager
def _stock_attention(policy: Policy) -> Iterator[None]:
    """The model with transformers' plainest attention, which knows windows, soft caps and sinks of every class."""
    name = policy.model.config._attn_implementation
    policy.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        policy.model.set_attn_implementation(name)


Check = Callable[[OpenedJob], list[Finding]]
NUMBERS: tuple[tuple[str, Check], ...] = (
    ("shared = plain", shared_is_plain), ("micro-batches", micro_batches), ("order", order),
    ("chunked head", chunked_head), ("ratio 1 at step 0", ratio_one), ("KL 0 at step 0", kl_zero),
    ("sampler = trainer", sampler_is_trainer),
)  # fmt: skip
