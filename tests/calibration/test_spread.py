"""Samples shared by ranks are all and each once, and chance gives each what one process would give it."""

from __future__ import annotations

import pytest
import torch

from mxfx.calibration.spread import parts
from mxfx.ground import ranks

TOKENS = torch.arange(9 * 4).view(9, 4)


@pytest.mark.parametrize("world", [1, 2, 4, 12])
@pytest.mark.parametrize("size", [1, 4, 20])
def test_ranks_run_all_samples_and_draw_as_one(monkeypatch: pytest.MonkeyPatch, world: int, size: int) -> None:
    one = torch.Generator().manual_seed(0)
    expected = torch.cat([torch.randn(3 * len(batch), generator=one) for batch in TOKENS.split(size)])
    ids, drawn = [], []
    for rank in range(world):
        monkeypatch.setattr(ranks, "_now", ranks._Together(rank, world, rank == 0))
        generator = torch.Generator().manual_seed(0)
        for part in parts(TOKENS, size):
            assert 0 < len(part.ids) <= size
            ids.append(part.ids)
            # Normal numbers of many rows are others than those of the same rows in two calls.
            drawn.append(part.rows(lambda count, of=generator: torch.randn(count, generator=of), 3 * len(part.ids)))
    assert torch.equal(torch.cat(ids), TOKENS)
    assert torch.equal(torch.cat(drawn), expected)
