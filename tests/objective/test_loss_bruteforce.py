"""Every preset against a slow reading of its formula: plain Python, one token at a time, gradients by hand."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from groupwise.objective import CHOICES, PRESETS, Objective, policy_loss

RNG_SEEDS = range(4)
ALL = {name: replace(objective, max_completion_length=9) for name, objective in PRESETS.items()}


@dataclass
class Output:
    """Trained tokens of one output, as lists; `where` holds their places in the stream."""

    group: int
    where: list[int]


def random_batch(seed: int, spread: float = 0.4) -> dict[str, Tensor]:
    """Ragged groups, outputs of 1 to 7 tokens, some tokens not trained, one output and one group not trained at all."""
    rng = np.random.default_rng(seed)
    groups = [outputs for outputs in range(4) for _ in range(rng.integers(1, 5))]
    lengths = [int(rng.integers(1, 8)) for _ in groups]
    total = sum(lengths)
    completion = [output for output, length in enumerate(lengths) for _ in range(length)]
    trained = [rng.random() < 0.8 and output != 0 and groups[output] != 2 for output in completion]
    logprobs = -rng.exponential(1.0, total)
    near = {name: logprobs + spread * rng.standard_normal(total) for name in ("old", "ref", "sampled")}
    return {
        "logprobs_T": torch.tensor(logprobs, requires_grad=True),
        "old_logprobs_T": torch.tensor(near["old"]),
        "ref_logprobs_T": torch.tensor(near["ref"]),
        "sampled_logprobs_T": torch.tensor(near["sampled"]),
        "advantages_T": torch.tensor(rng.standard_normal(total) * (rng.random(total) < 0.9)),
        "completion_T": torch.tensor(completion),
        "group_S": torch.tensor(groups) * 5 + 3,
        "trained_T": torch.tensor(trained),
    }


def trained_outputs(batch: dict[str, Tensor]) -> list[Output]:
    found = []
    for output, group in enumerate(batch["group_S"].tolist()):
        places = [t for t, o in enumerate(batch["completion_T"].tolist()) if o == output and batch["trained_T"][t]]
        if places:
            found.append(Output(group, places))
    return found


def slow_ratio(kind: str, log_ratios: list[float], here: float) -> float:
    if kind == "token":
        return math.exp(here)
    mean = len(log_ratios) if kind == "sequence_mean" else 1
    return math.exp(sum(log_ratios) / mean)


def slow_surrogate(o: Objective, rho: float, logprob: float, advantage: float) -> tuple[float, float]:
    """Loss and its derivative by the token's log-prob; d rho / d logprob = rho."""
    if o.surrogate == "cispo":
        weight = min(rho, o.epsilon_high)
        return -weight * advantage * logprob, -weight * advantage
    if o.surrogate == "sapo":
        tau = o.sapo_temperature_pos if advantage > 0 else o.sapo_temperature_neg
        gate = 1 / (1 + math.exp(-tau * (rho - 1)))
        return -4 / tau * gate * advantage, -4 * gate * (1 - gate) * rho * advantage
    clipped = max(1 - o.epsilon, min(1 + o.epsilon_high, rho))
    free = -rho * advantage >= -clipped * advantage
    loss = -rho * advantage if free else -clipped * advantage
    if o.dual_clip is not None and advantage < 0 and loss > o.dual_clip * -advantage:
        return o.dual_clip * -advantage, 0.0
    return loss, (loss if free else 0.0)


def slow_kl(kind: str, logprob: float, ref: float, old: float) -> tuple[float, float]:
    d = ref - logprob
    k3, dk3 = math.exp(d) - d - 1, 1 - math.exp(d)
    if kind == "k2":
        return d * d / 2, -d
    if kind == "k3":
        return k3, dk3
    rho = math.exp(logprob - old)
    return rho * k3, rho * (k3 + dk3)


