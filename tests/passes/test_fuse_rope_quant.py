"""``fuse-rope-quant`` makes one node of RoPE and the quantizer that alone reads it."""

from __future__ import annotations

import pytest

from mxfx.passes.fuse_hadamard_quant import FuseHadamardQuant
from mxfx.passes.fuse_rope_quant import FuseRopeQuant
from mxfx.rewrite import apply
from tests.passes.fusing import count, fused, quantized


@pytest.mark.parametrize("family", ["llama-tiny", "qwen3-tiny"])
def test_every_key_joins_its_quantizer(family, raised, ctx):
    after, record = fused(FuseRopeQuant(), quantized(raised(family), ctx, transforms=False), ctx)
    assert len(record.matches) == count(after, "rope_quantize") == 2
    assert count(after, "rope") == 2


def test_a_transform_in_between_is_taken_in(raised, ctx):
    before = apply(FuseHadamardQuant(), quantized(raised("llama-tiny"), ctx, transforms=True), ctx).program
    after, record = fused(FuseRopeQuant(), before, ctx)
    assert len(record.matches) == 2
    assert all(match.note == "transform + mxint4@16" for match in record.matches)
    assert all(node.args[3].target == "hadamard.16" for node in after.nodes("rope_quantize"))


def test_queries_stay_in_full_precision(raised, ctx):
    _, record = fused(FuseRopeQuant(), quantized(raised("llama-tiny"), ctx, transforms=False), ctx)
    assert len(record.skips) == 2
    assert all("quantizes nothing" in skip.reason for skip in record.skips)


def test_half_a_run_stops_where_bisect_says(raised, ctx):
    applied = apply(FuseRopeQuant(), quantized(raised("llama-tiny"), ctx, transforms=False), ctx, limit=1)
    assert count(applied.program, "rope_quantize") == 1
