"""A log gets one line for a bar."""

from __future__ import annotations

import pytest

from mxfx.ground.progress import track


def test_a_log_gets_a_line_with_the_number_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    for steps, name in ([1], "reading news.txt"), ([1, 2], "gptq"):
        assert list(track(steps, name, len(steps))) == steps
    assert capsys.readouterr().err == "reading news.txt (1 step)\ngptq (2 steps)\n"