def slow_correction(o: Objective, log_weights: list[float], here: float) -> float:
    weight = math.exp(here if o.importance_sampling.startswith("token") else sum(log_weights))
    low, high = o.importance_sampling_floor, o.importance_sampling_cap
    if o.importance_sampling.endswith("truncate"):
        return max(low, min(high, weight))
    return weight if low <= weight <= high else 0.0


def slow_weight(o: Objective, output: Output, outputs: list[Output]) -> float:
    if o.weights == "token_mean":
        return 1 / sum(len(other.where) for other in outputs)
    siblings = sum(other.group == output.group for other in outputs)
    per_output = 1 / (len({other.group for other in outputs}) * siblings)
    divisor = {"sequence_mean": len(output.where), "sequence_sum": 1, "constant_length": o.max_completion_length}
    return per_output / divisor[o.weights]


def slow_loss(o: Objective, batch: dict[str, Tensor], corrected: bool) -> tuple[float, list[float]]:
    logprob, old, ref, sampled, advantage = (
        batch[name].tolist()
        for name in ("logprobs_T", "old_logprobs_T", "ref_logprobs_T", "sampled_logprobs_T", "advantages_T")
    )
    outputs = trained_outputs(batch)
    total, gradient = 0.0, [0.0] * len(logprob)
    for output in outputs:
        log_ratios = [logprob[t] - old[t] for t in output.where]
        log_weights = [old[t] - sampled[t] for t in output.where]
        weight = slow_weight(o, output, outputs)
        for t in output.where:
            loss, slope = slow_surrogate(
                o, slow_ratio(o.ratio, log_ratios, logprob[t] - old[t]), logprob[t], advantage[t]
            )
            trust = slow_correction(o, log_weights, old[t] - sampled[t]) if corrected else 1.0
            kl, kl_slope = slow_kl(o.kl, logprob[t], ref[t], old[t]) if o.kl_in_loss else (0.0, 0.0)
            total += weight * (trust * loss + o.beta * kl)
            gradient[t] = weight * (trust * slope + o.beta * kl_slope)
    return total, gradient


def check(objective: Objective, seed: int, corrected: bool = False) -> None:
    batch = random_batch(seed)
    expected, expected_gradient = slow_loss(objective, batch, corrected)
    given = batch if corrected else {name: value for name, value in batch.items() if name != "sampled_logprobs_T"}
    loss = policy_loss(objective, **given)
    (gradient,) = torch.autograd.grad(loss, batch["logprobs_T"])
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert gradient.tolist() == pytest.approx(expected_gradient, abs=1e-12)
    assert any(expected_gradient), "an example without a gradient shows nothing"


@pytest.mark.parametrize("seed", RNG_SEEDS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, seed: int) -> None:
    check(ALL[name], seed)


@pytest.mark.parametrize("kl", ["k2", "k3", "k3_unbiased"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_with_each_kl(name: str, kl: str) -> None:
    check(replace(ALL[name], beta=0.3, kl=kl), seed=7)


@pytest.mark.parametrize("kind", [kind for kind in CHOICES["importance_sampling"] if kind != "none"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_with_each_correction(name: str, kind: str) -> None:
    bounds = {"importance_sampling_cap": 1.3, "importance_sampling_floor": 0.5}
    check(replace(ALL[name], importance_sampling=kind, **bounds), seed=8, corrected=True)


@pytest.mark.parametrize("weights", CHOICES["weights"])
@pytest.mark.parametrize("surrogate", CHOICES["surrogate"])
@pytest.mark.parametrize("ratio", CHOICES["ratio"])
def test_every_combination(ratio: str, surrogate: str, weights: str) -> None:
    high = 1.1 if surrogate == "cispo" else 0.1
    check(
        Objective(ratio=ratio, surrogate=surrogate, weights=weights, epsilon_high=high, max_completion_length=9), seed=9
    )


@pytest.mark.parametrize("seed", RNG_SEEDS)
def test_dual_clip(seed: int) -> None:
    check(Objective(dual_clip=1.4, epsilon=0.1), seed)
