"""Folders of models: whole or not there, read back as the model, and in a type that keeps what was learned."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import groupwise
from groupwise.demo.model import character_tokenizer, small_model
from groupwise.errors import ConfigError, ModelError, RunFolderError
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.reward_models.export import save_reward_model
from groupwise.reward_models.learner import RewardLearner, RewardLearnerSettings
from groupwise.store import written
from groupwise.store.export import exported_dtype
from groupwise.store.written import Rounding, read_back, write_folder
from groupwise.tokenizer.codec import Codec
from tests.run.tiny import ALPHABET, save_model
from tests.tiny_judges import pupil
from tests.tiny_models import clone_of, randomized
from tests.wide.shrink import small_config

TOKENIZER = character_tokenizer(ALPHABET)
CODEC = Codec(TOKENIZER)


def a_model() -> PreTrainedModel:
    return randomized(small_model(len(TOKENIZER), hidden=32, layers=2, max_length=64))


def a_learner(folder: Path) -> RewardLearner:
    return RewardLearner(pupil(folder, "outcome"), RewardLearnerSettings(OptimizerSettings(1e-3, 10)))


def write(model: PreTrainedModel, target: Path, **options: Any) -> None:
    write_folder(model, CODEC, target, **{"source": "nowhere", "dtype": torch.float32, "card": "card"} | options)


def config_in(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- whole or not there -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """No process lives after it."""


class Killing:
    """Ends what runs at the n-th change of a file, with the change half made; nothing is changed after that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
        self.left = moment
        for place, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (Path, "write_text"), (Path, "mkdir")):
            monkeypatch.setattr(place, name, self.counted(getattr(place, name), lambda *_: None))
        monkeypatch.setattr(
            PreTrainedModel, "save_pretrained", self.counted(PreTrainedModel.save_pretrained, self.half)
        )

    @staticmethod
    def half(model: PreTrainedModel, folder: Path) -> None:
        model.config.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"half")

    def counted(self, function: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                half(*arguments)
            if self.left <= 0:
                raise Killed
            return function(*arguments, **options)

        return counted


def killed_at(moment: int, act: Callable[[], None]) -> bool:
    """Whether `act` came so far as to be killed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        Killing(monkeypatch, moment)
        try:
            act()
        except Killed:
            return True
    return False


def test_killed_at_any_moment_an_export_leaves_no_folder_that_looks_like_a_model(tmp_path: Path) -> None:
    model, target = a_model(), tmp_path / "out"
    write(model, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    for moment in range(1, 100):
        if not killed_at(moment, lambda: write(model, target)):
            break
        seen = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
        assert seen in ([], [target]), f"moment {moment}"
        assert not seen or files(target) == whole, f"moment {moment}"
        shutil.rmtree(target, ignore_errors=True)
    assert moment > 10, "it was killed at none"
    write(model, tmp_path / "again")
    assert files(tmp_path / "again") == whole
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_killed_at_any_moment_a_reward_model_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    learner = a_learner(save_model(tmp_path / "source"))
    target = tmp_path / "model"
    save_reward_model(learner, target, "old")
    old = files(target)
    moments = 0
    for moment in range(1, 100):
        if not killed_at(moment, lambda: save_reward_model(learner, target, "new")):
            break
        moments += 1
        found = target if target.exists() else tmp_path / "model.replaced"  # between two renames
        assert files(found) in (old, old | {"README.md": b"new"}), f"moment {moment}"
        save_reward_model(learner, target, "old")
        assert files(target) == old
        assert not (tmp_path / "model.replaced").exists()
    assert moments > 10
    assert files(target)["README.md"] == b"new"


def test_a_folder_that_is_not_empty_is_refused_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(RunFolderError, match="is not empty"):
        write(a_model(), tmp_path / "full")
    (tmp_path / "empty").mkdir()
    write(a_model(), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
    with pytest.raises(RunFolderError, match="not a directory"):
        write(a_model(), tmp_path / "full" / "file")


def test_where_something_is_mounted_the_config_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mounted cannot be renamed."""
    write(a_model(), tmp_path / "whole")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "volume")
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    write(a_model(), tmp_path / "volume")
    assert files(tmp_path / "volume") == files(tmp_path / "whole")
    assert moved[-1] == "config.json"


