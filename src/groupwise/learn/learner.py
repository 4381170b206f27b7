"""The learner: from scored groups and their credit to a batch, and from a batch to new weights."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from groupwise.learn.forward import lay_out, score_outputs
from groupwise.learn.optimizer import MasterOptimizer, OptimizerSettings
from groupwise.learn.pack import Batch, Credit, micro_batches, pack, split_updates
from groupwise.learn.reference import NoReference, Reference
from groupwise.models.policy import Policy
from groupwise.objective import Objective, TokenLosses, token_losses, token_weights
from groupwise.seeds import stable_hash
from groupwise.types import Scored

Metrics = dict[str, float]


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


class Learner:
    """Holds the policy's master weights and optimizer, and turns batches into updates."""

    def __init__(self, policy: Policy, objective: Objective, settings: LearnerSettings) -> None:
        self.policy, self.objective, self.settings = policy, objective, settings
        self.optimizer = MasterOptimizer(policy.model, settings.optimizer, settings.compute_dtype)

    @property
    def version(self) -> int:
        """How many updates the weights have seen."""
        return self.optimizer.update

    def pack(self, scored: Scored, credit: Credit) -> Batch:
        """All outputs of a step as flat tensors."""
        return pack(
            scored, credit, temperature=self.settings.temperature, mask_truncated=self.settings.mask_truncated,
            device=self.policy.device,
        )  # fmt: skip

    def prepare(self, scored: Scored, credit: Credit, reference: Reference | NoReference) -> Batch:
        """The batch with old log-probs where there will be more than one update, and reference log-probs where the
        loss has a KL term. Both are fixed for all passes over the batch."""
        batch = self.pack(scored, credit)
        live = self._live(batch, range(len(batch.outputs)))
        old = None
        if self.settings.num_iterations * self.settings.updates_per_batch > 1:
            old = self.logprobs(batch, live)
        ref = reference.logprobs(batch, self.settings.tokens_per_micro_batch) if self.objective.kl_in_loss else None
        return batch.with_logprobs(old=old, ref=ref)

    def logprobs(self, batch: Batch, members: Sequence[int] | None = None) -> Tensor:
        """Log-probs `[T]` of a batch's output tokens under the current policy, without gradient."""
        return score_outputs(self.policy, batch, self.settings.tokens_per_micro_batch, members)

    def update(self, batch: Batch, passes_done: int = 0) -> Metrics:
        """One pass over the batch in `updates_per_batch` optimizer updates; returns metrics averaged over the pass."""
        groups = sorted({output.group for output in batch.outputs})
        seed = stable_hash(self.settings.seed, "updates", self.version, passes_done)
        tally = _Tally(first=passes_done == 0)
        for chosen in split_updates(groups, self.settings.updates_per_batch, seed):
            self._update(batch, set(chosen), tally)
        return tally.metrics() | {"memory/peak_bytes": float(peak_memory(self.policy.device))}

    def _update(self, batch: Batch, groups: set[int], tally: _Tally) -> None:
        members = [i for i, output in enumerate(batch.outputs) if output.group in groups]
        live = self._live(batch, members)
        weights_T = self._weights(batch, members)
        parts = micro_batches(batch.outputs, live, self.settings.tokens_per_micro_batch, self.policy.layout == "shared")
        for part in parts:
            self._accumulate(batch, part, weights_T, tally)
        norm, rate, finite = self.optimizer.step()
        tally.updated(norm, rate, finite)
        tally.tokens_skipped += sum(len(batch.outputs[m].token_ids) for m in set(members) - set(live))

    def _weights(self, batch: Batch, members: Sequence[int]) -> Tensor:
        """The normalisation of one update: 0 on outputs that take no part in it."""
        chosen = torch.zeros(len(batch.outputs), dtype=torch.bool, device=batch.group_S.device)
        chosen[list(members)] = True
        return token_weights(
            self.objective, completion_T=batch.completion_T, group_S=batch.group_S,
            trained_T=batch.trained_T & chosen[batch.completion_T],
        )  # fmt: skip

    def _accumulate(self, batch: Batch, part: Sequence[int], weights_T: Tensor, tally: _Tally) -> None:
        """Forward and backward over one micro-batch; gradients add up in the masters."""
        stream, place = lay_out(self.policy, batch.outputs, part)
        logprobs_T, entropy_T = self.policy(stream, batch.temperature, entropy=tally.first)
        old = batch.old_logprobs_T
        old_T = logprobs_T.detach() if old is None else old[place]
        sampled_T, trained_T = batch.sampled_logprobs_T[place], batch.trained_T[place]
        losses = token_losses(
            self.objective, logprobs_T=logprobs_T, old_logprobs_T=old_T, advantages_T=batch.advantages_T[place],
            completion_T=batch.completion_T[place], trained_T=trained_T,
            ref_logprobs_T=None if batch.ref_logprobs_T is None else batch.ref_logprobs_T[place],
            sampled_logprobs_T=sampled_T if self.settings.correct_sampler else None,
        )  # fmt: skip
        loss = (losses.loss_T * weights_T[place]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        tally.add(loss, losses, trained_T, entropy_T, (old_T - sampled_T).abs())

    def _live(self, batch: Batch, members: Sequence[int]) -> list[int]:
        """Outputs that can have a gradient: skipping the others is exact, since weights are counted before."""
        skip = self.objective.may_skip_zero_advantages
        return [m for m in members if not (skip and batch.silent_S[m])]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that the policy computes with, by name."""
        yield from self.policy.model.state_dict(keep_vars=True).items()

    def masters(self) -> dict[str, Tensor]:
        """The float32 weights, each tied one once, and persistent buffers."""
        tensors: dict[str, Tensor] = {name: m.detach() for name, m in self.optimizer.masters.items()}
        stored = self.policy.model.state_dict()
        return tensors | {n: b for n, b in self.policy.model.named_buffers() if n in stored}

    def state_dict(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by file (`model`, `optimizer`) and the counters that go with them."""
        optimizer, counters = self.optimizer.state()
        return {"model": self.masters(), "optimizer": optimizer}, counters

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], counters: Mapping[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        self.optimizer.load(tensors["model"], tensors.get("optimizer", {}), counters)
        with torch.no_grad():
            for name, buffer in self.policy.model.named_buffers():
                if name in tensors["model"]:
                    buffer.copy_(tensors["model"][name])


@dataclass
class _Tally:
    """Sums over the trained tokens of one pass. Numbers leave the device once, at the end."""

    first: bool
    sums: dict[str, Tensor] = field(default_factory=dict)
    greatest: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    tokens_skipped: int = 0
    micro_batches: int = 0
    norms: list[float] = field(default_factory=list)
    refused: int = 0
    rate: float = 0.0

    def add(
        self, loss: Tensor, losses: TokenLosses, trained_T: Tensor, entropy_T: Tensor | None, difference_T: Tensor
    ) -> None:
        """Count one micro-batch."""
        self.micro_batches += 1
        self.tokens += int(trained_T.sum())
        self._sum("loss", loss.detach())
        low, high = losses.clipped_low_T, losses.clipped_high_T
        per_token: dict[str, Tensor | None] = {
            "kl": losses.kl_T, "entropy": entropy_T, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low | high, "sampling/logp_difference/mean": difference_T if self.first else None,
        }  # fmt: skip
        for name, values_T in per_token.items():
            if values_T is not None:
                self._sum(name, values_T[trained_T].float().sum())
        largest = {"ratio/max": losses.ratio_T}
        if self.first:
            largest["sampling/logp_difference/max"] = difference_T
        for name, values_T in largest.items():
            top = values_T[trained_T].max() if bool(trained_T.any()) else torch.zeros((), device=values_T.device)
            self.greatest[name] = torch.maximum(self.greatest.get(name, top), top)

    def updated(self, norm: float, rate: float, finite: bool) -> None:
        """Count one optimizer update."""
        self.norms.append(norm)
        self.rate = rate
        self.refused += not finite

    def metrics(self) -> Metrics:
        """Means per trained token (per update for the loss and the gradient's norm)."""
        found = {name: value.item() / max(1, self.tokens) for name, value in self.sums.items() if name != "loss"}
        found |= {name: value.item() for name, value in self.greatest.items()}
        updates = len(self.norms)
        return found | {
            "loss": self.sums["loss"].item() / updates if "loss" in self.sums else 0.0,
            "grad_norm": sum(self.norms) / updates,
            "learning_rate": self.rate,
            "updates": float(updates),
            "updates/refused": float(self.refused),
            "micro_batches": float(self.micro_batches),
            "tokens/trained": float(self.tokens),
            "tokens/skipped": float(self.tokens_skipped),
        }

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: on the CUDA device, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
