"""AdamW over float32 masters: against torch's own, in bfloat16, and where it must refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from groupwise.errors import ModelError
from groupwise.learn.optimizer import REFUSED_UPDATES, MasterOptimizer, OptimizerSettings, learning_rate

BFLOAT16 = torch.bfloat16
FLOAT32 = torch.float32


class Net(nn.Module):
    """A matrix, a vector, a buffer that must stay wide, and a matrix that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.vector = nn.Parameter(torch.randn(3, generator=generator))
        self.frozen = nn.Parameter(torch.full((3, 3), 0.1), requires_grad=False)
        self.register_buffer("frequency", torch.tensor([1 / 3]))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.matrix.dtype) @ self.matrix + self.vector) @ self.frozen


def inputs(seed: int, rows: int = 5) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def make(dtype: torch.dtype = FLOAT32, **settings: object) -> tuple[Net, MasterOptimizer]:
    net = Net()
    given = {"learning_rate": 0.1, "total_updates": 10, **settings}
    return net, MasterOptimizer(net, OptimizerSettings(**given), dtype)  # type: ignore[arg-type]


def push(optimizer: MasterOptimizer, gradient: float) -> None:
    """Give every master the same gradient everywhere."""
    for master in optimizer.master_weights.values():
        assert master.grad is not None
        master.grad.fill_(gradient)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2, 0.0]),
    ],
)
def test_the_rate_rises_and_falls(kind: str, expected: list[float]) -> None:
    settings = OptimizerSettings(2e-6, total_updates=6, lr_scheduler_type=kind, warmup_steps=2)
    assert [learning_rate(settings, update) / 2e-6 for update in range(7)] == pytest.approx(expected)
    assert learning_rate(settings, 100) == pytest.approx(expected[-1] * 2e-6), "more updates than were planned"


