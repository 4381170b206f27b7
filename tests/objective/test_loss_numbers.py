"""The worked example: one group, two outputs of 3 and 2 tokens. Values and gradients, to the printed digits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from groupwise.objective import PRESETS, Objective, policy_loss, token_losses
from groupwise.objective.kl import k3

LOGPROBS = [-1.0, -0.5, -2.0, -0.3, -1.2]
OLD = [-1.2, -0.5, -1.5, -0.3, -0.7]
REF = [-1.1, -0.5, -2.0, -0.5, -1.2]
ADVANTAGES = [1.0, 1.0, 1.0, -0.5, -0.5]
INF = float("inf")

NO_KL = Objective()
WITH_K3 = PRESETS["grpo"]
TOKEN_MEAN = Objective(weights="token_mean")
CONSTANT = Objective(weights="constant_length", max_completion_length=4)
GSPO = replace(PRESETS["gspo"], epsilon=0.2, epsilon_high=0.2)
RLOO = replace(PRESETS["rloo"], epsilon=INF, epsilon_high=INF)
CISPO = replace(PRESETS["cispo"], epsilon_high=1.2)
SAPO = PRESETS["sapo"]


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "logprobs_T": torch.tensor(LOGPROBS, dtype=dtype, requires_grad=True),
        "old_logprobs_T": torch.tensor(OLD, dtype=dtype),
        "advantages_T": torch.tensor(ADVANTAGES, dtype=dtype),
        "completion_T": torch.tensor([0, 0, 0, 1, 1]),
    }


def with_ref(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return batch(dtype) | {"ref_logprobs_T": torch.tensor(REF, dtype=dtype)}


def printed(values: list[float]) -> object:
    return pytest.approx(values, abs=6e-7)


def test_token_ratio() -> None:
    found = token_losses(NO_KL, **batch()).ratio_T
    assert found.tolist() == printed([1.221403, 1, 0.606531, 1, 0.606531])


def test_sequence_ratio_normalised_by_length() -> None:
    found = token_losses(GSPO, **batch()).ratio_T
    assert found.tolist() == printed([0.904837] * 3 + [0.778801] * 2)


def test_clipped_loss_per_token() -> None:
    found = token_losses(NO_KL, **batch())
    assert found.loss_T.tolist() == printed([-1.2, -1.0, -0.606531, 0.5, 0.4])
    assert found.clipped_high_T.tolist() == [True, False, False, False, False]
    assert found.clipped_low_T.tolist() == [False, False, False, False, True]


def test_k3_per_token() -> None:
    expected = [0.004837, 0, 0, 0.018731, 0]
    tokens = with_ref()
    assert k3(tokens["logprobs_T"], tokens["ref_logprobs_T"], tokens["old_logprobs_T"]).tolist() == printed(expected)
    found = token_losses(WITH_K3, **tokens).kl_T
    assert found is not None
    assert found.tolist() == printed(expected)


def test_cispo_per_token() -> None:
    found = token_losses(CISPO, **batch())
    assert found.loss_T.tolist() == printed([1.2, 0.5, 1.213061, -0.15, -0.363918])
    assert found.clipped_high_T.tolist() == [True, False, False, False, False]


LOSSES = [
    (NO_KL, -0.242755),
    (WITH_K3, -0.242536),
    (TOKEN_MEAN, -0.381306),
    (replace(TOKEN_MEAN, beta=0.04), -0.381118),
    (CONSTANT, -0.238316),
    (replace(CONSTANT, beta=0.04), -0.238198),
    (GSPO, -0.252419),
    (CISPO, 0.479829),
    (SAPO, -0.544311),
]


@pytest.mark.parametrize(("objective", "expected"), LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss(objective: Objective, expected: float, dtype: torch.dtype) -> None:
    found = policy_loss(objective, **with_ref(dtype))
    assert found.dtype == dtype
    assert found.item() == pytest.approx(expected, abs=6e-7)


GRADIENTS = [
    (NO_KL, [0, -0.166667, -0.101088, 0.125, 0]),
    (WITH_K3, [0.000634, -0.166667, -0.101088, 0.126813, 0]),
    (GSPO, [-0.150806, -0.150806, -0.150806, 0, 0]),
    (RLOO, [-0.370409, -0.370409, -0.370409, 0.151633, 0.151633]),
    (CISPO, [-0.24, -0.2, -0.121306, 0.1, 0.060653]),
    (SAPO, [-0.201093, -0.166667, -0.097275, 0.125, 0.072671]),
]


@pytest.mark.parametrize(("objective", "expected"), GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient(objective: Objective, expected: list[float], dtype: torch.dtype) -> None:
    tokens = with_ref(dtype)
    (found,) = torch.autograd.grad(policy_loss(objective, **tokens), tokens["logprobs_T"])
    assert found.tolist() == printed(expected)


def test_presets_by_name() -> None:
    assert policy_loss("grpo", **with_ref()).item() == pytest.approx(-0.242536, abs=6e-7)
    assert policy_loss("sapo", **batch()).item() == pytest.approx(-0.544311, abs=6e-7)


def test_on_policy_gradient_coefficient_of_the_paper() -> None:
    """Equation 21: with old = now, a token's coefficient is A + beta * (ref / pi - 1)."""
    tokens = with_ref()
    tokens["old_logprobs_T"] = tokens["logprobs_T"].detach()
    (found,) = torch.autograd.grad(policy_loss(WITH_K3, **tokens), tokens["logprobs_T"])
    ref_over_pi = (tokens["ref_logprobs_T"] - tokens["logprobs_T"]).exp()
    coefficient = tokens["advantages_T"] + 0.04 * (ref_over_pi - 1)
    lengths = torch.tensor([3, 3, 3, 2, 2])
    torch.testing.assert_close(found, -coefficient.detach() / (2 * lengths))
