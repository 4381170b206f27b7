"""The learner: from scored groups and their credit to a batch, and from a batch to new weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from groupwise.errors import RunFolderError
from groupwise.learn.agreement import Difference, Guard, NoGuard, is_stray
from groupwise.learn.base import Metrics
from groupwise.learn.budget import TokenBudget, peak_memory
from groupwise.learn.forward import lay_out, score_outputs
from groupwise.learn.lanes import Replicas, at_once, deal
from groupwise.learn.optimizer import REFUSED, MasterOptimizer, OptimizerSettings
from groupwise.learn.pack import Batch, Credit, micro_batches, pack, split_updates
from groupwise.learn.reference import NoReference, Reference, subtract_kl
from groupwise.models.policy import Policy
from groupwise.objective import Objective, TokenLosses, token_losses, token_weights
from groupwise.seeds import stable_hash
from groupwise.state import State
from groupwise.types import GroupKey, Scored

_DIFFERENCE = "sampling/logp_difference"
ADVICE = (
    "Lower train.tokens_per_micro_batch, set model.gradient_checkpointing to true, or shorten prompts or outputs; "
    "`groupwise plan` tells what fits."
)
"""Where memory is not enough."""


@dataclass(frozen=True)
class LearnerSettings:
    """What the learner needs to know of a job. `correct_sampler` weighs by old / sampled log-probs (TIS, MIS)."""

    optimizer: OptimizerSettings
    temperature: float = 1.0
    num_iterations: int = 1
    updates_per_batch: int = 1
    tokens_per_micro_batch: int = 16384
    mask_truncated: bool = False
    correct_sampler: bool = False
    compute_dtype: torch.dtype = torch.float32
    seed: int = 0


class PolicyLearner:
    """A `Learner` over a Hugging Face model: AdamW on float32 master weights.

    Every forward of policy and reference goes through one token budget, which is halved where memory runs out. `guard`
    judges, before any update from a batch, whether the batch was sampled from this policy.
    """

    def __init__(
        self, policy: Policy, objective: Objective, settings: LearnerSettings, guard: Guard | None = None
    ) -> None:
        self.policy, self.objective, self.settings = policy, objective, settings
        self.guard = guard or NoGuard()
        self.optimizer = MasterOptimizer(policy.model, settings.optimizer, settings.compute_dtype)
        self.replicas = Replicas(policy, self.optimizer)
        self._tally = _Tally()
        self.token_budget = TokenBudget(settings.tokens_per_micro_batch, policy.device, ADVICE)
        self.reference = Reference(policy) if objective.needs_reference else NoReference()
        self._of_penalty: tuple[tuple[GroupKey, ...], Tensor, Tensor] | None = None

    @property
    def version(self) -> int:
        """How many updates have changed the weights."""
        return self.optimizer.applied

    @property
    def updates(self) -> int:
        """See `Learner`."""
        return self.optimizer.update

    def pack(self, scored: Scored, credit: Credit) -> Batch:
        """All outputs of a step as flat tensors."""
        return pack(
            scored, credit, temperature=self.settings.temperature, mask_truncated=self.settings.mask_truncated,
            device=self.policy.device, dtype=torch.promote_types(self.policy.dtype, torch.float32),
        )  # fmt: skip

    def refresh(self, iteration: int) -> None:
        """See `Learner`."""
        self.reference.refresh(self.policy, iteration)

    def subtract_kl(self, scored: Scored, metrics: Metrics) -> Scored:
        """See `Learner`. An output that is kept out of the loss pays too: its reward is in the group's mean all the
        same. The old log-probs that this takes are those of `prepare`. Raises ModelError where memory is not enough."""
        if not self.objective.kl_in_reward:
            return scored
        batch = self.pack(scored, [[0.0] * len(group.scores) for group in scored])
        old_T, ref_T = self.logprobs(batch), self.reference_logprobs(batch)
        self._of_penalty = tuple(group.group.key for group in scored), old_T, ref_T
        return subtract_kl(scored, batch, old_T, ref_T, self.objective.beta, metrics)

    def prepare(self, scored: Scored, credit: Credit) -> Batch:
        """The batch with old log-probs where there will be more than one update, and reference log-probs where the
        loss has a KL term. Both are computed once and fixed for all passes over the batch. Raises ModelError where
        memory is not enough."""
        batch = self.pack(scored, credit)
        live = self._live(batch, range(len(batch.outputs)))
        known, self._of_penalty = self._of_penalty, None
        if known is not None and known[0] != tuple(group.group.key for group in scored):
            known = None
        old = ref = None
        if self.settings.num_iterations * self.settings.updates_per_batch > 1:
            old = known[1] if known else self.logprobs(batch, live)
        if self.objective.kl_in_loss:
            ref = known[2] if known else self.reference_logprobs(batch, live)
        return batch.with_logprobs(old=old, ref=ref)

    def logprobs(self, batch: Batch, members: Sequence[int] | None = None) -> Tensor:
        """Log-probs `[T]` of a batch's output tokens under the current policy, without gradient; 0 for outputs that are
        not among `members` (all by default). Raises ModelError where memory is not enough."""
        return self._logprobs(self.policy, batch, members)

    def reference_logprobs(self, batch: Batch, members: Sequence[int] | None = None) -> Tensor:
        """The same under the reference."""
        return self._logprobs(self.reference.policy, batch, members)

    def _logprobs(self, policy: Policy, batch: Batch, members: Sequence[int] | None) -> Tensor:
        budget = self.token_budget
        return budget.run(lambda: score_outputs(policy, batch, budget.budget, members))

    def update(self, batch: Batch, passes_done: int = 0) -> Metrics:
        """One pass over the batch in `updates_per_batch` optimizer updates; `passes_done` were made before.

        Returns the metrics of all passes over this batch so far. Raises ModelError where the guard ends the run: the
        weights are as they were then.
        """
        groups = sorted({output.group for output in batch.outputs})
        seed = stable_hash(self.settings.seed, "updates", self.optimizer.update, passes_done)
        if passes_done == 0:
            self._tally = _Tally()
        for chosen in split_updates(groups, self.settings.updates_per_batch, seed):
            self._update(batch, set(chosen), first_pass=passes_done == 0)
        memory = {
            "memory/peak_bytes": peak_memory(self.policy.device),
            "memory/budget_halved": self.token_budget.halved,
        }
        return self._tally.metrics() | {name: float(value) for name, value in memory.items()}

    def check(self) -> None:
        """Raise ModelError where so many updates in a row were refused that a run ends (see `MasterOptimizer`)."""
        self.optimizer.check(self.settings.optimizer.total_updates)

    def _update(self, batch: Batch, groups: set[int], first_pass: bool) -> None:
        members = [i for i, output in enumerate(batch.outputs) if output.group in groups]
        live = self._live(batch, members)
        weights_T = self._weights(batch, members)
        # Before the first update the policy is the old policy: taken from this very pass, the ratio is exactly 1.
        pass_ = _Pass(batch, weights_T, first_pass, on_policy=first_pass and not self._tally.norms)
        lanes = deal(batch.outputs, live, self.replicas.most)

        def accumulate() -> list[_Tally]:
            each = zip(self.replicas.policies(len(lanes)), lanes, strict=True)
            return at_once(
                [partial(self._accumulate, *lane, self.token_budget.budget // len(lanes), pass_) for lane in each]
            )

        def drop() -> None:
            # The longest group came first, so little is lost.
            self.optimizer.zero_grad()
            self.replicas.drop()

        for tally in self.token_budget.run(accumulate, drop):
            self._tally.join(tally)
        self.replicas.gather()
        if first_pass:
            self.guard.check(self._tally.difference(), "In the outputs of this step")
        self._tally.updated(*self.optimizer.step())
        if first_pass:
            self._tally.tokens_skipped += sum(len(batch.outputs[m].token_ids) for m in set(members) - set(live))

    def _weights(self, batch: Batch, members: Sequence[int]) -> Tensor:
        """The normalisation of one update: 0 on outputs that take no part in it."""
        chosen = torch.zeros(len(batch.outputs), dtype=torch.bool, device=batch.group_S.device)
        chosen[list(members)] = True
        return token_weights(
            self.objective, completion_T=batch.completion_T, group_S=batch.group_S,
            trained_T=batch.trained_T & chosen[batch.completion_T], dtype=batch.advantages_T.dtype,
        )  # fmt: skip

    def _accumulate(self, policy: Policy, members: Sequence[int], budget: int, pass_: _Pass) -> _Tally:
        """Forward and backward over some outputs; gradients add up."""
        tally, batch = _Tally(), pass_.batch
        for part in micro_batches(batch.outputs, members, budget, policy.layout == "shared"):
            stream, place = lay_out(policy, batch.outputs, part)
            beforehand = pass_.on_policy and not self._reads_logprobs(batch)
            grad_logprobs_T = self._grad_logprobs(batch, place, pass_.weights_T) if beforehand else None
            logprobs_T, entropy_T = policy(
                stream, batch.temperature, entropy=pass_.first, grad_logprobs_T=grad_logprobs_T
            )
            known_T = None if pass_.on_policy else batch.old_logprobs_T
            old_T = logprobs_T.detach() if known_T is None else known_T[place]
            losses = self._losses(batch, place, logprobs_T, old_T)
            loss = (losses.loss_T * pass_.weights_T[place]).sum()
            loss.backward()
            trained_T = batch.trained_T[place]
            tally.add(loss, losses, trained_T)
            if entropy_T is not None:
                difference_T = (old_T - batch.sampled_logprobs_T[place]).abs()
                tally.add_first_pass(entropy_T, difference_T, is_stray(difference_T, policy.dtype), trained_T)
        return tally

    def _losses(self, batch: Batch, place: Tensor, logprobs_T: Tensor, old_T: Tensor) -> TokenLosses:
        return token_losses(
            self.objective, logprobs_T=logprobs_T, old_logprobs_T=old_T, advantages_T=batch.advantages_T[place],
            completion_T=batch.completion_T[place], trained_T=batch.trained_T[place],
            ref_logprobs_T=None if batch.ref_logprobs_T is None else batch.ref_logprobs_T[place],
            sampled_logprobs_T=batch.sampled_logprobs_T[place] if self.settings.correct_sampler else None,
        )  # fmt: skip

    def _reads_logprobs(self, batch: Batch) -> bool:
        """Whether the loss's gradient depends on log-probs beyond their difference to the old ones."""
        return batch.ref_logprobs_T is not None or self.settings.correct_sampler

    def _grad_logprobs(self, batch: Batch, place: Tensor, weights_T: Tensor) -> Tensor:
        """The gradient of the loss with respect to the log-probs `[T]` where these are the old ones, whatever they
        are."""
        same_T = torch.zeros_like(weights_T[place], requires_grad=True)
        loss = (self._losses(batch, place, same_T, same_T.detach()).loss_T * weights_T[place]).sum()
        return torch.autograd.grad(loss, same_T)[0]

    def _live(self, batch: Batch, members: Sequence[int]) -> list[int]:
        """Outputs that can have a gradient: skipping the others is exact, since weights are counted before."""
        skip = self.objective.may_skip_zero_advantages
        return [m for m in members if batch.trained_S[m] and not (skip and batch.zero_advantage_S[m])]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that the policy computes with, by name."""
        yield from self.policy.model.state_dict(keep_vars=True).items()

    def master_weights(self) -> dict[str, Tensor]:
        """The float32 weights, each tied one once, and persistent buffers."""
        tensors: dict[str, Tensor] = {name: m.detach() for name, m in self.optimizer.master_weights.items()}
        stored = self.policy.model.state_dict()
        buffers = {n: b for n, b in self.policy.model.named_buffers() if n in stored}
        return tensors | buffers | self.optimizer.buffers

    def state(self) -> State:
        """See `Stateful`: the files `model`, `optimizer` and, where there is one, `reference`."""
        optimizer, counters = self.optimizer.state()
        reference = self.reference.state_dict()
        tensors = {"model": self.master_weights(), "optimizer": optimizer}
        values = counters | self.token_budget.state() | {"reference_iteration": self.reference.iteration}
        return State({**tensors, **({"reference": reference} if reference else {})}, values)

    def restore(self, state: State) -> None:
        """See `Stateful`. A reference where there was none becomes the policy as it is now. Raises RunFolderError where
        the weights are of another model."""
        model = state.tensors["model"]
        check_shapes(self.master_weights(), model, state.source)
        self.optimizer.load(model, state.tensors.get("optimizer", {}), state.values)
        self.token_budget.load(state.values)
        with torch.no_grad():
            for name, buffer in [*self.policy.model.named_buffers(), *self.optimizer.buffers.items()]:
                if name in model:
                    buffer.copy_(model[name])
        if "reference" in state.tensors:
            self.reference.load_state_dict(state.tensors["reference"], state.values["reference_iteration"])


def check_shapes(own: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Raise RunFolderError unless weights, read from `source`, are of this model."""
    for name in sorted(own.keys() | found.keys()):
        ours, theirs = (str(list(side[name].shape)) if name in side else "absent" for side in (own, found))
        if ours != theirs:
            raise RunFolderError(
                f"Checkpoint {source} is of another model: its {name} is {theirs}, that of this job's model is {ours}. "
                "Put model.path back to what it was."
            )


