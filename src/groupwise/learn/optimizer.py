"""AdamW over float32 master weights, whatever the policy computes in, and the rate as a function of the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groupwise.errors import ModelError
from groupwise.models.cast import cast_to_compute_dtype

REFUSED = "updates/refused"
"""The metric that counts updates whose gradient was not finite."""
REFUSED_UPDATES = 5
"""After so many refused updates in a row, or a whole run of them, no later one is expected to be applied."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, its schedule over `total_updates`, and clipping. The fields are those of the job's `[train]`."""

    learning_rate: float
    total_updates: int
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0


_DECAY: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def refusal(metrics: Mapping[str, float]) -> str:
    """What to say of a step of which updates were refused; empty where none were."""
    refused = int(metrics.get(REFUSED, 0))
    if not refused:
        return ""
    return (
        f"{refused} of {int(metrics.get('updates', 1))} updates refused: the gradient was not finite (infinite or "
        f"NaN), so the weights stay as they were. After {REFUSED_UPDATES} refused updates in a row the run ends."
    )


def learning_rate(settings: OptimizerSettings, update: int) -> float:
    """The rate of update `update` (from 0): a rise over `warmup_steps`, then the schedule, 0 only after the last."""
    if update < settings.warmup_steps:
        return settings.learning_rate * (update + 1) / settings.warmup_steps
    rest = max(1, settings.total_updates - settings.warmup_steps)
    progress = min(1.0, (update - settings.warmup_steps) / rest)
    return settings.learning_rate * _DECAY[settings.lr_scheduler_type](progress)


_MEANS = ("exp_avg", "exp_avg_sq")
"""Adam's names of its first and second moments: of gradients and of their squares."""


class MasterOptimizer:
    """Owns float32 masters and their gradients. Where the module computes in float32 the masters are its parameters.

    Otherwise each backward pass adds its gradient to a float32 buffer at once and drops the narrow one, so that
    accumulation over micro-batches never rounds; after a step the masters are cast into the module, once.

    `frozen` and `buffers` have, in float32, what is not trained and what was cast of persistent buffers: casting a
    module must not lose them.

    `update` counts updates, which the schedule goes by; `applied` those that changed the weights, and
    `refused_in_a_row` those since then that did not, because their gradient was not finite.
    """

    def __init__(
        self, module: nn.Module, settings: OptimizerSettings, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        """Take over a module in float32 and, where `compute_dtype` is narrower, cast it to that.

        See `cast_to_compute_dtype` for what stays as it is.
        """
        self.settings = settings
        self.update = self.applied = self.refused_in_a_row = 0
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.frozen = {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}
        before = {name: p.detach() for name, p in self.parameters.items()}
        self.buffers = cast_to_compute_dtype(module, compute_dtype)
        self.master_weights: dict[str, Tensor] = {
            name: p if p.dtype == before[name].dtype else before[name] for name, p in self.parameters.items()
        }
        decayed = [m for m in self.master_weights.values() if m.ndim > 1]
        others = [m for m in self.master_weights.values() if m.ndim <= 1]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon, fused=True,
        )  # fmt: skip
        self._make_state()
        self.zero_grad()
        for name, parameter in self.parameters.items():
            _gather(parameter, self.master_weights[name].grad)

    def gather_apart(self, module: nn.Module) -> dict[str, Tensor]:
        """Gradients, by name, that backward passes of another module over the same weights add up from now on."""
        gradients = {name: torch.zeros_like(master) for name, master in self.master_weights.items()}
        others = dict(module.named_parameters())
        for name, gradient in gradients.items():
            _gather(others[name], gradient)
        return gradients

    def add_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Add some that were gathered apart."""
        for name, master in self.master_weights.items():
            assert master.grad is not None
            master.grad += gradients[name]

    def zero_grad(self) -> None:
        """Gradients to 0, not to None: an update whose every output was skipped still moves the first and second
        moments."""
        for master in self.master_weights.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            else:
                master.grad.zero_()

    def step(self) -> tuple[float, float]:
        """One update from the gathered gradients: `(gradient norm before clipping, learning rate)`.

        A gradient whose norm is not finite is not applied; the schedule counts it as an update all the same.
        """
        gradients = [m.grad for m in self.master_weights.values() if m.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm, rate = total.item(), learning_rate(self.settings, self.update)
        if math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(list(self.master_weights.values()), self.settings.max_grad_norm, total)
            for group in self.adam.param_groups:
                group["lr"] = rate
            self.adam.step()
            self._cast()
            self.applied, self.refused_in_a_row = self.applied + 1, 0
        else:
            self.refused_in_a_row += 1
        self.update += 1
        self.zero_grad()
        return norm, rate

    @torch.no_grad()
    def _cast(self) -> None:
        for name, parameter in self.parameters.items():
            if self.master_weights[name] is not parameter:
                parameter.copy_(self.master_weights[name])

    def check(self, planned: int = REFUSED_UPDATES) -> None:
        """Raise ModelError where as many updates in a row were refused as end a run of `planned` updates."""
        refused = self.refused_in_a_row
        if refused >= min(REFUSED_UPDATES, planned):
            raise ModelError(
                f"The last {refused} updates were all refused, because their gradient was not finite: the weights are "
                f"those after {self.applied} updates, and nothing is learned any more. Lower the learning rate, look "
                "for rewards or labels of extreme size, and compute in float32 (dtype) where it is float16 or bfloat16."
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Adam's first and second moments by parameter name (none before its first step), and the counters."""
        states = {name: self.adam.state[master] for name, master in self.master_weights.items()}
        tensors = {f"{name}.{key}": state[key] for name, state in states.items() for key in _MEANS if self.applied}
        counters = {"update": self.update, "adam_steps": self.applied, "refused_in_a_row": self.refused_in_a_row}
        return tensors, counters

    @torch.no_grad()
    def load(
        self, master_weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], counters: Mapping[str, int]
    ) -> None:
        """Take up weights and state where `state` and the masters left them; without `tensors` means are 0.

        Raises KeyError where `tensors` lack one.
        """
        for name, master in self.master_weights.items():
            master.copy_(master_weights[name])
        self._cast()
        self.update, self.applied = counters["update"], counters["adam_steps"]
        self.refused_in_a_row = counters["refused_in_a_row"]
        for name, master in self.master_weights.items():
            state = self.adam.state[master]
            state["step"].fill_(float(counters["adam_steps"]))
            for key in _MEANS:
                if tensors:
                    state[key].copy_(tensors[f"{name}.{key}"])
                else:
                    state[key].zero_()

    def _make_state(self) -> None:
        """Adam's state of before its first step, as Adam itself would make it there.

        By then sampling and passes have freed memory, and the first and second moments would lie in pieces of that for
        good: what the next step asks for would not fit between them any more, and be new memory once again (LOG.md).
        """
        for master in self.master_weights.values():
            means = {key: torch.zeros_like(master) for key in _MEANS}
            self.adam.state[master] = {"step": torch.tensor(0.0, device=master.device), **means}


def _gather(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    """Have each backward pass add to `gradient`: of its own accord where the types are the same, else by a hook."""
    assert gradient is not None
    if parameter.dtype == gradient.dtype:
        parameter.grad = gradient
        return

    def add(narrow: Tensor) -> None:
        assert narrow.grad is not None
        gradient.add_(narrow.grad)
        narrow.grad = None

    parameter.register_post_accumulate_grad_hook(add)
