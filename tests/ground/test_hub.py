"""Where there is no network, a name that the hub might know is refused in seconds; a slow hub is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from mxfx.calibration.datasets import DatasetError, load_tokens
from mxfx.driver.pretrained import ModelError, load_model, load_tokenizer
from mxfx.evaluation.results import EvaluationError
from mxfx.evaluation.texts import hub_pages
from mxfx.ground import hub


class ConnectError(Exception):
    """As clients call it."""


class ReadTimeout(Exception):
    """The same."""


Answer = Callable[..., object]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the hub, of which no connection is made; retries of its own client would take 23 s."""
    monkeypatch.setattr(hub, "_found", [])
    monkeypatch.setattr(hub, "_PAUSE", 0.01)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return answering(monkeypatch, ConnectError("[Errno -2] Name or service not known"))


def answering(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    urls: list[str] = []

    def head(url: str, timeout: float) -> object:
        urls.append(url)
        if error is not None:
            raise error
        return SimpleNamespace(status_code=200)

    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    return urls


@pytest.mark.parametrize("load", [load_tokenizer, load_model])
def test_without_a_network_the_error_says_so_at_once(load: Answer, asked: list[str]) -> None:
    began = time.monotonic()
    with pytest.raises(ModelError) as error:
        load("no-organization/no-model")
    assert time.monotonic() - began < 10
    for part in ("'no-organization/no-model'", "there is no such folder", "https://huggingface.co cannot be reached"):
        assert part in str(error.value)
    assert "expected: a folder that save_pretrained or `mxfx run --out` wrote, or a hub id" in str(error.value)
    with pytest.raises(ModelError):
        load("no-organization/other-model")
    assert asked == [constants.ENDPOINT] * 2
    assert constants.HF_HUB_OFFLINE is False


def test_without_a_network_data_sets_of_the_hub_are_refused_at_once(asked: list[str]) -> None:
    began = time.monotonic()
    with pytest.raises(DatasetError, match="could not load 'ptb'"):
        load_tokens("ptb", lambda text, **_: {"input_ids": []}, samples=1, length=8, seed=0)
    with pytest.raises(EvaluationError, match="could not load 'EleutherAI/wikitext_document_level'"):
        hub_pages()
    assert time.monotonic() - began < 15
    assert asked


@pytest.mark.parametrize("error", [None, ReadTimeout("slow")], ids=["answers", "answers late"])
def test_a_hub_that_is_slow_is_no_hub_that_is_away(
    error: Exception | None, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, error)
    with hub.reached() as away:
        assert away is None
        assert constants.HF_HUB_OFFLINE is False


def test_a_network_that_comes_back_is_found(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.unreachable() is not None
    answering(monkeypatch, None)
    monkeypatch.setattr(hub, "_HOLDS", 0.0)
    assert hub.unreachable() is None


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "no/where/else", "nowhere/"])
def test_what_can_only_be_a_path_asks_no_hub(name: str, asked: list[str]) -> None:
    with pytest.raises(ModelError, match=f"no folder '{name}'"):
        load_tokenizer(name)
    assert asked == []


def test_a_file_is_no_model(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"'model\.gguf' is a file; expected a local model folder, or a hub id"):
        load_tokenizer("model.gguf")
    assert asked == []
