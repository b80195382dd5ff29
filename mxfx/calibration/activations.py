"""Where activations wait between two stages of a stream: on the device, in host memory or on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Placement = Literal["device", "cpu", "disk"]


class ActivationStore:
    """Values of nodes by (batch, name). Anything but a tensor (a size, an absent mask) stays in memory."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._device = device
        self._placement = placement
        self._values: dict[tuple[int, str], object] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="mxfx-activations-") if placement == "disk" else None

    def put(self, batch: int, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            self._values[batch, name] = self._stow(batch, name, value) if isinstance(value, Tensor) else value

    def get(self, batch: int, name: str) -> object:
        value = self._values[batch, name]
        if isinstance(value, Path):
            # The copy gives the same alignment as a fresh result: some kernels sum in an order that depends on it.
            value = load_file(value)["value"].clone()
        return value.to(self._device) if isinstance(value, Tensor) else value

    def drop(self, batch: int, name: str) -> None:
        value = self._values.pop((batch, name), None)
        if isinstance(value, Path):
            value.unlink()

    def close(self) -> None:
        """Forget everything; files go too."""
        self._values.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _stow(self, batch: int, name: str, value: Tensor) -> Tensor | Path:
        if self._folder is None:
            return value if self._placement == "device" else value.to("cpu")
        path = Path(self._folder.name) / f"{batch}-{name}.safetensors"
        save_file({"value": value.to("cpu").contiguous()}, path)
        return path
