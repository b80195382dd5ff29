"""The ATen program of `fake_quantize` traces, exports and compiles, and computes the same bits."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mxfx.formats import parse
from tests.formats.reference import same_bits

FORMATS = ["mxint4@32/mse", "mxfp4_e2m1@32/even", "mxfp8_e4m3@32/rceil", "minifloat_e3m4"]


class FakeQuantize(torch.nn.Module):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.format = parse(text)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.format.fake_quantize(x)


def activations(batch: int, tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(tokens))
    return (x * torch.logspace(-100, 100, width, 2.0)).to(dtype)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("width", [64, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_export_with_dynamic_batch_and_tokens(text: str, width: int, dtype: torch.dtype) -> None:
    model = FakeQuantize(text)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (activations(2, 7, width, dtype),), dynamic_shapes=(dynamic,))
    for batch, tokens in [(2, 7), (3, 33), (4, 2000)]:
        x = activations(batch, tokens, width, dtype)
        assert same_bits(program.module()(x), model(x))


@pytest.mark.parametrize("text", FORMATS)
def test_symbolic_make_fx_records_functional_aten_only(text: str) -> None:
    traced = make_fx(FakeQuantize(text), tracing_mode="symbolic")(activations(2, 7, 64, torch.bfloat16))
    calls = [node.target for node in traced.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert calls and all(call.namespace == "aten" and not call._schema.is_mutable for call in calls)
    x = activations(5, 9, 64, torch.bfloat16)
    assert same_bits(traced(x), parse(text).fake_quantize(x))


def test_the_program_has_no_data_dependent_size_on_the_meta_device() -> None:
    x = torch.empty(4, 4096, 70, device="meta", dtype=torch.bfloat16)
    y = parse("mxint4@32/mse").fake_quantize(x)
    assert y.device.type == "meta" and y.shape == x.shape and y.dtype == x.dtype


@pytest.mark.thorough
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_graph_compilation_is_bit_equal(text: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    compiled = torch.compile(FakeQuantize(text), fullgraph=True, dynamic=True)
    for tokens in (5, 33):
        x = activations(3, tokens, 64, dtype)
        x[0, 0, :4] = torch.tensor([0.0, -0.0, float("nan"), float("inf")])
        x[0, 1] *= 2.0**-30
        assert same_bits(compiled(x), parse(text).fake_quantize(x))


def test_dynamo_captures_one_whole_graph() -> None:
    compiled = torch.compile(FakeQuantize("mxint4@32/mse"), fullgraph=True, dynamic=True, backend="eager")
    for tokens in (5, 33):
        x = activations(3, tokens, 64, torch.bfloat16)
        assert same_bits(compiled(x), parse("mxint4@32/mse").fake_quantize(x))
