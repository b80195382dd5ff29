"""Every change of a weight is recorded with its relative error, in any precision and size."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.weights import WeightStore


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 4), (300, 300)])
def test_the_ledger_holds_the_relative_error(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    store = WeightStore({"w": torch.ones(shape, dtype=dtype)}, working=torch.promote_types(dtype, torch.float32))
    store.set("w", torch.full(shape, 1.5), by="test")
    assert store.ledger[-1].error == pytest.approx(0.5)
