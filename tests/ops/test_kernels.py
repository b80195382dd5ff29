"""The kernels as ops: on a CPU they run the definition, in a graph they are one node, elsewhere they say no."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mxfx.algorithms.hadamard import hadamard_matrix
from mxfx.algorithms.hadamard import hadamard_transform as hadamard_transform_by_definition
from mxfx.formats import parse
from mxfx.ops import block_transform, define, fused
from mxfx.ops.kernels import limits, takes
from mxfx.ops.kernels.addressing import as_rows, is_walkable
from mxfx.ops.kernels.fast_hadamard import by_package
from mxfx.ops.kernels.library import load_cuda
from mxfx.ops.providers import _PROVIDERS, choose

ops = torch.ops.mxfx_kernels


def test_every_kernel_provides_the_dialect_op_of_its_name():
    assert load_cuda() in (None, "triton is not installed here")
    ours = [
        p for p in _PROVIDERS if p.device == "cuda" and str(p.target).startswith("mxfx_kernels") and p.name != "packed"
    ]
    assert len(ours) == (10 if limits.has_triton() else 1)
    for provider in ours:
        own = provider.name == f"triton-{provider.op.replace('_', '-')}"
        assert str(provider.target) == f"mxfx_kernels.{provider.op if own else 'fast_hadamard'}.default"


def test_a_kernel_runs_for_what_it_takes_and_its_definition_for_the_rest():
    def few(x: torch.Tensor) -> str | None:
        return None if x.numel() < 4 else f"{x.numel()} elements are too many"

    from mxfx.ops import catalogue
    from mxfx.ops.kernels import kernel

    try:

        @define("test_negate")
        def negate(x: torch.Tensor) -> torch.Tensor:
            return -x

        @kernel("test_negate", "cpu", takes=few)
        def zeros(x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

        assert torch.equal(ops.test_negate(torch.ones(3)), torch.zeros(3))
        assert torch.equal(ops.test_negate(torch.ones(4)), -torch.ones(4))
        graph = torch.fx.Graph()
        node = graph.call_function(torch.ops.mxfx.test_negate.default, (graph.placeholder("x"),))
        node.args[0].meta["val"] = torch.ones(5, device="meta")
        assert str(choose("test_negate", node, torch.device("cpu"))) == "definition: zeros: 5 elements are too many"
        assert str(choose("test_negate", node, torch.device("cuda"))).startswith("definition: ")
        node.args[0].meta["val"] = torch.ones(2, device="meta")
        assert choose("test_negate", node, torch.device("cpu")).provider.name == "zeros"
    finally:
        del catalogue._RECORDS[torch.ops.mxfx.test_negate.default]
        _PROVIDERS.pop()


def test_a_kernel_for_no_op_is_refused():
    from mxfx.ops.kernels import kernel

    with pytest.raises(ValueError, match="the dialect has no op 'nothing'"):
        kernel("nothing", "cpu")(lambda x: x)


def test_a_matrix_that_does_not_fit_is_taken_by_no_kernel():
    """So it meets the definition, which refuses it, instead of memory behind the matrices."""
    x, matrix = torch.empty(2, 5, 64), torch.empty(4, 8, 8)
    for reason in (takes.block_transform(x, matrix), takes.transform_quantize(x, matrix, "mxint4@8")):
        assert reason == "4 blocks of 8 do not make up the last axis of (2, 5, 64)"


@pytest.mark.parametrize("text", ["mxint4@32/mse", "mxfp4_e2m1@20", "minifloat_e4m3"])
def test_on_a_cpu_the_op_is_the_reference_and_contiguous(text):
    x = torch.randn(3, 4, 40).transpose(0, 1)
    got = ops.fake_quantize(x, text, -1)
    assert got.is_contiguous()
    assert torch.equal(got, parse(text).fake_quantize(x))


def test_on_a_cpu_a_fused_op_is_its_definition():
    x, gate, matrix = torch.randn(5, 64), torch.randn(5, 64), hadamard_matrix(32)
    assert torch.equal(
        ops.silu_mul_quantize(gate, x, matrix, "mxint4@32", True),
        fused.silu_mul_quantize(gate, x, matrix, "mxint4@32", True),
    )
    assert torch.equal(
        ops.norm_quantize(x, gate[0], None, "mxint4@32", 1e-5), fused.norm_quantize(x, gate[0], None, "mxint4@32", 1e-5)
    )


def test_compiles_as_one_graph_with_dynamic_shapes():
    matrix = hadamard_matrix(16)

    def chain(x: torch.Tensor) -> torch.Tensor:
        return ops.transform_quantize(ops.fake_quantize(x, "mxint8@16", -1), matrix, "mxint4@16", True)

    compiled = torch.compile(chain, fullgraph=True, dynamic=True, backend="eager")
    for length in (3, 5):
        x = torch.randn(length, 32)
        assert torch.equal(compiled(x), chain(x))


def test_gradient_of_quantization_is_straight_through():
    x = torch.randn(2, 32, requires_grad=True)
    ops.fake_quantize(x, "mxint4@32", -1).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("shape", "matrices"),
    [((3, 5, 64), (32, 32)), ((3, 5, 64), (2, 32, 32)), ((2, 4, 5, 64), (2, 2, 32, 32))],
)
def test_gradient_of_a_block_transform_is_its_definitions(shape, matrices):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(matrices, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, dtype=torch.float64)
    wanted = torch.autograd.grad(block_transform(x, matrix), (x, matrix), grad)
    got = torch.autograd.grad(ops.block_transform(x, matrix), (x, matrix), grad)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(32, 32), (4, 32, 32), (3, 4, 32, 32)])
def test_a_matrix_in_bfloat16_loses_nothing_to_one_in_float32(shape):
    """Products are exact and sums are float32 in both; a sum in another order moves a result by one rounding."""
    x, matrix = torch.randn(2, 6, 50, 128).bfloat16(), (torch.randn(shape) / 6).bfloat16()
    got, wanted = block_transform(x, matrix), block_transform(x, matrix.float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-5)
    assert (got != wanted).float().mean() < 1e-3


def test_gradient_of_rope():
    x, angle = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 1, 5, 8, dtype=torch.float64)
    operands = [t.requires_grad_() for t in (x, *angle)]
    assert torch.autograd.gradcheck(ops.rope, operands)


@pytest.mark.parametrize("order", [12, 32, 192])
def test_gradient_of_a_hadamard_transform(order):
    x = torch.randn(3, 2 * order if order > 96 else 96, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.hadamard(x, order), x)


@pytest.mark.parametrize(
    ("width", "block", "text", "served"),
    [
        (128, 32, "mxint4@32", True),
        (128, 64, "mxint4@32", True),
        (144, 36, "mxint4@36", True),
        (144, 36, "mxint4@12", False),  # three blocks of 12 do not tile a power of two
        (128, 32, "mxint4@64", False),  # a block of the format would span two of the transform
        (100, 32, "mxint4@32", False),  # a ragged last block has no transform
        (512, 256, "mxint4@32", False),
        (128, 32, "minifloat_e4m3", False),
    ],
)
def test_which_transforms_fuse_with_which_formats(width, block, text, served):
    assert limits.takes_transform(torch.empty(5, width), torch.empty(block, block), parse(text)) is served


@pytest.mark.parametrize(
    ("width", "order", "text", "served"),
    [
        (256, 128, None, False),  # one product does
        (576, 576, None, True),
        (8192, 8192, "mxint4@32", True),
        (1024, 512, "mxint4@64", False),  # factors of 16 and 32: a block would span two rows
        (1024, 512, "mxint4@32", True),
        (560, 560, "mxint4@16", False),  # 20 and 28
        (11008, 11008, None, False),  # a factor of 344
        (1000, 512, None, False),
    ],
)
def test_which_hadamard_transforms_of_high_order_a_kernel_takes(width, order, text, served):
    assert limits.takes_kronecker(torch.empty(2, width), order, text and parse(text)) is served


def test_a_matrix_for_each_head_fits_a_tensor_of_heads_only():
    matrix = torch.empty(2, 2, 32, 32)
    assert limits.takes_transform(torch.empty(3, 4, 5, 64), matrix, None)
    assert not limits.takes_transform(torch.empty(3, 5, 64), matrix, None)


def test_the_package_for_hadamard_transforms_serves_what_no_kernel_does(monkeypatch):
    """It is asked for Sylvester's matrix of ±1, of a contiguous row of powers of two, and a scale."""

    def hadamard_transform(x: torch.Tensor, scale: float) -> torch.Tensor:
        order = x.shape[-1]
        assert x.is_contiguous() and order & (order - 1) == 0
        return (x.double() @ hadamard_matrix(order, torch.float64) * order**0.5 * scale).to(x.dtype)

    package = ModuleType("fast_hadamard_transform")
    package.hadamard_transform = hadamard_transform
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", package)
    monkeypatch.setattr(limits, "has_fast_hadamard", lambda: True)
    monkeypatch.setattr(limits, "has_triton", lambda: True)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    found = {}
    for order in (64, 8192, 32768, 11008):
        node = graph.call_function(torch.ops.mxfx.hadamard.default, (x, order))
        x.meta["val"] = node.meta["val"] = torch.empty(2, order, dtype=torch.bfloat16, device="meta")
        provider = choose("hadamard", node, torch.device("cuda")).provider
        found[order] = provider and provider.name
    assert found == {64: "triton-hadamard", 8192: "triton-hadamard", 32768: "fast-hadamard-transform", 11008: None}
    value = torch.randn(3, 1024).transpose(0, 1).contiguous().transpose(0, 1)
    wanted = hadamard_transform_by_definition(value, 512)
    torch.testing.assert_close(by_package(value, 512), wanted, rtol=1e-5, atol=1e-5)
    assert "not torch.float64" in takes.fast_hadamard(value.double(), 512)
    assert torch.equal(ops.fast_hadamard(value, 512), wanted)  # on a CPU the definition


