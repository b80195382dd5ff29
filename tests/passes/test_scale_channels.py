"""``scale-channels`` moves range between activations and weights by diagonals that nobody sees."""

from __future__ import annotations

import pytest

from mxfx.graph.node import path_of
from mxfx.passes import ScaleChannels

#: Family → what is refused there, by a word of the reason.
REFUSED = {
    "llama-tiny": set(), "qwen2-tiny": set(), "mistral-tiny": set(), "gemma-tiny": set(), "granite-tiny": set(),
    "qwen3-tiny": {"key"}, "olmo2-tiny": {"key"}, "gemma3-tiny": {"key"},
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.parametrize("site", ["up", "value", "key", "norm"])
def test_logits_stay(family, site, raised, preserved):
    _, record = preserved(ScaleChannels(sites=(site,)), raised(family))
    if site in REFUSED[family]:
        assert not record.matches
        assert all("rms_norm" in s.reason for s in record.skips)
    elif site != "norm":
        assert len(record.matches) == 2


def test_fused_projections_scale_too(raised, preserved):
    _, record = preserved(ScaleChannels(), raised("phi3-tiny"))
    assert len(record.matches) >= 4


def test_up_and_down_end_with_equal_ranges(raised, preserved):
    program, _ = preserved(ScaleChannels(sites=("up",), alpha=1.0), raised("llama-tiny"))
    down = next(n for n in program.nodes("linear") if path_of(n).endswith("down_proj"))
    seen = {}

    import torch

    from mxfx.calibration.moments import block_moments
    from mxfx.rewrite import Context

    ctx = Context(tokens=lambda: torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(5)))
    seen = block_moments(program, {down.args[0]: 1}, ctx)[down.args[0]].flatten()
    assert float(seen.max() / seen.min()) < 1.001
