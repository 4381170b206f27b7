"""What a reward model is trained by: labels that are known, or which of two outputs is the better."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


def label_losses(logits_K: Tensor, labels_K: Tensor) -> Tensor:
    """Binary cross-entropy `[K]` of logits against labels in [0, 1]: `-y log p - (1 - y) log(1 - p)`.

    For a classifier of two labels `logits_K` are log-odds, and this is its cross-entropy.
    """
    return binary_cross_entropy_with_logits(logits_K, labels_K, reduction="none")


def preference_losses(chosen_K: Tensor, rejected_K: Tensor) -> Tensor:
    """Bradley-Terry: `-log sigmoid(chosen - rejected)` `[K]` per pair of scores."""
    return softplus(rejected_K - chosen_K)
