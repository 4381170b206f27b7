"""What a pass takes, told before there are weights: held against hand counts and against real tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from groupwise.cpu import kernels, packed
from groupwise.errors import ModelError
from groupwise.models.attention import ATTENTION_NAME
from groupwise.models.head import HeadShape
from groupwise.models.layout import Stream
from groupwise.models.load import checkpoint_gradients
from groupwise.models.policy import Policy
from groupwise.planning.meter import Cost, Meter
from groupwise.planning.sampling import sampling_costs
from groupwise.planning.trace import Shape, TracedModel

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SHAPE = Shape(groups=2, outputs=4, prompt=24, length=16)


def test_a_meter_counts_by_hand() -> None:
    """`[2, 3] @ [3, 5]`: 60 FLOPs and 40 bytes; its exponential 40 more, which are gone; both read and written once."""
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    with Meter() as meter:
        product = a @ b
        product.exp()
        product += 1
        meter.mark()
    assert meter.cost == Cost(kept=40, peak=80, flops=60, attention_flops=0, moved=160, operations=3)


def test_a_view_takes_nothing() -> None:
    a = torch.ones(4, 4)
    with Meter() as meter:
        a[1:].transpose(0, 1)
    assert (meter.cost.peak, meter.cost.moved) == (0, 0)


def a_policy(config: PreTrainedConfig, direct: bool) -> Policy:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    return Policy(model, "shared", HeadShape(), direct=direct)


def a_hollow(config: PreTrainedConfig, direct: bool) -> TracedModel:
    return TracedModel(config, "shared", HeadShape(), torch.float32, direct=direct)


past_the_modules = pytest.mark.parametrize("direct", [False, True], ids=["modules", "direct"])


def a_stream(policy: Policy) -> Stream:
    return policy.stream([((1,) * SHAPE.prompt, [(1,) * SHAPE.length] * SHAPE.outputs)] * SHAPE.groups)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
@past_the_modules
def test_what_is_told_is_what_a_real_pass_takes(
    kind: str, checkpointing: bool, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four layers told from the first ones, without data, equal the four that are run, by operations that are seen."""
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    config = CONFIGS[kind](**SIZES | {"num_hidden_layers": 4})
    found = a_hollow(config, direct).training(SHAPE, (4, 4), checkpointing)
    policy = a_policy(config, direct)
    if checkpointing:
        checkpoint_gradients(policy.model, "a model")
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stream = a_stream(policy)
    with Meter() as meter:
        logprobs_T = policy(stream, 1.0, True).logprobs_T
        meter.mark()
        logprobs_T.sum().backward()
    real = meter.cost
    assert (found.flops, found.attention_flops) == (real.flops, real.attention_flops)
    # Indices of tiles are made of arrays and so not seen here. Where layers keep their input alone, they are a tenth of
    # these 0.3 MB; past the modules there are two sets of them.
    close = 0.1 * (1 + direct) if checkpointing else 0.03
    assert found.kept == pytest.approx(real.kept, rel=close)
    assert found.peak == pytest.approx(real.peak, rel=close)
    assert found.operations == pytest.approx(real.operations, rel=0.05)
    assert found.moved == pytest.approx(real.moved, rel=0.05)