@pytest.mark.parametrize("message", ["Error while serializing: I/O error: No space left on device (os error 28)"])
def test_a_full_disk_that_a_library_hides_in_its_sentence_gets_the_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def full(*ignored: object) -> None:
        raise Exception(message)

    for place, name in ((Codec, "save"), (PreTrainedModel, "save_pretrained")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(RunFolderError, match=r"no space left on device.*Make room"):
                write(a_model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- read back --------------------------------------------------------------------------------------------------------


def by_kind(scaling: str) -> dict[str, Any]:
    full = {"rope_type": scaling, "factor": 4.0, "rope_theta": 1e5, "original_max_position_embeddings": 64}
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


def a_gemma4() -> PreTrainedModel:
    config = CONFIG_MAPPING["gemma4_text"](
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=8, vocab_size_per_layer_input=32,
        hidden_size_per_layer_input=8, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return randomized(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    "make, older",
    [
        (lambda: clone_of("llama"), {"rope_theta"}),
        (lambda: clone_of("qwen3", rope_parameters=by_kind("yarn")["full_attention"]), {"rope_theta", "rope_scaling"}),
        (lambda: clone_of("modernbert-decoder", rope_parameters=by_kind("linear")), set()),
        (lambda: clone_of("modernbert-decoder", rope_parameters=by_kind("yarn")), set()),
        (
            lambda: clone_of("gemma3_text", rope_parameters=by_kind("linear")),
            {"rope_theta", "rope_local_base_freq", "rope_scaling"},
        ),
        (a_gemma4, None),
        (lambda: clone_of("gpt2"), set()),
    ],
    ids=["llama", "qwen3 yarn", "modernbert linear", "modernbert yarn", "gemma3 linear", "gemma4", "gpt2"],
)
def test_rotary_keys_for_older_versions_stand_only_where_they_break_nothing(
    tmp_path: Path, make: Callable[[], PreTrainedModel], older: set[str] | None
) -> None:
    model = make()
    write(model, tmp_path / "out")
    found = set(config_in(tmp_path / "out")) & {"rope_theta", "rope_local_base_freq", "rope_scaling"}
    assert older is None or found == older
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (stock(ids).logits - model.eval()(ids).logits).abs().max() < 1e-4


def spoil_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_in(folder) | changes))


@pytest.mark.parametrize("small", [True, False], ids=["itself", "by clones"])
def test_a_folder_that_is_another_model_is_found_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    monkeypatch.setattr(written, "SMALL", 1 << 60 if small else 0)
    write(a_model(), tmp_path / "good")
    with pytest.raises(ModelError, match=r"log-probs are off by"):
        write(a_model(), tmp_path / "out", also=lambda folder: spoil_config(folder, rms_norm_eps=0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_weights_that_are_not_what_they_should_be_are_found(tmp_path: Path) -> None:
    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])

    with pytest.raises(ModelError, match=r"model\.safetensors is not whole"):
        write(a_model(), tmp_path / "out", also=cut)
    with pytest.raises(ModelError, match="cannot be loaded"):
        write(a_model(), tmp_path / "out", also=lambda folder: spoil_config(folder, hidden_size=48))
    assert list(tmp_path.iterdir()) == []


# --- what the config says of the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [True, False])
def test_the_config_says_whether_the_head_is_tied_as_the_weights_are(tmp_path: Path, said: bool) -> None:
    model = a_model()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.config.tie_word_embeddings = said
    write(model, tmp_path / "out")
    assert config_in(tmp_path / "out")["tie_word_embeddings"] is tied
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach() * 2)
    write(model, tmp_path / "untied")
    assert config_in(tmp_path / "untied")["tie_word_embeddings"] is False
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert not stock.get_output_embeddings().weight.equal(stock.get_input_embeddings().weight)


# --- what rounding loses ----------------------------------------------------------------------------------------------


def test_what_rounding_loses_is_a_projection() -> None:
    rounding = Rounding(torch.bfloat16)
    assert rounding.share is None
    assert rounding.keeps_most
    rounding.add(torch.ones(2), torch.tensor([1 + 2**-7, 1.0]))
    assert rounding.share == 1.0
    rounding.add(torch.ones(2), torch.tensor([1 + 2**-10, 1.0]))
    assert rounding.share == pytest.approx(2**-14 / (2**-14 + 2**-20))
    assert rounding.keeps_most
    rounding.add(torch.ones(1000), torch.full((1000,), 1 + 2**-10))
    assert not rounding.keeps_most