def test_an_element_as_wide_as_float32_stays_with_the_definition():
    assert not limits.takes_format(parse("minifloat_e8m3"))


def test_rows_describe_every_view_that_three_strides_can():
    base = torch.arange(3 * 5 * 4 * 8, dtype=torch.float32).view(3, 5, 4, 8)
    views = (base, base.transpose(1, 2), base[:, ::2], base[..., 2:6], base.permute(2, 0, 1, 3), base[0, 0, 0])
    for view in views:
        assert is_walkable(view)
        rows = as_rows(view.shape, view.stride())
        size1, size2, *strides = rows.arguments
        number = torch.arange(rows.count)
        index = torch.stack((number // size2 // size1, number // size2 % size1, number % size2), -1)
        start = (index * torch.tensor(strides)).sum(-1)
        flat = torch.as_strided(view, (base.numel(),), (1,), 0)
        at = view.storage_offset() + start[:, None] + torch.arange(rows.length)
        assert torch.equal(flat[at], view.reshape(-1, view.shape[-1]))


def test_a_view_is_copied_only_where_rows_do_not_describe_it():
    base = torch.randn(2, 6, 4, 64)
    assert is_walkable(base.transpose(1, 2))
    assert not is_walkable(base[..., ::2])
    assert not is_walkable(base.view(2, 3, 2, 4, 64).permute(3, 1, 0, 2, 4)[:, :, :, :1].expand(4, 3, 2, 2, 64))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_dispatcher_finds_a_well_behaved_op(requires_grad):
    x = torch.randn(4, 64)
    torch.library.opcheck(ops.fake_quantize.default, (x.clone().requires_grad_(requires_grad), "mxint4@32/mse", -1))
    torch.library.opcheck(ops.transform_quantize.default, (x, hadamard_matrix(32), "mxint4@32/mse", True))


def test_an_op_without_a_derivative_says_where_to_find_one():
    x = torch.randn(4, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"differentiate mxfx::transform_quantize, before `lower`"):
        ops.transform_quantize(x, None, "mxint4@32").sum().backward()


@dataclass(frozen=True)
class Compiled:
    """What Triton's compiler answers, as far as `within` reads it: 1000 bytes a stage."""

    metadata: SimpleNamespace

    @classmethod
    def of(cls, constants: dict[str, object]) -> Compiled:
        return cls(SimpleNamespace(shared=1000 * constants.get("STAGES", 1)))


@pytest.mark.triton
@pytest.mark.parametrize(
    ("limit", "constants", "left", "shared"),
    [
        (9999, {"STAGES": 3}, 3, 3000),
        (2500, {"STAGES": 3}, 2, 2000),
        (10, {"STAGES": 3}, 1, 1000),
        (10, {}, None, 1000),
    ],
)
def test_a_kernel_takes_as_many_stages_as_shared_memory_allows(limit, constants, left, shared):
    from mxfx.algorithms import launch

    compiled, kept = launch.within(limit, Compiled.of, {**constants, "TILE": 8})
    assert (kept.get("STAGES"), kept["TILE"], compiled.metadata.shared) == (left, 8, shared)
    assert constants.get("STAGES") in (3, None)


@pytest.mark.triton
def test_too_little_shared_memory_means_the_definition_and_a_warning(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from mxfx.ops.kernels import cuda

    def refuses(*args, **kwargs):
        raise OutOfResources(327680, 232448, "shared memory")

    monkeypatch.setattr(cuda, "transform_triton", refuses)
    with pytest.warns(RuntimeWarning, match=r"mxfx_kernels::block_transform .* 232448 bytes .* needs 327680"):
        assert cuda.block_transform(torch.ones(2, 16), hadamard_matrix(16)) is NotImplemented


def test_a_trace_is_told_the_dtype_to_which_operands_promote():
    narrow, wide = torch.randn(3, 32, dtype=torch.bfloat16), torch.randn(3, 32)
    for args in ((narrow, wide, None, "mxint4@32"), (wide, narrow, None, "mxint4@32")):
        torch.library.opcheck(ops.silu_mul_quantize.default, args, test_utils="test_faketensor")
    torch.library.opcheck(
        ops.norm_quantize.default, (narrow, wide[0], None, "mxint4@32", 1e-5), test_utils="test_faketensor"
    )
    torch.library.opcheck(ops.block_transform.default, (narrow, torch.eye(16)), test_utils="test_faketensor")


def test_angles_that_the_definition_broadcasts_otherwise_are_no_kernel_s():
    x, whole = torch.randn(2, 3, 5, 64), torch.randn(2, 5, 64)
    assert limits.takes_rope(x, whole, whole) and limits.takes_rope(x, whole[:1], whole[:1])
    for cos, sin in (
        (whole[:1, :1], whole[:1, :1]),
        (whole[:, :1], whole[:, :1]),
        (whole, whole[:1]),
        (whole[:1], whole),
        (whole, whole.double()),
        (whole[..., :32], whole[..., :32]),
    ):
        assert not limits.takes_rope(x, cos, sin)
