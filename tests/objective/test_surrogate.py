"""Where a bound takes a token's gradient away, and that what is flagged as clipped is exactly that."""

from math import inf

import pytest
import torch

from groupwise.objective import Objective, token_losses

RATIOS = [0.5, 0.85, 1.0, 1.15, 1.5, 4.0]


def run(objective: Objective, advantage: float) -> tuple[list[float], list[float], list[bool], list[bool]]:
    """Loss, gradient and the two flags for tokens with the ratios above."""
    logprobs_T = torch.tensor(RATIOS).double().log().requires_grad_()
    losses = token_losses(
        objective,
        logprobs_T=logprobs_T,
        old_logprobs_T=torch.zeros(6).double(),
        advantages_T=torch.full((6,), advantage).double(),
        completion_T=torch.arange(6),
    )
    (gradient,) = torch.autograd.grad(losses.loss_T.sum(), logprobs_T)
    return losses.loss_T.tolist(), gradient.tolist(), losses.clipped_low_T.tolist(), losses.clipped_high_T.tolist()


def test_clip_binds_above_for_good_tokens() -> None:
    loss, gradient, low, high = run(Objective(epsilon=0.2, epsilon_high=0.28), 1.0)
    assert loss == pytest.approx([-0.5, -0.85, -1.0, -1.15, -1.28, -1.28])
    assert gradient == pytest.approx([-0.5, -0.85, -1.0, -1.15, 0, 0])
    assert not any(low)
    assert high == [False, False, False, False, True, True]


def test_clip_binds_below_for_bad_tokens() -> None:
    loss, gradient, low, high = run(Objective(epsilon=0.1, epsilon_high=0.28), -2.0)
    assert loss == pytest.approx([1.8, 1.8, 2.0, 2.3, 3.0, 8.0])
    assert gradient == pytest.approx([0, 0, 2.0, 2.3, 3.0, 8.0])
    assert low == [True, True, False, False, False, False]
    assert not any(high)


def test_dual_clip_bounds_the_loss_of_bad_tokens_only() -> None:
    loss, gradient, low, high = run(Objective(dual_clip=3.0), -2.0)
    assert loss == pytest.approx([1.6, 1.7, 2.0, 2.3, 3.0, 6.0])
    assert gradient == pytest.approx([0, 1.7, 2.0, 2.3, 3.0, 0])
    assert high == [False] * 5 + [True]
    assert low == [True] + [False] * 5
    assert run(Objective(dual_clip=3.0), 1.0) == run(Objective(), 1.0)


def test_infinite_ranges_never_clip() -> None:
    for advantage in (1.0, -1.0):
        loss, gradient, low, high = run(Objective(epsilon=inf, epsilon_high=inf), advantage)
        assert loss == pytest.approx([-ratio * advantage for ratio in RATIOS])
        assert gradient == pytest.approx(loss)
        assert not any(low + high)


def test_range_zero_keeps_the_gradient_of_the_first_update() -> None:
    _, gradient, _, _ = run(Objective(epsilon=0.0, epsilon_high=0.0), 1.0)
    assert gradient == pytest.approx([-0.5, -0.85, -1.0, 0, 0, 0])


def test_cispo_caps_the_weight_and_keeps_every_gradient() -> None:
    for advantage in (1.0, -1.0):
        _, gradient, low, high = run(Objective(surrogate="cispo", epsilon_high=1.2), advantage)
        assert gradient == pytest.approx([-min(ratio, 1.2) * advantage for ratio in RATIOS])
        assert high == [False, False, False, False, True, True]
        assert not any(low)


def test_sapo_fades_and_never_cuts() -> None:
    _, gradient, low, high = run(Objective(surrogate="sapo"), 1.0)
    assert gradient[2] == pytest.approx(-1.0)
    assert all(slope < 0 for slope in gradient)
    assert not any(low + high)
    _, sharper, _, _ = run(Objective(surrogate="sapo", sapo_temperature_pos=3.0), 1.0)
    assert sharper[2] == pytest.approx(-1.0)
    assert abs(sharper[5]) < abs(gradient[5])


def test_zero_advantage_is_never_clipped() -> None:
    for surrogate in ("clip", "cispo", "sapo"):
        loss, gradient, low, high = run(Objective(surrogate=surrogate, epsilon_high=1.2, dual_clip=3.0), 0.0)
        assert not any(loss + gradient)
        assert not any(low + high)


def test_a_sequence_ratio_takes_advantages_per_token() -> None:
    """The output's ratio is each token's own, and each token keeps its own advantage: none is averaged or broadcast."""
    logprobs_T = torch.tensor([-1.0, -0.5, -2.0]).double().requires_grad_()
    advantages_T = torch.tensor([2.0, -1.0, 0.5]).double()
    for ratio, log_ratio in (("sequence_mean", -0.1), ("sequence_product", -0.3)):
        losses = token_losses(
            Objective(ratio=ratio, epsilon=inf, epsilon_high=inf),
            logprobs_T=logprobs_T,
            old_logprobs_T=torch.tensor([-1.2, -0.5, -1.5]).double(),
            advantages_T=advantages_T,
            completion_T=torch.zeros(3, dtype=torch.long),
        )
        expected = -torch.tensor(log_ratio).double().exp() * advantages_T
        torch.testing.assert_close(torch.autograd.grad(losses.loss_T.sum(), logprobs_T)[0], expected)
        torch.testing.assert_close(losses.loss_T.detach(), expected)
