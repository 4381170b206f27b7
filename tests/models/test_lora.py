"""A folder with an adapter is refused in one sentence, whatever is installed and whatever lies beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groupwise.errors import ModelError
from groupwise.models.load import load_config, load_policy
from groupwise.models.lora import ADAPTER
from tests.run.tiny import save_model
from tests.tiny_hub import cached_snapshot
from tests.tiny_judges import judge, pupil, save_judge


def add_adapter(folder: Path, text: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / ADAPTER).write_text(text or json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}))
    return folder


def test_whole_weights_with_an_adapter_are_refused(tmp_path: Path) -> None:
    folder = add_adapter(save_model(tmp_path / "model"))
    with pytest.raises(
        ModelError, match=r"whole weights and an adapter \(adapter_config\.json\).*merge_and_unload"
    ) as e:
        load_policy(str(folder), device="cpu")
    assert "\n" not in str(e.value)
    (folder / ADAPTER).unlink()
    assert load_policy(str(folder), device="cpu").policy.size


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_so_are_reward_models(tmp_path: Path, kind: str) -> None:
    folder = add_adapter(save_judge(tmp_path / "judge", kind))
    for load in (judge, pupil):
        with pytest.raises(ModelError, match="whole weights and an adapter"):
            load(folder, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, base", [(None, "for org/base"), ("{", "for a base model that it does not name"), ("[]", "does not name")]
)
@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_alone_names_its_base(tmp_path: Path, text: str | None, base: str, with_config: bool) -> None:
    folder = add_adapter(tmp_path / "adapter", text)
    if with_config:
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ModelError, match=f"is an adapter .* {base}"):
        load_config(str(folder))


def test_an_adapter_on_the_hub_is_refused_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = cached_snapshot(tmp_path / "hub", "org/tuned")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    add_adapter(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match=r"org/tuned is an adapter"):
        load_config("org/tuned")
