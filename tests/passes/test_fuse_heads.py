"""``fuse-heads``: one op makes queries, keys and values ready, and the logits keep their bits."""

from __future__ import annotations

import pytest
import torch

from mxfx.config import EmitConfig
from mxfx.formats import parse
from mxfx.graph.text import parse as read
from mxfx.graph.text import to_text
from mxfx.graph.verify import verify
from mxfx.ops.kernels import heads
from mxfx.passes import FuseHeads
from mxfx.pipeline.emit import emitted
from mxfx.rewrite import apply
from mxfx.runtime.causal_lm import build
from tests.programs import config_a, padded_batch, passed, raised


@pytest.mark.parametrize("family", ["llama-tiny", "qwen2-tiny"])
def test_the_logits_keep_their_bits(family: str) -> None:
    quantized = passed(raised(family), config_a(parse("mxint4@16"), parse("mxint4@16"), kv=parse("mxint4@16")))
    program = emitted(quantized.twin(torch.bfloat16), "cpu", EmitConfig(device="cuda"))
    calls = [node for node in program.graph.nodes if node.target is heads.READY]
    assert len(calls) == 2
    verify(program)
    plain = emitted(quantized.twin(torch.bfloat16), "cpu", EmitConfig(packed=False))
    assert not any(node.target is heads.READY for node in plain.graph.nodes)
    ids, mask, positions = padded_batch()
    with torch.no_grad():
        found = build(program)(ids, positions, mask)
        assert torch.equal(build(read(to_text(program), program.weights))(ids, positions, mask), found)
        assert not apply(FuseHeads(), program).record.matches
        torch.testing.assert_close(found, build(plain)(ids, positions, mask), rtol=0.05, atol=0.05)


def test_an_attention_that_reads_the_keys_of_an_earlier_one_stays() -> None:
    """It ended in a KeyError: its keys were nodes that the pass had just made."""
    shared = raised("llama-tiny").copy()
    first, second = shared.nodes("attention")
    for place in (1, 2):
        second.update_arg(place, first.args[place])
    shared.graph.eliminate_dead_code()
    fmt = parse("mxint4@16")
    quantized = passed(shared, config_a(fmt, fmt, kv=fmt)).twin(torch.bfloat16)
    program = emitted(quantized, "cpu", EmitConfig(device="cuda"))
    verify(program)
    assert len([node for node in program.graph.nodes if node.target is heads.READY]) == 1
    plain = emitted(quantized, "cpu", EmitConfig(packed=False))
    ids, mask, positions = padded_batch()
    with torch.no_grad():
        found, expected = (build(each)(ids, positions, mask) for each in (program, plain))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
