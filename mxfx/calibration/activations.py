"""Where activations wait between two stages of a stream: on the device, in host memory or on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mxfx.graph.transfers import Arrival, Layout, Transfers
from mxfx.ground.files import temporary_folder

Placement = Literal["device", "cpu", "disk"]


@dataclass
class _Waiting:
    """A tensor in a buffer of the host, or in a file that is being written or there."""

    layout: Layout
    buffer: Tensor | None = None
    there: torch.cuda.Event | None = None
    path: Path | None = None
    written: Future | None = None


#: Values of one batch by name: as they are, or on their way to the device.
Fetched = dict[str, object]


class ActivationStore:
    """Values of nodes by (batch, name). Anything but a tensor (a size, an absent mask) stays in memory.

    ``fetch`` begins to bring values back and ``arrived`` gives them, so that those of the next batch travel while this
    one is computed; ``put`` begins to take values away, and waits where too many of them are still on the device.
    """

    def __init__(self, placement: Placement, transfers: Transfers) -> None:
        self._transfers = transfers
        self._placement = placement
        self._values: dict[tuple[int, str], object] = {}
        self._folder = temporary_folder("mxfx-activations-") if placement == "disk" else None

    def put(self, batch: int, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            self._values[batch, name] = self._stow(batch, name, value) if isinstance(value, Tensor) else value
        self._transfers.end_of_batch()

    def fetch(self, batch: int, names: Iterable[str]) -> Fetched:
        return {name: self._begin(self._values[batch, name]) for name in names}

    def drop(self, batch: int, name: str) -> None:
        value = self._values.pop((batch, name), None)
        if isinstance(value, _Waiting):
            if value.buffer is not None:
                self._transfers.buffers.give(value.buffer)
            if value.path is not None:
                assert value.written is not None
                value.written.result()
                value.path.unlink()

    def close(self) -> None:
        """Forget everything; files go too."""
        self._values.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _begin(self, value: object) -> object:
        transfers = self._transfers
        if isinstance(value, Tensor):
            return transfers.staged_up(value)
        if not isinstance(value, _Waiting):
            return value
        if value.path is None:
            assert value.buffer is not None
            return transfers.up(value.buffer, value.layout, value.there)
        return Arrival(*self._read(value))

    def _read(self, value: _Waiting) -> tuple[Tensor, None, Future]:
        target, path, layout = value.layout.empty(self._transfers.device), value.path, value.layout

        def read() -> Tensor:
            buffer = self._transfers.buffers.take(layout.nbytes)
            assert path is not None
            with path.open("rb") as file:
                file.readinto(memoryview(buffer.numpy()))
            return buffer

        return target, None, self._transfers.deliver(read, target, layout)

    def _stow(self, batch: int, name: str, value: Tensor) -> object:
        if self._placement == "device":
            return value
        layout = Layout.of(value)
        buffer = self._transfers.buffers.take(layout.nbytes)
        there = self._transfers.down(value, buffer, layout)
        if self._folder is None:
            return _Waiting(layout, buffer, there)
        path = Path(self._folder.name) / f"{batch}-{name}"

        def write() -> None:
            if there is not None:
                there.synchronize()
            buffer.numpy().tofile(path)
            self._transfers.buffers.give(buffer)

        return _Waiting(layout, path=path, written=self._transfers.work(write))


def arrived(values: Fetched) -> dict[str, object]:
    """Fetched values, the tensors on the device."""
    return {name: value.get() if isinstance(value, Arrival) else value for name, value in values.items()}
