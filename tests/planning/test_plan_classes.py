"""Plans of classes whose layers differ from one another or are no attention: a plan, or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers import PreTrainedConfig

from groupwise.errors import ModelError
from groupwise.jobfile import load_job
from groupwise.models.size import parameter_count
from groupwise.planning import plan as plans
from groupwise.planning.hardware import Rates
from groupwise.wiring.python_objects import PythonObjects

RATES = Rates(
    flops_many=1e9, flops_few=1e9, bytes_many=1e9, bytes_few=1e9, bytes_memory=1e9, operation_decoding=0.0,
    operation_forward=0.0, operation_training=0.0,
)  # fmt: skip
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
CONFIGS: dict[str, PreTrainedConfig] = {
    "a width per layer": transformers.Gemma3nTextConfig(
        **SMALL, num_hidden_layers=5, intermediate_size=[96, 96, 128, 128, 128], num_kv_shared_layers=2,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
        activation_sparsity_pattern=[0.95] + [0.0] * 4,
        vocab_size_per_layer_input=256, hidden_size_per_layer_input=16, laurel_rank=4, head_dim=16,
    ),
    "a kind per layer": transformers.GraniteMoeHybridConfig(
        **SMALL, num_hidden_layers=4, layer_types=["mamba", "mamba", "attention", "mamba"], intermediate_size=32,
        num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32, mamba_n_heads=8, mamba_d_head=16,
        mamba_d_state=16, mamba_expand=2,
    ),
    "states": transformers.Mamba2Config(
        hidden_size=64, num_hidden_layers=3, vocab_size=256, num_heads=8, head_dim=16, state_size=16, expand=2,
    ),
    "limits as many as layers": transformers.Mamba2Config(
        hidden_size=64, num_hidden_layers=2, vocab_size=256, num_heads=8, head_dim=16, state_size=16, expand=2,
        time_step_limit=[0.0, 1.0],
    ),
    "a padding token": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, pad_token_id=0),
    "weights drawn again until they fit": transformers.ModernBertDecoderConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    ),
    "heads of two sizes": transformers.Gemma4TextConfig(
        **SMALL, num_hidden_layers=6, intermediate_size=128, vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=16, head_dim=16, global_head_dim=32,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does 1e9 of everything a second."""
    monkeypatch.setattr(plans, "measure", lambda *_, **__: RATES)


def planned(config: PreTrainedConfig, folder: Path) -> plans.Plan:
    config.save_pretrained(folder)
    options = {"model": str(folder), "data": "prompts.jsonl", "reward": "rewards.py:score", "steps": 1}
    return plans.plan_of(load_job(None, (), options | {"max_completion_length": 16}).job, PythonObjects())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_class_with_unlike_layers_is_planned_with_all_its_weights(kind: str, tmp_path: Path) -> None:
    plan = planned(CONFIGS[kind], tmp_path / "model")
    count = parameter_count(CONFIGS[kind])
    assert f"{count / 1e6:,.1f}M parameters" in plan.model
    assert next(iter(plan.memory.values())) == 4 * count
    assert plan.seconds


def test_a_class_that_is_refused_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exchanges its BigBirdBlockSparseAttention"):
        planned(transformers.BigBirdConfig(is_decoder=True), tmp_path / "model")
