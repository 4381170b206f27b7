"""A hub that does not answer is noticed at once, one that answers is left to its own library."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from groupwise.errors import ModelError
from groupwise.models.load import load_config
from groupwise.tokenizer.codec import Codec
from groupwise.tokenizer.hub import check_within_reach, hub_error
from tests.tiny_hub import NOBODY_LISTENS, cached_snapshot


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOBODY_LISTENS)


def no_waiting(seconds: float) -> None:
    pytest.fail(f"it waits {seconds} s for another try")


@pytest.mark.parametrize("load", [load_config, Codec.load], ids=["model", "tokenizer"])
def test_without_a_connection_an_unknown_id_is_refused_without_another_try(
    monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    monkeypatch.setattr(time, "sleep", no_waiting)
    with pytest.raises(ModelError, match=r"nobody/nothing'? cannot be loaded: the hub does not answer \(.+\)\. There"):
        load("nobody/nothing")


@pytest.mark.parametrize("name", ["builtin:arithmetic", "no such model!"])
@pytest.mark.parametrize("load", [load_config, Codec.load], ids=["model", "tokenizer"])
def test_a_name_that_is_no_id_is_refused_as_one(load: Any, name: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        load(name)


def test_what_is_in_the_cache_and_what_is_a_folder_need_no_hub(tmp_path: Path) -> None:
    snapshot = cached_snapshot(tmp_path / "hub", "org/tiny")
    with pytest.raises(ModelError, match="The model org/tiny cannot be loaded"):
        check_within_reach("org/tiny", None, "The model org/tiny")
    (snapshot / "config.json").write_text("{}")
    check_within_reach("org/tiny", None, "The model org/tiny")
    check_within_reach(tmp_path, None, "The model")


class NotFound(BaseHTTPRequestHandler):
    """Answers that there is nothing."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def answering() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), NotFound)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_error_is_an_answer(monkeypatch: pytest.MonkeyPatch, answering: str) -> None:
    assert hub_error("nobody/nothing", "dataset") is not None
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", answering)
    assert hub_error("nobody/nothing", "dataset") is None
    check_within_reach("nobody/nothing", None, "The model nobody/nothing")


def test_a_name_that_is_none_is_for_the_loader_to_refuse() -> None:
    assert hub_error("what is this?", "model") is None


def test_a_wish_to_stay_offline_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in str(hub_error("nobody/nothing", "model"))
