"""A log gets one line for a bar."""

from __future__ import annotations

import pytest

from mxfx.ground.progress import on_terminal, track


def test_a_log_gets_a_line_with_the_number_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    for steps, name in ([1], "reading news.txt"), ([1, 2], "gptq"):
        assert list(track(steps, name, len(steps))) == steps
    assert capsys.readouterr().err == "reading news.txt (1 step)\ngptq (2 steps)\n"


def test_what_a_log_is_told_a_terminal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert not on_terminal()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert on_terminal()