@pytest.mark.parametrize("kind", CONFIGS)
@past_the_modules
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_kept_is_what_autograd_saves(
    kind: str, direct: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Counted in another way: every storage that autograd saves, once, without the weights; by kernels and without."""
    if not compiled:
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    found = a_hollow(CONFIGS[kind](**SIZES), direct).training(SHAPE, (4, 4), False)
    policy = a_policy(CONFIGS[kind](**SIZES), direct)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    stream = a_stream(policy)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs_T = policy(stream, 1.0, True).logprobs_T
        assert logprobs_T.requires_grad
    assert found.kept == pytest.approx(sum(saved.values()), rel=0.1)


def test_cast_activations_are_about_half_and_checkpointing_keeps_a_layer_s_input() -> None:
    config = Qwen3Config(**SIZES)
    wide, narrow = (TracedModel(config, "shared", HeadShape(), d) for d in (torch.float32, torch.bfloat16))
    parts = (SHAPE, (4, 4))
    assert 0.45 < narrow.training(*parts, False).kept / wide.training(*parts, False).kept < 0.75
    shallow, deep = (
        TracedModel(Qwen3Config(**SIZES | {"num_hidden_layers": n}), "shared", HeadShape(), torch.float32)
        for n in (3, 13)
    )
    tokens = 2 * (24 + 4 * 15)
    more = deep.training(*parts, True).kept - shallow.training(*parts, True).kept
    assert more == pytest.approx(10 * tokens * 64 * 4, rel=0.1)


def test_less_is_computed_past_the_modules_where_prompts_are_long() -> None:
    """24 of the 84 tokens of a group are a prompt's: 23 of them need no query, output or MLP in the last layer."""
    config = Qwen2Config(**SIZES | {"num_hidden_layers": 2})
    direct, stock = (a_hollow(config, choice).training(SHAPE, (4, 4), False).flops for choice in (True, False))
    spared = 64 * 64 + 64 * 64 + 3 * 64 * 160
    products = 6 * 2 * 23 * spared  # of two groups; forward, and twice backward
    assert products < stock - direct < 1.2 * products, "the rest is attention among the prompt's tokens"


def test_what_sampling_lays_out_anew_is_part_of_a_decoding_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen2Config(**SIZES)
    plain = sampling_costs(a_hollow(config, True), SHAPE, 8, cached=True, parameters=0)
    monkeypatch.setattr(packed, "_SMALLEST", 1)
    laid_out = sampling_costs(a_hollow(config, True), SHAPE, 8, cached=True, parameters=0)
    matrices = 96 * 64 + 3 * (64 * (64 + 64 + 2 * 32) + 3 * 64 * 160)
    together = 3 * (64 * (64 + 2 * 32) + 2 * 64 * 160)
    assert plain.copies == 4 * together
    assert laid_out.copies == (4 * matrices if packed._kernel_agrees(torch.float32) else 0)
    more = laid_out.passes["a decoding step"] - plain.passes["a decoding step"]
    assert more == laid_out.copies - plain.copies


def test_the_plain_layout_goes_through_the_modules_and_lays_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_SMALLEST", 1)
    plain = TracedModel(Qwen2Config(**SIZES), "plain", HeadShape(), torch.float32, direct=True)
    assert (plain.past_modules, plain.copies) == (False, 0)
    assert a_hollow(Qwen2Config(**SIZES), True).past_modules


def test_parts_are_those_that_the_learner_cuts() -> None:
    """A group has 24 + 4 * 16 = 88 tokens: two fit into 200, and into 80 only (80 - 24) // 16 = 3 outputs of one."""
    assert Shape(3, 4, 24, 16).parts(200, shared=True) == [(4, 4), (4,)]
    assert Shape(1, 4, 24, 16).parts(80, shared=True) == [(3,), (1,)]
    assert Shape(1, 4, 24, 16).parts(80, shared=False) == [(2,), (2,)]


def test_more_tokens_take_more_bytes() -> None:
    traced = TracedModel(Qwen3Config(**SIZES), "shared", HeadShape(), torch.float32)
    sizes = [traced.training(Shape(n, 8, 16, 16), (8,) * n, False).peak for n in (1, 2, 4)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.05)


def test_layers_that_are_not_alike_are_run_one_by_one() -> None:
    sizes = SIZES | {"num_hidden_layers": 4, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}
    found = TracedModel(Qwen3Config(**sizes), "shared", HeadShape(), torch.float32).training(SHAPE, (4,), False)
    alike = TracedModel(Qwen3Config(**SIZES | {"num_hidden_layers": 4}), "shared", HeadShape(), torch.float32)
    assert found.kept > alike.training(SHAPE, (4,), False).kept  # by the masks of windows


def test_experts_are_counted() -> None:
    config = CONFIG_MAPPING["qwen3_moe"](**SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    for dtype in (torch.float32, torch.bfloat16):
        assert TracedModel(config, "shared", HeadShape(), dtype).training(SHAPE, (4,), False).kept > 0


def test_a_class_that_branches_on_data_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x if bool((x > 0).any()) else -x

    monkeypatch.setattr(Qwen3MLP, "forward", forward)
    with pytest.raises(ModelError, match="qwen3 holds and computes cannot be told"):
        TracedModel(Qwen3Config(**SIZES), "shared", HeadShape(), torch.float32).training(SHAPE, (4,), False)


def test_a_deep_model_with_a_wide_vocabulary_is_at_its_most_at_the_head() -> None:
    """One and two layers are at their most at the embedding's gradient: what is kept of eight counts at the head."""
    config = Qwen3Config(**SIZES | {"num_hidden_layers": 8, "vocab_size": 4000})
    found = TracedModel(config, "shared", HeadShape(), torch.float32).training(SHAPE, (4, 4), False)
    assert found.peak >= found.kept
