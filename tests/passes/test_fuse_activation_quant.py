"""``fuse-activation-quant`` makes one node of SiLU, product and quantizer."""

from __future__ import annotations

import pytest

from mxfx.passes.fuse_activation_quant import FuseActivationQuant
from mxfx.passes.fuse_hadamard_quant import FuseHadamardQuant
from mxfx.rewrite import apply
from tests.passes.fusing import count, fused, quantized


@pytest.mark.parametrize("family", ["llama-tiny", "qwen2-tiny"])
def test_every_gated_activation_joins_its_quantizer(family, raised, ctx):
    after, record = fused(FuseActivationQuant(), quantized(raised(family), ctx, transforms=False), ctx)
    assert len(record.matches) == count(after, "silu_mul_quantize") == 2
    assert count(after, "silu") == 0


def test_a_transform_in_between_is_taken_in(raised, ctx):
    before = apply(FuseHadamardQuant(), quantized(raised("llama-tiny"), ctx, transforms=True), ctx).program
    after, record = fused(FuseActivationQuant(), before, ctx)
    assert len(record.matches) == 2
    assert all(match.note == "transform + mxint4@16" for match in record.matches)
    assert all(node.args[2].target == "hadamard.16" for node in after.nodes("silu_mul_quantize"))


def test_nothing_is_skipped_where_everything_fits(raised, ctx):
    _, record = fused(FuseActivationQuant(), quantized(raised("llama-tiny"), ctx, transforms=False), ctx)
    assert [skip.reason for skip in record.skips] == []


def test_half_a_run_stops_where_bisect_says(raised, ctx):
    applied = apply(FuseActivationQuant(), quantized(raised("llama-tiny"), ctx, transforms=False), ctx, limit=1)
    assert count(applied.program, "silu_mul_quantize") == 1
