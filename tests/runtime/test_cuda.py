"""The emitted graph on a GPU: its kernels compute what the definitions do, compile as one graph and capture."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from mxfx.formats import parse
from mxfx.graph.node import op_name
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import (
    Annotate,
    FuseNorm,
    InsertFakeQuant,
    QuantizeKvCache,
    RaiseAttention,
    RaiseNorm,
    RaiseRope,
    RoundWeights,
    Rule,
    TransformInputs,
    TransformKv,
)
from mxfx.rewrite import Context, Selector, apply
from mxfx.runtime.causal_lm import emit

pytestmark = pytest.mark.cuda

FORM = parse("mxint8@32/mse")


@pytest.fixture(scope="module")
def program() -> Program:
    """W8 A8 KV8 with data-aware transforms in bfloat16: config D's graph, on a grid fine enough to compare."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    program = trace(tiny("llama-tiny", dtype=torch.bfloat16, head_dim=32, **sizes))
    tokens = torch.randint(3, 128, (8, 32))
    rules = (
        Rule(Selector(r"model\.layers\.\d+\..*proj"), weight=FORM, input=FORM),
        Rule(Selector(r"model\.layers\.\d+\.self_attn"), kv=FORM),
    )
    transforms = (TransformInputs(kind="wush", block=32), TransformKv(kind="wush", block=32))
    quantizers = (RoundWeights(), InsertFakeQuant(), QuantizeKvCache())
    for one in (RaiseNorm(), RaiseRope(), RaiseAttention(), FuseNorm(), Annotate(rule=rules), *transforms, *quantizers):
        program = apply(one, program, Context(tokens=lambda: tokens)).program
    return program


@pytest.fixture(scope="module")
def module(program) -> fx.GraphModule:
    return emit(program, "cuda")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (3, 50), generator=torch.Generator().manual_seed(1))


def _distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.cpu().double() - wanted.cpu().double()).norm() / wanted.double().norm().cpu())


def test_every_quantizer_of_an_activation_has_a_kernel_that_computes_what_it_is_defined_as(program, module, ids):
    kernels = [op_name(n) for n in module.graph.nodes if op_name(n).startswith("mxfx_kernels")]
    per_layer = {"norm_quantize": 2, "silu_mul_quantize": 1, "ready_heads": 1, "transform_quantize": 1}
    for name, count in per_layer.items():
        assert sum(name in kernel for kernel in kernels) == 2 * count, kernels
    assert not [n for n in module.graph.nodes if op_name(n).startswith("mxfx.fake_quantize")]
    with torch.no_grad():
        assert _distance(module(ids.cuda()), emit(program)(ids)) < 0.03


def test_hadamard_transforms_of_whole_rows_have_a_kernel_too(ids):
    torch.manual_seed(0)
    program = trace(tiny("llama-tiny", dtype=torch.bfloat16, hidden_size=192, intermediate_size=256, head_dim=48))
    rule = Rule(Selector(r"model\.layers\.\d+\..*proj"), weight=FORM, input=parse("mxint8@16/mse"))
    passes = (TransformInputs(block=0), Annotate(rule=(rule,)), RoundWeights(), InsertFakeQuant())
    for one in (RaiseNorm(), RaiseRope(), RaiseAttention(), *passes):
        program = apply(one, program).program
    module = emit(program, "cuda")
    assert sum("hadamard_quantize" in op_name(n) for n in module.graph.nodes) == 2 * 4
    with torch.no_grad():
        assert _distance(module(ids.cuda()), emit(program)(ids)) < 0.03


def test_it_compiles_as_one_graph_for_every_shape(module, ids):
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for some in (ids, ids[:2, :37]):
            assert _distance(compiled(some.cuda()), module(some.cuda())) < 0.03


def test_a_captured_run_gives_the_same_bits(module, ids):
    given = ids.cuda()
    with torch.no_grad():
        wanted = module(given)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            module(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(given)
        given.copy_(given.flip(0))
        graph.replay()
        assert torch.equal(captured, module(given))
        assert not torch.equal(captured, wanted)
