"""A decoding step past the modules: equal to them where it is taken, and not taken where it would not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, LlamaConfig, Qwen2Config
from transformers.models.llama import modeling_llama

from groupwise.models.direct import FAMILY, DirectBody
from groupwise.models.probe import probe
from groupwise.models.tiles import Options
from tests.tiny_models import clone_of, policy_of

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, scaled rotation": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    "llama, gelu": {"hidden_act": "gelu"},
    "mistral": {},
    "mistral, no window": {"sliding_window": None},
    "qwen2": {},
    "qwen2, windows": {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1},
    "qwen3": {},
    "qwen3, windows": {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1},
}
ROWS, MEMORY = 7, 9


class Recalling:
    """Attention of each row over keys and values that are made up, and its own: it depends on all that it is given."""

    def __init__(self) -> None:
        self.windows: list[int | None] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        self.windows.append(options.window)
        generator = torch.Generator().manual_seed(layer)
        past = torch.randn(MEMORY, *key.shape[1:], generator=generator).to(key.dtype)
        keys, values = (
            torch.cat([past.transpose(0, 1).expand(len(x), -1, -1, -1), x[:, :, None]], 2) for x in (key, value)
        )
        keys = keys[:, :, -(options.window or MEMORY + 1) :]
        values = values[:, :, -(options.window or MEMORY + 1) :]
        return nn.functional.scaled_dot_product_attention(
            query[:, :, None], keys, values, scale=options.scale, enable_gqa=True
        )[:, :, 0]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_equals_the_modules(name: str, dtype: torch.dtype, tolerance: float) -> None:
    policy = policy_of(clone_of(name.partition(",")[0], **CONFIGS[name]), "shared", direct=True).to(dtype)
    assert policy.direct is not None
    token_R = torch.arange(3, 3 + ROWS)
    position_R = torch.tensor([0, 40, 5, 6, 90, 1, 17])
    ours, theirs = Recalling(), Recalling()
    with torch.no_grad():
        found = policy.direct(token_R, position_R, ours)
        expected = policy._through_modules(token_R[:, None], position_R[:, None], theirs)[:, 0]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)
    assert ours.windows == theirs.windows
    if "windows" in name:
        assert len(set(ours.windows)) == 2, "the layers are to differ"


@pytest.mark.parametrize("kind", sorted(FAMILY))
def test_the_probe_takes_it_for_the_family(kind: str) -> None:
    assert probe(CONFIG_MAPPING[kind]()).direct
    assert probe(Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1)).direct


@pytest.mark.parametrize("kind", ["gemma", "phi3", "granite", "olmo2", "smollm3", "mixtral", "gpt2"])
def test_the_probe_takes_it_for_nobody_else(kind: str) -> None:
    findings = probe(CONFIG_MAPPING[kind]())
    assert findings.shared
    assert not findings.direct


@pytest.mark.parametrize("name", ["LlamaMLP", "LlamaRMSNorm", "LlamaDecoderLayer"])
def test_the_probe_sees_that_modules_compute_something_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = getattr(modeling_llama, name)
    stock = module.forward
    monkeypatch.setattr(module, "forward", lambda self, *args, **kwargs: stock(self, *args, **kwargs) * 1.01)
    findings = probe(LlamaConfig())
    assert findings.shared, "the layout does not mind"
    assert not findings.direct


def test_an_adapter_around_a_product_is_not_left_out() -> None:
    class Adapter(nn.Linear):
        """Stands for what fine-tuning libraries put in a layer's place."""

    model = clone_of("llama")
    assert DirectBody.fits(model)
    layer = model.model.layers[1].mlp
    layer.up_proj = Adapter(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    assert not DirectBody.fits(model)
    assert policy_of(model, "shared", direct=True).direct is None


def test_weights_are_read_when_a_step_is_made() -> None:
    policy = policy_of(clone_of("llama"), "shared", direct=True)
    assert policy.direct is not None
    rows = torch.tensor([1, 2]), torch.tensor([0, 1])
    with torch.no_grad():
        before = policy.direct(*rows, Recalling())
        policy.model.model.layers[0].self_attn.q_proj.weight.mul_(2)
        after = policy.direct(*rows, Recalling())
        expected = policy._through_modules(rows[0][:, None], rows[1][:, None], Recalling())[:, 0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
