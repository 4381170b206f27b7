"""What holds for every objective, whatever the numbers: the list "What is promised" of `docs/algorithm.md`."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from torch import Tensor

from groupwise.errors import ConfigError, ObjectiveError
from groupwise.objective import PRESETS, Objective, policy_loss, token_losses, token_weights

ALL = {name: replace(objective, max_completion_length=9) for name, objective in PRESETS.items()}
TOKEN_NAMES = ("logprobs_T", "old_logprobs_T", "ref_logprobs_T", "sampled_logprobs_T", "advantages_T", "completion_T")
every_preset = pytest.mark.parametrize("name", PRESETS)
every_kl = pytest.mark.parametrize("kl", ["k2", "k3", "k3_unbiased"])

Batch = dict[str, Tensor]


def random_batch(seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Five groups of three outputs of 1 to 6 tokens."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (15,), generator=random)
    completion_T = torch.arange(15).repeat_interleave(lengths)

    def noise() -> Tensor:
        return torch.randn(len(completion_T), generator=random, dtype=torch.float64).to(dtype)

    logprobs_T = -noise().abs()
    return {
        "logprobs_T": logprobs_T.clone().requires_grad_(),
        "old_logprobs_T": logprobs_T + 0.3 * noise(),
        "ref_logprobs_T": logprobs_T + 0.3 * noise(),
        "sampled_logprobs_T": logprobs_T + 0.3 * noise(),
        "advantages_T": noise(),
        "completion_T": completion_T,
        "group_S": torch.arange(15) // 3,
    }


def gradient(objective: Objective | str, batch: Batch) -> Tensor:
    (found,) = torch.autograd.grad(policy_loss(objective, **batch), batch["logprobs_T"])
    return found


def take(batch: Batch, keep_T: Tensor, weights_T: Tensor) -> Batch:
    """A micro-batch: some tokens, with the numbers of the outputs and the weights of the whole update."""
    part = {name: batch[name][keep_T] for name in TOKEN_NAMES}
    part["logprobs_T"] = part["logprobs_T"].detach().requires_grad_()
    return part | {"weights_T": weights_T[keep_T]}


@every_preset
@pytest.mark.parametrize("seed", range(3))
def test_any_split_into_micro_batches_has_the_same_loss_and_gradient(name: str, seed: int) -> None:
    objective, batch = replace(ALL[name], beta=0.1), random_batch(seed)
    weights_T = token_weights(
        objective, completion_T=batch["completion_T"], group_S=batch["group_S"], dtype=torch.float64
    )
    micro_S = torch.randint(0, 4, (15,), generator=torch.Generator().manual_seed(seed))  # splits groups, not outputs
    whole, loss = gradient(objective, batch), 0.0
    for number in range(4):
        keep_T = micro_S[batch["completion_T"]] == number
        part = take(batch, keep_T, weights_T)
        loss += policy_loss(objective, **part).item()
        torch.testing.assert_close(gradient(objective, part), whole[keep_T], rtol=0, atol=1e-12)
    assert loss == pytest.approx(policy_loss(objective, **batch).item(), abs=1e-12)


@every_preset
def test_order_and_names_of_outputs_and_groups_do_not_matter(name: str) -> None:
    objective, batch = replace(ALL[name], beta=0.1), random_batch(3)
    random = torch.Generator().manual_seed(3)
    order_T = torch.randperm(len(batch["completion_T"]), generator=random)  # even tokens of one output may lie apart
    renamed_S = torch.randperm(15, generator=random)
    other = {key: batch[key][order_T] for key in TOKEN_NAMES}
    other["logprobs_T"] = other["logprobs_T"].detach().requires_grad_()
    other["completion_T"] = renamed_S[other["completion_T"]]
    other["group_S"] = 100 - 7 * batch["group_S"][renamed_S.argsort()]
    torch.testing.assert_close(gradient(objective, other), gradient(objective, batch)[order_T], rtol=0, atol=1e-12)


@every_preset
def test_old_equal_to_now_gives_ratio_one_and_the_gradient_of_reinforce(name: str) -> None:
    objective, batch = replace(ALL[name], beta=0.0), random_batch(4)
    batch["old_logprobs_T"] = batch["logprobs_T"].detach().clone()
    del batch["sampled_logprobs_T"], batch["ref_logprobs_T"]
    weights_T = token_weights(
        objective, completion_T=batch["completion_T"], group_S=batch["group_S"], dtype=torch.float64
    )
    torch.testing.assert_close(gradient(objective, batch), -batch["advantages_T"] * weights_T, rtol=0, atol=1e-15)
    del batch["group_S"]
    assert token_losses(objective, **batch).ratio_T.eq(1).all()


@every_kl
def test_reference_equal_to_now_gives_no_kl_gradient(kl: str) -> None:
    batch = random_batch(5)
    batch["ref_logprobs_T"] = batch["logprobs_T"].detach().clone()
    batch["advantages_T"] = torch.zeros_like(batch["advantages_T"])
    assert gradient(Objective(kl=kl, beta=1.0), batch).eq(0).all()
    assert policy_loss(Objective(kl=kl, beta=1.0), **batch).item() == 0


@every_preset
def test_a_zero_advantage_group_adds_no_policy_gradient_and_may_be_skipped(name: str) -> None:
    objective, batch = replace(ALL[name], beta=0.0), random_batch(6)
    idle_T = batch["group_S"][batch["completion_T"]] == 2
    batch["advantages_T"] = batch["advantages_T"].masked_fill(idle_T, 0.0)
    weights_T = token_weights(
        objective, completion_T=batch["completion_T"], group_S=batch["group_S"], dtype=torch.float64
    )
    whole = gradient(objective, batch)
    assert objective.may_skip_zero_advantages
    assert whole[idle_T].eq(0).all()
    kept = gradient(objective, take(batch, ~idle_T, weights_T))
    torch.testing.assert_close(kept, whole[~idle_T], rtol=0, atol=1e-15)


def test_with_a_kl_term_a_zero_advantage_still_has_a_gradient() -> None:
    batch = random_batch(6)
    batch["advantages_T"] = torch.zeros_like(batch["advantages_T"])
    assert not PRESETS["grpo"].may_skip_zero_advantages
    assert gradient("grpo", batch).abs().max() > 0


@every_preset
@pytest.mark.parametrize("rubbish", [nan, inf, -inf])
def test_what_an_untrained_token_holds_never_leaks(name: str, rubbish: float) -> None:
    objective, batch = replace(ALL[name], beta=0.1, kl="k3_unbiased"), random_batch(7)
    trained_T = torch.arange(len(batch["completion_T"])) % 3 != 0
    clean = gradient(objective, batch | {"trained_T": trained_T})
    dirty = {key: value.detach().clone() for key, value in batch.items()}
    for key in TOKEN_NAMES[:-1]:
        dirty[key][~trained_T] = rubbish
    dirty["logprobs_T"].requires_grad_()
    loss = policy_loss(objective, **dirty, trained_T=trained_T)
    (found,) = torch.autograd.grad(loss, dirty["logprobs_T"])
    assert loss.isfinite()
    assert torch.equal(found, clean)
    assert found[~trained_T].eq(0).all()

    weights_T = torch.where(trained_T, 1.0, rubbish)
    weighted = dirty | {"trained_T": trained_T, "weights_T": weights_T}
    assert policy_loss(objective, **weighted).isfinite()
    assert gradient(objective, weighted).isfinite().all()
    part = token_losses(objective, **{k: v for k, v in dirty.items() if k != "group_S"}, trained_T=trained_T)
    assert part.loss_T[~trained_T].eq(0).all()
    assert not (part.clipped_low_T | part.clipped_high_T)[~trained_T].any()


def test_an_update_without_trained_tokens_is_zero_not_nan() -> None:
    batch = random_batch(8)
    batch["trained_T"] = torch.zeros_like(batch["completion_T"], dtype=torch.bool)
    for objective in ALL.values():
        assert policy_loss(objective, **batch).item() == 0
        assert gradient(objective, batch).eq(0).all()


def test_gradients_flow_to_the_current_logprobs_alone() -> None:
    batch = random_batch(9)
    others = ("old_logprobs_T", "ref_logprobs_T", "sampled_logprobs_T", "advantages_T")
    for key in others:
        batch[key].requires_grad_()
    for name, objective in ALL.items():
        loss = policy_loss(replace(objective, beta=0.1, kl="k3_unbiased"), **batch)
        found = torch.autograd.grad(loss, [batch[key] for key in others], allow_unused=True)
        assert found == (None,) * 4, name


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_a_runaway_output_stays_finite(sign: float) -> None:
    """A sequence ratio of e^400 overflows float32: its gradient must be large or clipped, never NaN."""
    tokens = {
        "logprobs_T": torch.zeros(40, requires_grad=True),
        "old_logprobs_T": torch.full((40,), -10.0),
        "advantages_T": torch.full((40,), sign),
        "completion_T": torch.zeros(40, dtype=torch.long),
    }
    found = gradient(replace(PRESETS["rloo"], beta=0.0), tokens)
    assert found.isfinite().all()
    assert (found.abs().max() > 1e6) == (sign < 0)


@every_preset
def test_beta_zero_never_touches_the_reference(name: str) -> None:
    batch, objective = random_batch(10), replace(ALL[name], beta=0.0)
    expected = gradient(objective, batch)
    batch["ref_logprobs_T"] = torch.full((3,), nan)
    assert torch.equal(gradient(objective, batch), expected)
    del batch["ref_logprobs_T"], batch["group_S"]
    assert token_losses(objective, **batch).kl_T is None


def test_a_penalty_in_the_reward_is_no_term_of_the_loss() -> None:
    batch = random_batch(11)
    del batch["ref_logprobs_T"]
    assert policy_loss("rloo", **batch).isfinite()


def test_importance_sampling_none_ignores_the_sampler() -> None:
    batch = random_batch(12)
    plain = gradient(Objective(importance_sampling="none"), batch)
    corrected = gradient(Objective(), batch)
    del batch["sampled_logprobs_T"]
    assert torch.equal(plain, gradient(Objective(), batch))
    assert not torch.allclose(plain, corrected)


def test_the_correction_multiplies_the_surrogate_not_the_kl() -> None:
    batch = random_batch(13)
    batch["advantages_T"] = torch.zeros_like(batch["advantages_T"])
    corrected = gradient(PRESETS["grpo"], batch)
    del batch["sampled_logprobs_T"]
    assert torch.equal(corrected, gradient(PRESETS["grpo"], batch))


def test_float32_agrees_with_float64() -> None:
    for objective in ALL.values():
        single, double = random_batch(14, torch.float32), random_batch(14)
        found = gradient(objective, single)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), gradient(objective, double), rtol=1e-4, atol=1e-6)


def test_no_tokens_at_all_are_a_loss_of_zero() -> None:
    empty = {name: torch.zeros(0) for name in ("old_logprobs_T", "advantages_T", "ref_logprobs_T")}
    empty |= {"logprobs_T": torch.zeros(0, requires_grad=True), "completion_T": torch.zeros(0, dtype=torch.long)}
    for objective in ALL.values():
        assert policy_loss(objective, **empty).item() == 0


def test_a_missing_reference_is_named() -> None:
    batch = random_batch(0)
    del batch["ref_logprobs_T"]
    with pytest.raises(ObjectiveError, match=r"beta is 0.04 with kl 'k3', but ref_logprobs_T is missing"):
        policy_loss("grpo", **batch)


@pytest.mark.parametrize("name", ["old_logprobs_T", "advantages_T", "ref_logprobs_T", "sampled_logprobs_T"])
def test_shapes_that_differ_are_named(name: str) -> None:
    batch = random_batch(0)
    batch[name] = batch[name][:1]
    with pytest.raises(ValueError, match=rf"{name} has shape \[1\]"):
        policy_loss("grpo", **batch)


@pytest.mark.parametrize("name", ["weights_T", "trained_T"])
def test_optional_tensors_of_the_wrong_shape_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"flat, with one entry per output token"):
        policy_loss("grpo", **random_batch(0), **{name: torch.ones(1, dtype=torch.bool)})


def test_padded_matrices_are_refused() -> None:
    square = {key: torch.zeros(2, 3) for key in ("logprobs_T", "old_logprobs_T", "advantages_T")}
    with pytest.raises(ObjectiveError, match="flat"):
        policy_loss("dapo", **square, completion_T=torch.zeros(2, 3, dtype=torch.long))
