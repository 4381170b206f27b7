"""The mathematics of the family: numbers and tensors in, the same out. Knows no model, no config, no logger.

A named algorithm is a value (`PRESETS["dapo"]`) that picks one of a few independent choices per column: credit, ratio,
surrogate, weights, KL. The loss is always `(loss_T * weights_T).sum()`."""

from groupwise.objective.credit import (
    group_advantages,
    less_kl,
    outcome_advantages,
    process_advantages,
    token_advantages,
)
from groupwise.objective.kl import k1_per_output
from groupwise.objective.loss import TokenLosses, policy_loss, token_losses
from groupwise.objective.presets import CHOICES, PRESETS, Objective, objective_named
from groupwise.objective.weights import token_weights

__all__ = [
    "CHOICES",
    "PRESETS",
    "Objective",
    "TokenLosses",
    "group_advantages",
    "k1_per_output",
    "less_kl",
    "objective_named",
    "outcome_advantages",
    "policy_loss",
    "process_advantages",
    "token_advantages",
    "token_losses",
    "token_weights",
]
