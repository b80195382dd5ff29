"""What a pipeline emits runs, whatever strides the source's values have: nothing in a program depends on them."""

from __future__ import annotations

import pytest
import torch
import transformers as T

import mxfx
from mxfx.config import loads
from mxfx.graph.tiny import tiny

TRANSFORM = '[[pass]]\nname="transform-kv"\nblock=8\n'
INSERT = '[[pass]]\nname="insert-fake-quant"\n'
QUANTIZE = INSERT + '[[pass]]\nname="quantize-kv-cache"\n'
ONLINE = '[[pass]]\nname="online-rotation"\nsites=["kv_cache"]\nblock=8\n'


def annotated(**formats: str) -> str:
    rule = '[[pass]]\nname="annotate"\n[[pass.rule]]\nmatch=".*self_attn"\n'
    return rule + "".join(f'{operand}="{fmt}"\n' for operand, fmt in formats.items())


def fused_queries() -> torch.nn.Module:
    return T.AutoModelForCausalLM.from_config(T.GPTBigCodeConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=131)).eval()


@pytest.mark.parametrize(
    ("text", "make", "quantizers"),
    [
        # Keys and values of two layers, and the cosines and sines that all layers share.
        (annotated(rope="mxint4@8/mse", kv="mxint4@8/mse") + TRANSFORM + 'kind="wush"\n' + QUANTIZE, tiny, 6),
        # They are rounded between a rotation and its inverse: none is left for quantize-kv-cache.
        (annotated(kv="mxint8@5") + ONLINE + INSERT, tiny, 4),
        (TRANSFORM, lambda name: fused_queries(), 0),
    ],
    ids=["solved transform before a quantizer", "ragged blocks", "fused queries"],
)
def test_an_emitted_model_runs(text: str, make, quantizers: int) -> None:
    tokens = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    graph = mxfx.compile(make("llama-tiny"), loads(text), tokens=tokens, instruments=())
    assert len(list(graph.program.nodes("fake_quantize"))) == quantizers
    assert graph(tokens[:2, :16]).isfinite().all()