def test_a_warm_up_as_long_as_the_run_only_rises() -> None:
    settings = OptimizerSettings(1.0, total_updates=3, lr_scheduler_type="linear", warmup_steps=3)
    assert [learning_rate(settings, update) for update in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_updates_are_those_of_adamw_and_the_norm_is_the_one_before_clipping() -> None:
    net, ours = make(weight_decay=0.1, adam_beta2=0.9, max_grad_norm=0.5, lr_scheduler_type="linear")
    other = Net()
    adam = torch.optim.AdamW(
        [{"params": [other.matrix], "weight_decay": 0.1}, {"params": [other.vector], "weight_decay": 0.0}],
        lr=0.1, betas=(0.9, 0.9),
    )  # fmt: skip
    for update in range(4):
        for group in adam.param_groups:
            group["lr"] = 0.1 * (1 - update / 10)
        adam.zero_grad()
        for model in (net, other):
            model(inputs(update)).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_([other.matrix, other.vector], 0.5)
        adam.step()
        assert ours.step() == pytest.approx((norm.item(), 0.1 * (1 - update / 10)))
        assert torch.allclose(net.matrix, other.matrix, rtol=1e-5)
        assert torch.allclose(net.vector, other.vector, rtol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_gradient_is_clipped_to_the_norm(dtype: torch.dtype) -> None:
    _, clipped = make(dtype, max_grad_norm=0.5)
    push(clipped, 3.0)
    norm, _ = clipped.step()
    assert norm == pytest.approx(3 * math.sqrt(15))
    mean = clipped.adam.state[clipped.master_weights["vector"]]["exp_avg"]
    assert torch.allclose(mean, torch.full((3,), 0.1 * 3 * 0.5 / norm), rtol=1e-4)
    _, free = make(dtype, max_grad_norm=math.inf)
    push(free, 3.0)
    free.step()
    assert torch.allclose(free.adam.state[free.master_weights["vector"]]["exp_avg"], torch.tensor(0.3))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_only_matrices_decay(dtype: torch.dtype) -> None:
    _, optimizer = make(dtype, weight_decay=0.5)
    before = {name: master.detach().clone() for name, master in optimizer.master_weights.items()}
    optimizer.step()
    assert torch.allclose(optimizer.master_weights["matrix"], before["matrix"] * (1 - 0.1 * 0.5))
    assert torch.equal(optimizer.master_weights["vector"], before["vector"])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(wrong: float, dtype: torch.dtype) -> None:
    (net, optimizer), (twin_net, twin) = make(dtype), make(dtype)
    for one in (optimizer, twin):
        push(one, 1.0)
        one.step()
    optimizer.master_weights["vector"].grad[1] = wrong  # type: ignore[index]
    norm, _ = optimizer.step()
    assert not math.isfinite(norm)
    assert optimizer.update == 2, "it counts for the schedule"
    assert (optimizer.applied, optimizer.refused_in_a_row) == (1, 1)
    for name in optimizer.master_weights:
        assert torch.equal(optimizer.master_weights[name], twin.master_weights[name])
    for one in (optimizer, twin):
        push(one, 2.0)
        one.step()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, dict(twin_net.named_parameters())[name]), "nothing of it is left"


def test_a_run_of_refused_updates_is_an_error_and_an_applied_one_begins_anew() -> None:
    _, optimizer = make()
    for gradient in [math.nan] * (REFUSED_UPDATES - 1) + [1.0] + [math.inf] * (REFUSED_UPDATES - 1):
        push(optimizer, gradient)
        optimizer.step()
        optimizer.check()
    _, taken_up = make()
    taken_up.load(optimizer.master_weights, *optimizer.state())
    for one in (optimizer, taken_up):
        push(one, math.nan)
        one.step()
        with pytest.raises(ModelError, match=r"last 5 updates were all refused.*those after 1 updates"):
            one.check()


def test_a_short_run_of_which_every_update_was_refused_is_an_error_too() -> None:
    _, optimizer = make()
    for _ in range(2):
        optimizer.check(planned=2)
        push(optimizer, math.nan)
        optimizer.step()
    with pytest.raises(ModelError, match="last 2 updates"):
        optimizer.check(planned=2)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_an_update_without_any_gradient_moves_the_running_means(dtype: torch.dtype) -> None:
    _, optimizer = make(dtype)
    push(optimizer, 1.0)
    optimizer.step()
    before = optimizer.master_weights["vector"].detach().clone()
    optimizer.step()
    state = optimizer.adam.state[optimizer.master_weights["vector"]]
    assert state["step"] == 2
    assert torch.allclose(state["exp_avg"], state["exp_avg"].new_full((3,), 0.9 * 0.1 / math.sqrt(15)))
    assert not torch.equal(optimizer.master_weights["vector"], before)


def test_gradients_of_many_passes_add_up_without_rounding() -> None:
    net, optimizer = make(BFLOAT16)
    for _ in range(1000):
        (net.vector * 1.0078125).sum().backward()  # exact in bfloat16, whose sums stop at 256
    assert net.vector.grad is None, "the narrow gradient is not kept"
    gradient = optimizer.master_weights["vector"].grad
    assert gradient is not None
    assert gradient.dtype == FLOAT32
    assert gradient.tolist() == [1007.8125] * 3


def test_small_updates_add_up_where_narrow_weights_would_stay() -> None:
    net = Net()
    nn.init.constant_(net.vector, 0.01)
    optimizer = MasterOptimizer(net, OptimizerSettings(1e-6, total_updates=10), BFLOAT16)
    narrow = net.vector.detach().clone()
    assert torch.equal(narrow - 1e-6, narrow), "one update is lost on a narrow weight"
    for _ in range(100):
        push(optimizer, 1.0)
        optimizer.step()
    assert torch.allclose(optimizer.master_weights["vector"], torch.tensor(0.01 - 1e-4), rtol=1e-5)
    assert torch.equal(net.vector, optimizer.master_weights["vector"].to(BFLOAT16))
    assert (narrow - net.vector).min() > 0


def test_all_parameters_are_cast_and_no_buffer() -> None:
    net, optimizer = make(BFLOAT16)
    assert {parameter.dtype for parameter in net.parameters()} == {BFLOAT16}
    assert net.frequency.dtype == FLOAT32
    assert {master.dtype for master in optimizer.master_weights.values()} == {FLOAT32}
    assert optimizer.master_weights.keys() == {"matrix", "vector"}, "what is not trained has no master"
    assert torch.equal(optimizer.master_weights["matrix"], Net().matrix), "masters are not rounded"
    net(inputs(0)).sum().backward()


def test_in_float32_the_masters_are_the_parameters() -> None:
    net, optimizer = make(FLOAT32)
    assert optimizer.master_weights["matrix"] is net.matrix


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_state_goes_over_to_another_optimizer(dtype: torch.dtype) -> None:
    net, old = make(dtype, lr_scheduler_type="linear")
    other, new = make(dtype, lr_scheduler_type="linear")

    def learn(model: Net, optimizer: MasterOptimizer, seed: int) -> None:
        model(inputs(seed)).square().mean().backward()
        optimizer.step()

    learn(net, old, 0)
    push(old, math.nan)
    old.step()
    learn(other, new, 9)
    tensors, counters = old.state()
    assert counters == {"update": 2, "adam_steps": 1, "refused_in_a_row": 1}
    new.load(
        {name: master.detach().clone() for name, master in old.master_weights.items()},
        {name: tensor.clone() for name, tensor in tensors.items()}, counters,
    )  # fmt: skip
    for seed in (1, 2):
        learn(net, old, seed)
        learn(other, new, seed)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name])