@dataclass(frozen=True)
class _Pass:
    """What the micro-batches of an update have in common. `first`: of the passes over the batch."""

    batch: Batch
    weights_T: Tensor
    first: bool
    on_policy: bool


class _Tally:
    """Sums over the trained tokens of all passes over a batch; they leave the device when metrics are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.greatest: dict[str, Tensor] = {}
        self.norms: list[float] = []
        self.rate = 0.0
        self.micro_batches = self.tokens_skipped = 0

    def join(self, other: _Tally) -> None:
        """Count what another one has counted of the same update."""
        self.micro_batches += other.micro_batches
        for own, more in ((self.sums, other.sums), (self.counts, other.counts)):
            for name, value in more.items():
                _add(own, name, value)
        for name, value in other.greatest.items():
            self._greatest(name, value)

    def add(self, loss: Tensor, losses: TokenLosses, trained_T: Tensor) -> None:
        """Count one micro-batch."""
        low_T, high_T = losses.clipped_low_T, losses.clipped_high_T
        self.micro_batches += 1
        _add(self.sums, "loss", loss.detach())
        self._mean("clip_ratio/low_mean", low_T, trained_T)
        self._mean("clip_ratio/high_mean", high_T, trained_T)
        self._mean("clip_ratio/region_mean", low_T | high_T, trained_T)
        self._max("ratio/max", losses.ratio_T, trained_T)
        if losses.kl_T is not None:
            self._mean("kl", losses.kl_T, trained_T)

    def add_first_pass(self, entropy_T: Tensor, difference_T: Tensor, stray_T: Tensor, trained_T: Tensor) -> None:
        """Count what only the first pass can tell: what the sampling policy was like, and how far the sampler is."""
        self._mean("entropy", entropy_T, trained_T)
        self._mean(f"{_DIFFERENCE}/mean", difference_T, trained_T)
        self._max(f"{_DIFFERENCE}/max", difference_T, trained_T)
        self._mean(f"{_DIFFERENCE}/stray", stray_T, trained_T)
        _add(self.sums, "tokens/trained", trained_T.sum())

    def difference(self) -> Difference:
        """How far the sampler is from the policy, of the updates of the first pass so far."""
        count = self.counts.get(f"{_DIFFERENCE}/mean")
        if count is None:
            return Difference(0, 0.0, 0.0, 0.0)
        mean, stray = (self.sums[f"{_DIFFERENCE}/{name}"] / count.clamp(min=1) for name in ("mean", "stray"))
        worst = self.greatest[f"{_DIFFERENCE}/max"]
        tokens, *values = torch.stack([value.double() for value in (count, mean, worst, stray)]).tolist()
        return Difference(int(tokens), *values)

    def updated(self, norm: float, rate: float) -> None:
        """Count one optimizer update."""
        self.norms.append(norm)
        self.rate = rate

    def metrics(self) -> Metrics:
        """Means per trained token; per update for the loss, and for the gradient's norm where it was applied."""
        found = self.sums | self.greatest
        found |= {name: self.sums[name] / count.clamp(min=1) for name, count in self.counts.items()}
        values = torch.stack([value.double() for value in found.values()]).tolist() if found else []
        metrics: Metrics = {"loss": 0.0, "tokens/trained": 0.0} | dict(zip(found, values, strict=True))
        metrics["loss"] /= len(self.norms)
        applied = [norm for norm in self.norms if math.isfinite(norm)]
        return metrics | {
            "grad_norm": fmean(applied) if applied else math.nan,
            "learning_rate": self.rate,
            "updates": float(len(self.norms)),
            REFUSED: float(len(self.norms) - len(applied)),
            "micro_batches": float(self.micro_batches),
            "tokens/skipped": float(self.tokens_skipped),
        }

    def _mean(self, name: str, values_T: Tensor, trained_T: Tensor) -> None:
        # Selected by `where`: indexing by booleans would make the host wait for the device.
        _add(self.sums, name, torch.where(trained_T, values_T, 0).sum(dtype=torch.float64))
        _add(self.counts, name, trained_T.sum())

    def _max(self, name: str, values_T: Tensor, trained_T: Tensor) -> None:
        """For values that are not negative."""
        self._greatest(name, torch.where(trained_T, values_T, 0).max())

    def _greatest(self, name: str, top: Tensor) -> None:
        self.greatest[name] = torch.maximum(self.greatest[name], top) if name in self.greatest else top


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
