"""Loading a policy from a folder: what comes out of a good one, and what is said about a bad one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config, dynamic_module_utils
from transformers.utils import logging as hf_logging

from groupwise.errors import ModelError
from groupwise.models.clone import tiny_clone
from groupwise.models.load import choose_device, choose_dtype, context_length, load_config, load_policy
from tests.tiny_models import GROUPS, clone_of, stock_logprobs

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    hf_logging.disable_progress_bar()
    folders = {}
    for kind in ("qwen3", "gptj", "mamba", "minimax", "llama4_text"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        clone_of(kind).save_pretrained(folders[kind])
    hf_logging.enable_progress_bar()
    return folders


@pytest.fixture
def folder(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A whole Qwen3 that a test may spoil."""
    for file in sources["qwen3"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# --- good folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["auto", "plain"])
def test_a_loaded_policy_computes_what_the_stock_model_does(folder: Path, layout: Any) -> None:
    loaded = load_policy(str(folder), device="cpu", layout=layout)
    expected, _ = stock_logprobs(clone_of("qwen3"), GROUPS)
    found = loaded.policy(loaded.policy.stream(GROUPS)).logprobs_T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert loaded.policy.training
    assert loaded.policy.layout == {"auto": "shared", "plain": "plain"}[layout]
    assert loaded.context == 128


def test_the_line_says_the_layout_and_why(sources: dict[str, Path]) -> None:
    lines = {
        ("qwen3", "auto"): r"Qwen3ForCausalLM, 0.1M parameters, float32 on cpu: prompts computed once per group "
        r"\(shared equals plain within \de-0\d\)",
        ("qwen3", "plain"): r".*: each output with its own prompt, as asked",
        ("gptj", "auto"): r".*: each output with its own prompt, because 0 of 2 layers call the attention function",
        ("mamba", "auto"): r".*, because it has layers of type linear_attention",
        ("minimax", "auto"): r".*, because it has layers of type .*; slow sampling, because its cache cannot be used",
        ("llama4_text", "auto"): r".*; prompts of one length sampled together, because padding would change .*",
    }
    for (kind, layout), line in lines.items():
        loaded = load_policy(str(sources[kind]), device="cpu", layout=layout)  # type: ignore[arg-type]
        assert re.fullmatch(line, loaded.line), loaded.line
        assert loaded.policy.cached == (kind != "minimax")
        assert loaded.policy.aligned == (kind == "llama4_text")


def test_weights_are_held_in_float32_and_the_source_is_remembered(folder: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder, dtype="bfloat16")
    loaded = load_policy(str(folder), device="cpu", dtype="bfloat16")
    assert (loaded.source_dtype, loaded.compute_dtype) == (torch.bfloat16, torch.bfloat16)
    assert {p.dtype for p in loaded.policy.parameters()} == {torch.float32}
    assert torch.equal(loaded.policy.model.lm_head.weight, weights["lm_head.weight"].float())


def test_weights_stored_wider_than_their_config_says_lose_nothing(folder: Path) -> None:
    edit(folder, dtype="float16")
    loaded = load_policy(str(folder), device="cpu")
    assert torch.equal(loaded.policy.model.lm_head.weight, clone_of("qwen3").lm_head.weight)
    assert loaded.source_dtype == torch.float16


def test_a_config_that_names_no_type_is_float32(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert load_policy(str(folder), device="cpu").source_dtype == torch.float32


def test_the_older_name_of_the_type_is_read_too(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype").replace("float32", "bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    assert load_policy(str(folder), device="cpu").source_dtype == torch.bfloat16


def test_gradient_checkpointing_is_turned_on_where_it_is_asked_for(folder: Path) -> None:
    def layers(**options: bool) -> set[bool]:
        model = load_policy(str(folder), device="cpu", **options).policy.model  # type: ignore[arg-type]
        return {layer.gradient_checkpointing for layer in model.model.layers}

    assert layers() == {False}
    assert layers(gradient_checkpointing=True) == {True}


def test_weights_that_nobody_uses_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors") | {"v_head.weight": torch.zeros(3)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    line = load_policy(str(folder), device="cpu").line
    assert line.endswith("; 1 weights of the folder are not used (v_head.weight)")


def test_loading_is_silent_and_leaves_the_librarys_logging_alone(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    load_policy(str(folder), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == (level, bars)


def longrope(original: int) -> Phi3Config:
    """Phi-3 as its long-context checkpoints come: a factor for each of 48 pairs of channels."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48, "rope_theta": 1e4}
    return Phi3Config(rope_parameters=rope, original_max_position_embeddings=original, pad_token_id=0)


def test_the_context_is_what_rows_of_any_length_share() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(longrope(64)) == 64
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
    assert context_length(LlamaConfig(max_position_embeddings=256, rope_parameters=yarn)) == 256
    assert context_length(AutoConfig.for_model("bloom")) is None


@pytest.mark.parametrize(
    "kind, expected",
    [("gpt2", 1024), ("mpt", 2048), ("dbrx", 2048), ("whisper", 448), ("rwkv", 1024), ("xlnet", None)],
)
def test_the_context_is_read_by_the_name_that_a_class_has_for_it(kind: str, expected: int | None) -> None:
    assert context_length(AutoConfig.for_model(kind)) == expected


def test_a_length_that_only_a_models_own_code_knows_is_read() -> None:
    assert context_length(AutoConfig.for_model("bloom", seq_length=2048)) == 2048


def test_where_positions_begin_after_the_pad_token_the_longest_row_fits() -> None:
    """One more token than this, and the class looks for a position that it does not have."""
    config = AutoConfig.for_model(
        "roberta", is_decoder=True, vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=14, pad_token_id=1,
    )  # fmt: skip
    longest = context_length(config)
    assert longest == 12
    model = AutoModelForCausalLM.from_config(config)
    assert model(torch.full((1, longest), 3)).logits.shape[1] == longest
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 3))


def test_a_long_row_would_change_a_short_one_beyond_that_context() -> None:
    # What the limit is for: should this fail one day, the limit can go.
    model = tiny_clone(longrope(8))
    rows = torch.arange(2, 26).reshape(2, 12) % 32
    mask = torch.ones_like(rows)
    mask[0, 6:] = 0
    together = model(input_ids=rows, attention_mask=mask).logits[0, :6]
    alone = model(input_ids=rows[:1, :6]).logits[0]
    assert (together - alone).abs().max() > 1e-3


# --- bad folders ------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


BAD: dict[str, tuple[Change, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "cannot be loaded: .* config.json"),
    "config cut": (lambda f: (f / "config.json").write_text('{"model_type": '), "not a valid JSON"),
    "config empty": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "unknown type": (lambda f: edit(f, model_type="zork"), "model type `zork`"),
    "wrong value": (lambda f: edit(f, num_attention_heads="four"), "num_attention_heads"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights cut": (cut, "incomplete metadata"),
    "weights are noise": (lambda f: (f / "model.safetensors").write_bytes(b"noise" * 100), "header"),
    "a weight is missing": (drop_weight, r"lacks 1 of the model's weights \(model.layers.1.mlp.up_proj.weight"),
    "other widths": (lambda f: edit(f, intermediate_size=40), r"down_proj.weight is stored as \[64, 96\]"),
    "more layers": (lambda f: edit(f, num_hidden_layers=3, layer_types=["full_attention"] * 3), "lacks 11 of"),
    "quantized": (lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_folder_that_cannot_be_used_is_one_clear_paragraph(folder: Path, fault: str) -> None:
    spoil, message = BAD[fault]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_policy(str(folder), device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "./nothing", "a/b/c"):
        with pytest.raises(ModelError, match="is no folder"):
            load_config(str(path))
    file = tmp_path / "model.gguf"
    file.write_text("")
    with pytest.raises(ModelError, match="is no folder"):
        load_config(str(file))


def test_code_of_the_folders_own_is_refused_and_the_flag_is_named(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')")
    edit(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    with pytest.raises(ModelError, match=r"brings code of its own.*--trust-remote-code"):
        load_policy(str(folder), device="cpu")
    assert not ran.exists()


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "mine"

class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_code_of_the_folders_own_runs_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "own_code"
    clone_of("llama").save_pretrained(folder)
    (folder / "mine.py").write_text(OWN_CODE)
    edit(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    loaded = load_policy(str(folder), device="cpu", trust_remote_code=True)
    assert loaded.line.startswith("Model, 0.1M parameters, float32 on cpu: prompts computed once per group")


def test_the_shared_layout_is_an_error_where_it_would_be_wrong(sources: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"layout is 'shared', but .* cannot take it: 0 of 2 layers"):
        load_policy(str(sources["gptj"]), device="cpu", layout="shared")


@pytest.mark.parametrize("kind, message", [("bert", "no causal language model"), ("phimoe", "router_jitter_noise")])
def test_a_class_that_no_policy_can_be_made_of_is_an_error(tmp_path: Path, kind: str, message: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_policy(str(tmp_path), device="cpu", layout="plain")


def test_checkpointing_that_a_model_does_not_have_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3PreTrainedModel

    monkeypatch.setattr(Qwen3PreTrainedModel, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"gradient_checkpointing is on, but .*Qwen3ForCausalLM"):
        load_policy(str(folder), device="cpu", gradient_checkpointing=True)


def test_devices_and_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ModelError, match="has no CUDA"):
        choose_device("cuda:1")
    with pytest.raises(ModelError, match="names no device"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_a_config_alone_can_be_read(folder: Path) -> None:
    assert isinstance(load_config(str(folder)), Qwen3Config)
