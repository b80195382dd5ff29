"""Weights that travel piece by piece: every byte arrives, through few buffers, none written while it is read."""

import pytest
import torch
from torch import Tensor

from mxfx.graph import transfers
from mxfx.graph.transfers import Layout, Transfers

_W = torch.randn(37, 53, generator=torch.Generator().manual_seed(0))


class _Event:
    """Of a copy that happens when it is waited for, as late as a stream may do it."""

    def __init__(self, target: Tensor, source: Tensor) -> None:
        self._pending: tuple[Tensor, Tensor] | None = (target, source)

    def synchronize(self) -> None:
        if self._pending is not None:
            self._pending[0].copy_(self._pending[1])
            self._pending = None


class _Stream:
    def wait_event(self, event: object) -> None:
        pass


def _pieces(source: Tensor, monkeypatch: pytest.MonkeyPatch, piece: int) -> tuple[Tensor, Transfers]:
    """A tensor brought up as where there are streams, and what brought it."""
    monkeypatch.setattr(transfers, "_PIECE", piece)
    monkeypatch.setattr(Transfers, "_copy", lambda self, stream, target, source: _Event(target, source))
    moving = Transfers(torch.device("cpu"))
    moving._up = _Stream()  # type: ignore[assignment]
    layout = Layout.of(source)
    target = layout.empty(source.device)
    whole = source if source.stride() == layout.stride else layout.empty(source.device).copy_(source)
    moving._pieces_up(transfers._bytes_of(whole), transfers._bytes_of(target), ready=object())  # type: ignore[arg-type]
    return target, moving


@pytest.mark.parametrize("piece", [64, 100, 1 << 20])
@pytest.mark.parametrize(
    "source", [_W, _W.bfloat16(), _W.mT, _W[:, ::2], _W[3:20], _W[0, 0], _W[:0]], ids=lambda source: str(source.shape)
)
def test_every_byte_arrives(source: Tensor, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, moving = _pieces(source, monkeypatch, piece)
    assert torch.equal(found, source)
    assert moving.buffers.bytes <= transfers._PIECES * piece


def test_buffers_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, moving = _pieces(_W, monkeypatch, 100)
    held = moving.buffers.bytes
    target = torch.empty_like(_W)
    moving._pieces_up(transfers._bytes_of(_W), transfers._bytes_of(target), ready=object())  # type: ignore[arg-type]
    assert torch.equal(target, _W) and moving.buffers.bytes == held == 3 * 100
