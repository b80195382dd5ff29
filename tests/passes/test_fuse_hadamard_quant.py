"""``fuse-hadamard-quant`` makes one node of a transform and the quantizer that alone reads it."""

from __future__ import annotations

from mxfx.passes.fuse_hadamard_quant import FuseHadamardQuant
from tests.passes.fusing import FORMAT, count, fused, quantized


def test_each_transformed_input_and_key_becomes_one_node(raised, ctx):
    before = quantized(raised("llama-tiny"), ctx, transforms=True)
    after, record = fused(FuseHadamardQuant(), before, ctx)
    # Two layers: the inputs of q/k/v, o, gate/up and down, and the keys.
    assert len(record.matches) == count(after, "transform_quantize") == 2 * 5
    assert all(match.note == FORMAT for match in record.matches)


def test_queries_are_transformed_but_not_quantized_so_they_stay(raised, ctx):
    before = quantized(raised("llama-tiny"), ctx, transforms=True)
    after, record = fused(FuseHadamardQuant(), before, ctx)
    assert count(after, "hadamard") == 2
    assert len(record.skips) == 2
    assert all("quantizes nothing" in skip.reason for skip in record.skips)


def test_the_matrix_of_an_order_is_stored_once_and_its_signs_are_known(raised, ctx):
    before = quantized(raised("llama-tiny"), ctx, transforms=True)
    after, _ = fused(FuseHadamardQuant(), before, ctx)
    assert [name for name in after.weights if name.startswith("hadamard.")] == ["hadamard.16"]
    assert all(node.args[3] is True for node in after.nodes("transform_quantize"))


def test_without_transforms_there_is_nothing_to_fuse(raised, ctx):
    _, record = fused(FuseHadamardQuant(), quantized(raised("llama-tiny"), ctx, transforms=False), ctx)
    assert not record.matches and not record.skips
