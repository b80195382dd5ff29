"""``transform-embedding`` stores the embedding in another basis; what is computed stays."""

from __future__ import annotations

import pytest
import torch

from mxfx.algorithms.hadamard import hadamard_matrix
from mxfx.formats import parse
from mxfx.graph.node import kind
from mxfx.passes import Annotate, FuseNorm, Rule, TransformEmbedding
from mxfx.rewrite import Selector, apply


@pytest.mark.parametrize("family", ["llama-tiny", "qwen2-tiny", "gemma-tiny", "gemma3-tiny", "phi3-tiny"])
def test_logits_stay(family, raised, preserved):
    before = raised(family)
    program, record = preserved(TransformEmbedding(block=16), before)
    assert len(record.matches) == 1
    (embedding,) = program.nodes("embedding")
    name = program.weights.canonical(program.weight_of(embedding))
    turned = before.weights[name].unflatten(-1, (-1, 16)) @ hadamard_matrix(16, torch.float64)
    torch.testing.assert_close(program.weights[name], turned.flatten(-2), rtol=1e-6, atol=1e-9)


def test_a_tied_head_stays_tied_and_reads_the_same_basis(raised, preserved):
    fused = apply(FuseNorm(keep_tied=True), raised("llama-tiny")).program
    program, _ = preserved(TransformEmbedding(block=16), fused)
    (embedding,), head = program.nodes("embedding"), list(program.nodes("linear"))[-1]
    names = {program.weights.canonical(program.weight_of(node)) for node in (embedding, head)}
    assert len(names) == 1
    assert kind(head.args[0]) == "hadamard" and {kind(user) for user in embedding.users} == {"hadamard"}


def test_where_formats_are_only_an_embedding_that_has_one_is_taken(raised):
    rule = Rule(Selector(r".*_proj"), weight=parse("mxint4@16"))
    program = apply(Annotate(rule=(rule,)), raised("llama-tiny")).program
    done = apply(TransformEmbedding(block=16), program)
    assert not done.record.matches and done.record.skips[0].reason == "its weight has no format"


@pytest.mark.parametrize("block", [0, 1, 12, 20])
def test_a_matrix_that_does_not_undo_itself_is_refused(block):
    with pytest.raises(ValueError, match="power of two"):
        TransformEmbedding(block=block)


def test_blocks_that_do_not_divide_the_channels_are_a_reason(raised):
    done = apply(TransformEmbedding(block=128), raised("llama-tiny"))
    assert done.record.skips[0].reason == "blocks of 128 do not divide its 64 channels"
