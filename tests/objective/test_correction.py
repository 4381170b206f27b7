"""Correction for a sampler that is not the old policy."""

from dataclasses import replace

import pytest
import torch

from groupwise.objective import Objective, policy_loss, token_losses
from groupwise.objective.correction import CORRECTIONS, sampler_correction
from groupwise.objective.presets import CHOICES

OLD = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0]).double()
SAMPLED = OLD - torch.tensor([5.0, 0.5, 1.0, 0.5, 0.2]).double().log()  # exp(old - sampled) is 5, 0.5, 1 | 0.5, 0.2
TOKENS = {
    "old_logprobs_T": OLD,
    "sampled_logprobs_T": SAMPLED,
    "advantages_T": torch.ones(5).double(),
    "completion_T": torch.tensor([0, 0, 0, 1, 1]),
}


def correction(**changes: object) -> list[float]:
    losses = token_losses(replace(Objective(), **changes), logprobs_T=OLD, **TOKENS)
    assert losses.correction_T is not None
    assert torch.equal(losses.loss_T, -losses.correction_T)
    return losses.correction_T.tolist()


@pytest.mark.parametrize(
    ("kind", "bounds", "expected"),
    [
        ("token_truncate", {}, [3, 0.5, 1, 0.5, 0.2]),
        ("token_mask", {}, [0, 0.5, 1, 0.5, 0.2]),
        ("sequence_truncate", {}, [2.5, 2.5, 2.5, 0.1, 0.1]),
        ("sequence_truncate", {"importance_sampling_cap": 2.0}, [2, 2, 2, 0.1, 0.1]),
        ("sequence_mask", {"importance_sampling_cap": 2.0}, [0, 0, 0, 0.1, 0.1]),
        ("token_truncate", {"importance_sampling_floor": 0.4}, [3, 0.5, 1, 0.5, 0.4]),
        ("token_mask", {"importance_sampling_floor": 0.4}, [0, 0.5, 1, 0.5, 0]),
        ("sequence_mask", {"importance_sampling_floor": 0.4}, [2.5, 2.5, 2.5, 0, 0]),
    ],
)
def test_each_kind(kind: str, bounds: dict[str, float], expected: list[float]) -> None:
    assert correction(importance_sampling=kind, **bounds) == pytest.approx(expected)


def test_the_default_is_truncation_per_token_at_three() -> None:
    assert correction() == pytest.approx([3, 0.5, 1, 0.5, 0.2])


def test_untrained_tokens_are_no_part_of_a_sequence_weight() -> None:
    trained_T = torch.tensor([False, True, True, True, True])
    objective = Objective(importance_sampling="sequence_truncate")
    found = token_losses(objective, logprobs_T=OLD, trained_T=trained_T, **TOKENS).correction_T
    assert found is not None
    assert found[1:].tolist() == pytest.approx([0.5, 0.5, 0.1, 0.1])


def test_it_has_no_gradient_of_its_own() -> None:
    alone = sampler_correction(Objective(), OLD.clone().requires_grad_(), SAMPLED, TOKENS["completion_T"])
    assert not alone.requires_grad
    logprobs_T = OLD.clone().requires_grad_()
    (found,) = torch.autograd.grad(policy_loss(Objective(), logprobs_T=logprobs_T, **TOKENS), logprobs_T)
    weights = torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4]).double()
    torch.testing.assert_close(found, -weights * torch.tensor([3, 0.5, 1, 0.5, 0.2]).double())


def test_a_sampler_that_gave_a_token_no_chance_is_bounded() -> None:
    far = TOKENS | {"sampled_logprobs_T": SAMPLED.clone().fill_(-1e4)}
    for kind, expected in {
        "token_truncate": 3.0,
        "token_mask": 0.0,
        "sequence_truncate": 3.0,
        "sequence_mask": 0.0,
    }.items():
        losses = token_losses(Objective(importance_sampling=kind), logprobs_T=OLD, **far)
        assert losses.correction_T is not None
        assert losses.correction_T.eq(expected).all()


def test_the_table_has_every_choice() -> None:
    assert {"none", *CORRECTIONS} == set(CHOICES["importance_sampling"])