def test_the_type_is_the_one_that_was_asked_for_or_one_that_keeps_the_change() -> None:
    much, none = Rounded(1.0), Rounding(torch.bfloat16)
    bf16, f32 = torch.bfloat16, torch.float32
    assert exported_dtype("auto", bf16, none) == (bf16, "")
    assert exported_dtype("auto", bf16, much) == (bf16, "bfloat16 keeps 100% of what training changed in the weights")
    chosen, said = exported_dtype("auto", bf16, Rounded(0.4))
    assert chosen == f32
    assert said.startswith("exported in float32: bfloat16, in which the base model is stored, would keep 40% of what")
    chosen, said = exported_dtype("bfloat16", f32, Rounded(0.4))
    assert chosen == bf16
    assert said == "bfloat16 keeps 40% of what training changed in the weights; float32 keeps all of it"
    assert exported_dtype("float32", bf16, Rounded(0.4)) == (f32, "")


class Rounded(Rounding):
    def __init__(self, share: float) -> None:
        super().__init__(torch.bfloat16)
        self._left, self._whole = share, 1.0


def test_an_export_says_what_is_left_of_small_steps_and_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model stored in bfloat16 that is trained with small steps in float32."""
    monkeypatch.chdir(tmp_path)
    base = load_file(save_model(tmp_path / "model", dtype=torch.bfloat16) / "model.safetensors")
    groupwise.train(
        model="model", data=[{"prompt": a + b} for a in "abcd" for b in "ab"], run="run", steps=2, show="quiet",
        reward=lambda prompt, completion: float(completion.count("a")), num_generations=4, max_completion_length=8,
        prompts_per_step=4, learning_rate=1e-6,
    )  # fmt: skip
    capsys.readouterr()
    run = load_file(tmp_path / "run/checkpoints/step-00000002/model.safetensors")
    for asked, dtype, said in (
        ("auto", torch.float32, "exported in float32: bfloat16, in which the base model is stored, would keep "),
        ("bfloat16", torch.bfloat16, "bfloat16 keeps "), ("float32", torch.float32, ""),
    ):  # fmt: skip
        groupwise.export("run", asked, dtype=asked)
        out = load_file(tmp_path / asked / "model.safetensors")
        assert {tensor.dtype for tensor in out.values()} == {dtype}
        assert all(out[name].equal(run[name].to(dtype)) for name in out)
        told = capsys.readouterr().err
        assert (said in told) if said else ("keep" not in told)
        left = sum(((out[n].double() - base[n].double()) * (run[n].double() - base[n].double())).sum() for n in out)
        whole = sum((run[n].double() - base[n].double()).square().sum() for n in out)
        if asked == "bfloat16":
            assert f"bfloat16 keeps {left / whole:.0%} of" in told
            assert f"keeps {left / whole:.0%} of" in (tmp_path / asked / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"no type 'int8'.*auto, float32, bfloat16, float16"):
        groupwise.export("run", "int8", dtype="int8")


def test_numbers_that_a_type_has_no_room_for_are_refused(tmp_path: Path) -> None:
    model = a_model()
    with torch.no_grad():
        next(model.parameters())[0, 0] = 1e6
    with pytest.raises(ModelError, match="has numbers that float16 has no room for"):
        write(model, tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_reward_model_is_kept_in_float32_where_its_sources_type_would_lose_what_it_learned(tmp_path: Path) -> None:
    for step, dtype in ((1e-6, "float32"), (0.5, "bfloat16")):
        folder = save_model(tmp_path / f"source-{dtype}", dtype=torch.bfloat16)
        learner = a_learner(folder)
        with torch.no_grad():
            for tensor in learner.master_weights().values():
                tensor.add_(step)
        save_reward_model(learner, tmp_path / dtype)
        assert config_in(tmp_path / dtype)["dtype"] == dtype


@pytest.mark.parametrize("kind", ["bamba", "mbart"])
def test_a_class_whose_own_cache_fails_on_a_few_layers_is_read_back_without_it(kind: str, tmp_path: Path) -> None:
    """Bamba's needs a layer of attention, and a decoder alone has no cache for its encoder's half."""
    config = small_config(kind, 32)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    read_back(model, tmp_path / "model")
