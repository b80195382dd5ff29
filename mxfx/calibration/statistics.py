"""Second moments of the tensors that linears read, and the lock that keeps stale ones from a solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mxfx.calibration.keys import Keys
from mxfx.ground.errors import MxfxError

#: Columns of one panel of the upper triangle: wide enough for a product to fill the device.
_PANEL = 256
_PANEL_CUDA = 2048


def panel_width(device: torch.device) -> int:
    """Columns that are multiplied with all columns behind them at one time."""
    return _PANEL_CUDA if device.type == "cuda" else _PANEL


class StaleStatistics(MxfxError, RuntimeError):
    """Statistics were offered for a tensor that is not, or no longer, the one that they describe."""


class Gram:
    """Σ xᵀ x over rows, ``(columns, columns)``, in float32 or float64.

    Only the upper triangle is computed, panel by panel: about half of the multiplications.
    """

    def __init__(self, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._sum = torch.zeros(columns, columns, dtype=dtype, device=device)
        self._panel = panel_width(device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add rows ``(..., columns)``; products of half-precision rows are exact, sums are float32 or better."""
        rows = x.reshape(-1, x.shape[-1])
        self.rows += rows.shape[0]
        for start in range(0, rows.shape[1], self._panel):
            stop = start + self._panel
            panel = rows[:, start:stop]
            self._sum[start:stop, start:] += product_of_rows(panel, rows[:, start:], self._sum.dtype)

    def value(self) -> Tensor:
        """The whole symmetric matrix, mirrored in place: a copy of a wide layer's matrix would cost a gigabyte."""
        for start in range(0, len(self._sum), self._panel):
            stop = start + self._panel
            corner = self._sum[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).mT)
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].mT
        return self._sum


class CrossMoment:
    """Σ xᵀ y over rows, ``(columns, columns)``: row = channel of ``x``, column = channel of ``y``."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        self._sum += product_of_rows(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), self._sum.dtype)

    def value(self) -> Tensor:
        return self._sum


def product_of_rows(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """``xᵀ y`` in ``dtype``; products of half-precision rows are exact, sums are float32 or better."""
    if x.is_cuda and x.dtype == y.dtype and x.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        return torch.mm(x.mT, y, out_dtype=torch.float32)
    return x.to(dtype).mT @ y.to(dtype)


@dataclass(frozen=True)
class Statistics:
    """Moments of one tensor, locked by the key of what computes it.

    The moments come out only through ``hessian`` and ``cross``, which compare the key with the program that asks.
    ``tokens`` is the number of rows that were summed.
    """

    key: str
    tokens: int
    data: Mapping[str, object]
    _hessian: Tensor
    _cross: Tensor | None = None
    _keys: Keys = field(default_factory=Keys, repr=False, compare=False)

    def hessian(self, source: fx.Node, hash_of: Callable[[str], str]) -> Tensor:
        """Σ xᵀ x of what ``source`` computes with the weights of those hashes.

        Raises ``StaleStatistics`` if that is not what was measured.
        """
        self._unlock(source, hash_of)
        return self._hessian

    def cross(self, source: fx.Node, hash_of: Callable[[str], str]) -> Tensor:
        """Σ xᵀ x_float against the reference stream. Raises ``StaleStatistics``; ``ValueError`` if not collected."""
        self._unlock(source, hash_of)
        if self._cross is None:
            raise ValueError("no cross moment was collected: stream with a reference")
        return self._cross

    def _unlock(self, source: fx.Node, hash_of: Callable[[str], str]) -> None:
        if self._keys.key([source], hash_of, self.data) != self.key:
            raise StaleStatistics(
                f"the statistics do not describe {source.name}: the graph or a weight upstream of it is not the "
                "one that the calibration stream ran; rewrite a layer only while the stream stands at it"
            )
