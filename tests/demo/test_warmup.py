"""The cached warm-up: deterministic, keyed by what decides it, and safe to race for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupwise.demo import warmup
from groupwise.demo.model import END_ID, PAD_ID, character_tokenizer
from groupwise.demo.task import ALPHABET
from groupwise.demo.warmup import WarmUp, ensure_warm, learning_rate
from groupwise.errors import ModelError

QUICK = WarmUp(hidden=32, layers=1, demonstrations=64, batch_size=8, ready_loss=9.0, tail_steps=3, max_steps=9)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads wait for each other where other tests share the cores."""
    monkeypatch.setattr(warmup, "THREADS", 1)


def bits(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_warm_model_is_an_ordinary_folder(tmp_path: Path) -> None:
    folder = ensure_warm(0, tmp_path / "new" / "cache", settings=QUICK)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(ALPHABET)["input_ids"]) == ALPHABET
    assert model.config.vocab_size == len(tokenizer)
    assert [path.name for path in (tmp_path / "new" / "cache").iterdir()] == [folder.name]


def test_the_same_seed_makes_the_same_bits_whatever_the_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = ensure_warm(1, tmp_path / "one", settings=QUICK)
        assert torch.get_num_threads() == 1
        torch.set_num_threads(3)
        two = ensure_warm(1, tmp_path / "two", settings=QUICK)
    finally:
        torch.set_num_threads(before)
    assert bits(one) == bits(two)
    assert bits(one) != bits(ensure_warm(2, tmp_path / "one", settings=QUICK))


def test_a_made_model_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPWISE_CACHE", str(tmp_path))
    folder = ensure_warm(0, settings=QUICK)
    monkeypatch.setattr(warmup, "warm_up", None)
    assert ensure_warm(0, settings=QUICK) == folder
    assert folder.parent == tmp_path


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(bits(folder)[:-100]), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
    ids=["cut weights", "no weights", "bad config", "no tokenizer"],
)
def test_a_damaged_model_in_the_cache_is_made_again_and_that_is_said(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    folder = ensure_warm(0, tmp_path, settings=QUICK)
    before, lines = bits(folder), list[str]()
    damage(folder)
    assert ensure_warm(0, tmp_path, settings=QUICK, say=lines.append) == folder
    assert bits(folder) == before
    assert AutoTokenizer.from_pretrained(folder)
    assert f"is damaged and made again: {folder} ({said}: " in lines[0]
    assert ensure_warm(0, tmp_path, settings=QUICK, say=pytest.fail) == folder


def test_a_damaged_model_that_cannot_be_removed_names_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_warm(0, tmp_path, settings=QUICK)
    (folder / "config.json").unlink()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(warmup.shutil, "rmtree", refuse)
    with pytest.raises(ModelError, match=f"Permission denied.*{folder}.*GROUPWISE_CACHE"):
        ensure_warm(0, tmp_path, settings=QUICK)


def test_every_setting_and_library_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_in(settings: WarmUp) -> Path:
        return ensure_warm(0, tmp_path, settings=settings)

    folder = made_in(QUICK)
    assert made_in(replace(QUICK, careless=0.5)) != folder
    monkeypatch.setattr(warmup.transformers, "__version__", "0")
    assert made_in(QUICK) != folder


def test_who_loses_the_race_takes_the_winners_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_warm(0, tmp_path / "other", settings=QUICK)
    target = tmp_path / "cache" / first.name
    train = warmup.warm_up

    def overtaken(*arguments: object) -> object:
        model = train(*arguments)
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"the winner's")
        return model

    monkeypatch.setattr(warmup, "warm_up", overtaken)
    assert bits(ensure_warm(0, tmp_path / "cache", settings=QUICK)) == b"the winner's"
    assert list(target.parent.iterdir()) == [target]


def test_an_interrupted_warm_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warmup, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_warm(0, tmp_path, settings=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_names_itself_and_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match=r"file/cache.*GROUPWISE_CACHE"):
        ensure_warm(0, tmp_path / "file" / "cache", settings=QUICK)


def test_a_model_that_does_not_learn_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="seed 0: after 9 steps"):
        ensure_warm(0, tmp_path, settings=replace(QUICK, ready_loss=0.0))


def test_prompts_and_padding_are_not_learned() -> None:
    tokenizer = character_tokenizer(ALPHABET)
    examples = warmup._encode(tokenizer, 0, QUICK)
    token_ids, targets = warmup._pad([examples[0], ([7, 8, 9, END_ID], 2)])
    assert targets[0, :10].tolist() == [warmup.IGNORED] * 10
    assert targets[0, 10:].tolist() == token_ids[0, 10:].tolist()
    assert token_ids[1, :5].tolist() == [7, 8, 9, END_ID, PAD_ID]
    assert targets[1, :5].tolist() == [warmup.IGNORED, warmup.IGNORED, 9, END_ID, warmup.IGNORED]


def test_the_rate_rises_stays_and_falls_once_the_loss_is_low() -> None:
    settings = WarmUp(learning_rate=1.0, rise_steps=4, tail_steps=3)
    assert [learning_rate(settings, step, None) for step in (0, 1, 3, 500)] == [0.25, 0.5, 1.0, 1.0]
    assert [learning_rate(settings, step, 100) for step in (100, 101, 102, 103)] == [1.0, 0.75, 0.5, 0.25]


def test_what_takes_time_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "_update", lambda *arguments: 0.5)
    said: list[str] = []
    ensure_warm(0, tmp_path, settings=replace(QUICK, tail_steps=99, max_steps=200), say=said.append)
    assert "warming up" in said[0]
    assert said[1].startswith("warm-up step 100: loss 0.500")
