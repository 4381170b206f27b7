"""KL estimators: their values, and by full expectation over a small vocabulary, whose gradient each one has."""

import pytest
import torch
from torch import Tensor

from groupwise.objective import k1_per_output
from groupwise.objective.kl import KLS, k2, k3

VOCABULARY = 6


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the policy now, the old policy and the reference; the last two are fixed."""
    random = torch.Generator().manual_seed(0)
    now, old, ref = torch.randn(3, VOCABULARY, generator=random, dtype=torch.float64).unbind()
    return now.clone().requires_grad_(), old, ref


def expected_gradient(kl: str, *, off_policy: bool) -> Tensor:
    """Mean over every token, as sampled from the old policy (or the policy now), of the estimator's gradient."""
    logits, old_logits, ref_logits = distributions()
    logprobs = logits.log_softmax(-1)
    old = old_logits.log_softmax(-1) if off_policy else logprobs.detach()
    loss = (old.exp() * KLS[kl](logprobs, ref_logits.log_softmax(-1), old)).sum()
    return torch.autograd.grad(loss, logits)[0]


def divergence_gradient(*, reverse: bool) -> Tensor:
    logits, _, ref_logits = distributions()
    now, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    divergence = (now.exp() * (now - ref)).sum() if reverse else (ref.exp() * (ref - now)).sum()
    return torch.autograd.grad(divergence, logits)[0]


@pytest.mark.parametrize(("kl", "reverse"), [("k2", True), ("k3", False), ("k3_unbiased", True)])
def test_which_divergence_each_gradient_belongs_to(kl: str, reverse: bool) -> None:
    torch.testing.assert_close(expected_gradient(kl, off_policy=False), divergence_gradient(reverse=reverse))
    assert not torch.allclose(divergence_gradient(reverse=True), divergence_gradient(reverse=False), rtol=0.05)


def test_only_k3_unbiased_stays_exact_off_policy() -> None:
    torch.testing.assert_close(expected_gradient("k3_unbiased", off_policy=True), divergence_gradient(reverse=True))
    assert not torch.allclose(expected_gradient("k2", off_policy=True), divergence_gradient(reverse=True), rtol=0.05)
    assert not torch.allclose(expected_gradient("k3", off_policy=True), divergence_gradient(reverse=False), rtol=0.05)


def test_k1_as_a_loss_would_have_no_expected_gradient() -> None:
    logits, _, ref_logits = distributions()
    logprobs = logits.log_softmax(-1)
    loss = (logprobs.detach().exp() * (logprobs - ref_logits.log_softmax(-1))).sum()
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-15


def test_values() -> None:
    now, ref, old = torch.tensor([-1.0, -0.5]), torch.tensor([-1.5, -0.5]), torch.tensor([-1.2, -0.5])
    assert KLS["k2"](now, ref, old).tolist() == pytest.approx([0.125, 0])
    assert KLS["k3"](now, ref, old).tolist() == pytest.approx([0.1065307, 0])
    assert KLS["k3_unbiased"](now, ref, old).tolist() == pytest.approx([0.1301169, 0])


def test_k3_keeps_its_digits_near_zero() -> None:
    """For a log-ratio of d it is about d^2 / 2; `exp(d) - d - 1` in float32 would be rounding noise here."""
    now, ref = torch.zeros(2), torch.tensor([1e-3, -1e-3])
    assert k3(now, ref, now).tolist() == pytest.approx(k2(now, ref, now).tolist(), rel=5e-3)
    far = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert k3(torch.zeros(1000), far, far).min() >= -1e-12


def test_k1_per_output_sums_trained_tokens_and_has_no_gradient() -> None:
    old = torch.tensor([-1.0, -2.0, -3.0, float("nan")], requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -3.5, 0.0])
    found = k1_per_output(
        old,
        ref,
        torch.tensor([0, 0, 2, 2]),
        outputs=4,
        trained_T=torch.tensor([True, True, True, False]),
    )
    assert found.tolist() == [-0.5, 0.0, 0.5, 0.0]
    assert not found.requires_grad
    assert k1_per_output(old[:3], ref[:3], torch.tensor([0, 1, 1]), outputs=2).tolist() == [0.5, -0.5]