def test_state_of_before_the_first_update_forgets_what_was_there() -> None:
    _, fresh = make()
    _, used = make()
    push(used, 1.0)
    used.step()
    used.load(fresh.master_weights, *fresh.state())
    assert used.update == 0
    assert used.state() == fresh.state() == ({}, {"update": 0, "adam_steps": 0, "refused_in_a_row": 0})
    for state in used.adam.state.values():
        assert all(not value.any() for value in state.values())


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_running_means_are_made_at_once_and_stay_where_they_are(dtype: torch.dtype) -> None:
    _, optimizer = make(dtype)
    places = {
        f"{name}.{key}": optimizer.adam.state[master][key].data_ptr()
        for name, master in optimizer.master_weights.items() for key in ("exp_avg", "exp_avg_sq")
    }  # fmt: skip
    push(optimizer, 1.0)
    optimizer.step()
    tensors, counters = optimizer.state()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    assert counters["adam_steps"] == 1
    assert all(tensor.any() for tensor in kept.values())
    push(optimizer, 2.0)
    optimizer.step()
    optimizer.load(dict(optimizer.master_weights), kept, counters)
    now = optimizer.state()[0]
    assert {name: tensor.data_ptr() for name, tensor in now.items()} == places
    assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())


def test_a_state_that_lacks_a_running_mean_is_refused() -> None:
    _, optimizer = make()
    push(optimizer, 1.0)
    optimizer.step()
    tensors, counters = optimizer.state()
    lacking = {name: tensor for name, tensor in tensors.items() if name != "matrix.exp_avg_sq"}
    with pytest.raises(KeyError, match="exp_avg_sq"):
        optimizer.load(dict(optimizer.master_weights), lacking, counters)


def test_means_that_were_made_at_once_are_those_that_adam_makes() -> None:
    net, ours = make()
    other, plain = make()
    plain.adam.state.clear()
    for seed in range(3):
        for model, optimizer in ((net, ours), (other, plain)):
            model(inputs(seed)).square().mean().backward()
            optimizer.step()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name])
    assert ours.state()[1] == plain.state()[1]
    assert all(torch.equal(tensor, plain.state()[0][name]) for name, tensor in ours.state()[0].items())
