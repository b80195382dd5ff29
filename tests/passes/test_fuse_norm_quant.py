"""``fuse-norm-quant`` makes one node of a norm and the quantizer that alone reads it."""

from __future__ import annotations

import pytest

from mxfx.passes.fuse_hadamard_quant import FuseHadamardQuant
from mxfx.passes.fuse_norm_quant import FuseNormQuant
from mxfx.rewrite import apply
from tests.passes.fusing import count, fused, quantized


@pytest.mark.parametrize("family", ["llama-tiny", "gemma-tiny"])
def test_both_norms_of_every_layer_join_their_quantizers(family, raised, ctx):
    after, record = fused(FuseNormQuant(), quantized(raised(family), ctx, transforms=False), ctx)
    assert len(record.matches) == count(after, "norm_quantize") == 4
    assert count(after, "rms_norm") == 1


def test_a_transform_in_between_is_taken_in(raised, ctx):
    before = apply(FuseHadamardQuant(), quantized(raised("llama-tiny"), ctx, transforms=True), ctx).program
    after, record = fused(FuseNormQuant(), before, ctx)
    assert len(record.matches) == 4
    assert all(match.note == "transform + mxint4@16" for match in record.matches)
    assert all(node.args[2].target == "hadamard.16" for node in after.nodes("norm_quantize"))


def test_the_last_norm_feeds_the_head_and_stays(raised, ctx):
    _, record = fused(FuseNormQuant(), quantized(raised("llama-tiny"), ctx, transforms=False), ctx)
    assert [skip.reason for skip in record.skips] == ["its reader linear_14 quantizes nothing"]


def test_half_a_run_stops_where_bisect_says(raised, ctx):
    applied = apply(FuseNormQuant(), quantized(raised("llama-tiny"), ctx, transforms=False), ctx, limit=1)
    assert count(applied.program, "norm_quantize") == 1
