"""Each op of the dialect: schema, fake kernel and derivative hold, and its definition is what the papers write."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import mxfx.ops.fused  # noqa: F401  (registers the fused forms)
from mxfx.algorithms.hadamard import hadamard_matrix
from mxfx.formats import FormatError, parse
from mxfx.formats.stored import store
from mxfx.graph.program import compute_dtype
from mxfx.ops import all_ops, find_op
from mxfx.ops.dialect import define

ops = torch.ops.mxfx


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0))


PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
MATRIX = randn(4, 4, seed=3)
EXPERTS = torch.tensor([[2, 0], [0, 2], [2, 0], [0, 2], [0, 2]])

QKV = (randn(2, 4, 3, 8), randn(2, 2, 3, 8, seed=1), randn(2, 2, 3, 8, seed=2))
ONE = tuple(x[:, :, :1] for x in QKV)
CODES = tuple(torch.zeros(2, 2, 5, size, dtype=torch.uint8) for size in (4, 4, 2, 2))

CONVOLUTION = "transformers.models.qwen3_next.modeling_qwen3_next:causal_conv1d_fn"


#: Op → arguments that show every optional operand given and absent.
def packed(rows: int, width: int, text: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a random matrix on a format's grid."""
    stored = store(parse(text).fake_quantize(randn(rows, width, seed=3)), parse(text))
    assert stored is not None
    return stored


STACKED = tuple(part.unflatten(0, (3, 7)) for part in packed(21, 64, "mxint4@32"))
SAMPLES: dict[str, list[tuple]] = {
    "arange": [(ids(2, 5), 0, 5, 1), (ids(2, 5), 3, 9, 2)],
    "at_slots": [(randn(1, 2, 5, 5), torch.arange(3, 5)), (randn(1, 2, 5, 5), None)],
    "attention": [
        (randn(2, 4, 5, 8), randn(2, 2, 5, 8, seed=1), randn(2, 2, 5, 8, seed=2), PADDED, 0.3, True, None),
        (randn(2, 2, 5, 8), randn(2, 2, 5, 8, seed=1), randn(2, 2, 5, 8, seed=2), None, 0.3, True, 3),
        (randn(2, 2, 5, 8), randn(2, 2, 5, 8, seed=1), randn(2, 2, 5, 8, seed=2), None, 0.3, False, None),
        (randn(2, 2, 5, 8), randn(2, 2, 5, 8, seed=1), randn(2, 2, 5, 6, seed=2), PADDED, 0.3, True, None, 2),
        (randn(2, 2, 5, 8), randn(2, 1, 5, 8, seed=1), randn(2, 1, 5, 8, seed=2), None, 0.3, True, 3, None, 0.5),
        (
            *(randn(2, 2, 5, 8, seed=i) for i in range(3)),
            *(PADDED, 0.3, True, None, None, None, randn(2), randn(1, 2, 5, 5)),
        ),
    ],
    "block_transform": [
        (randn(2, 3, 8), MATRIX),
        (randn(2, 3, 8), randn(2, 4, 4)),
        (randn(2, 6, 3, 8), randn(3, 2, 4, 4)),
    ],
    # Several tokens into a ring, one into packed codes, some without a cache.
    "cached_attention": [
        (*QKV, None, torch.arange(4, 7), randn(2, 2, 5, 8), randn(2, 2, 5, 8), None, None, 0.3, True, 5),
        (*ONE, PADDED, torch.tensor([4]), *CODES, 0.3, True, None, None, None, None, None, "mxint4@4", "mxint4@4"),
        (*QKV, PADDED[:, 2:], None, None, None, None, None, 0.3),
    ],
    "cast": [(randn(3, dtype=torch.bfloat16), "compute"), (randn(3), "compute"), (randn(3), "model")],
    "expert_linear": [
        (randn(5, 6), randn(3, 4, 6, seed=1), EXPERTS, randn(3, 4, seed=2)),
        (randn(5, 2, 6), randn(3, 4, 6, seed=1), EXPERTS),
    ],
    "fake_quantize": [(randn(2, 40), "mxint4@32", -1), (randn(40, 2), "mxfp4_e2m1@32/mse", 0)],
    "first_slots": [(ids(2, 5), PADDED), (ids(2, 5), None)],
    "hadamard": [(randn(2, 8), 4), (randn(2, 24), 12)],
    "hadamard_quantize": [(randn(2, 8), 4, "mxint4@4"), (randn(2, 48), 24, "mxint8@8/mse")],
    "keep_first_quantize": [
        (randn(2, 2, 5, 8), torch.tensor([2, 0]), None, 2, "mxint4@4"),
        (randn(2, 2, 3, 8), torch.tensor([2, 0]), torch.arange(2, 5), 1, "mxint4@4"),
    ],
    "layer_norm": [
        (randn(2, 8), randn(8), randn(8, seed=1), 1e-5),
        (randn(2, 8), None, None, 1e-5),
        (randn(2, 8), randn(8), None, 1e-5, 1.0),
        (randn(2, 8), randn(8), randn(8, seed=1), 1e-5, 1.0, True),
    ],
    "length": [(ids(2, 5),)],
    "mixer": [([randn(2, 6, 5), randn(6, 4, seed=1), None], CONVOLUTION, '[[{"tensor": 0}, {"tensor": 1}, null], {}]')],
    "norm_quantize": [
        (randn(2, 8), randn(8), MATRIX, "mxint4@4", 1e-6, 1.0, True),
        (randn(2, 8), None, None, "mxint4@4", 1e-6),
    ],
    "places": [(ids(2, 5), "queries"), (ids(2, 5), "keys")],
    "position_mask": [(ids(2, 5), PADDED, True, 3, None), (ids(2, 5), None, False, None, 2)],
    "positions": [(ids(2, 5), None, None), (ids(2, 5), None, PADDED), (ids(2, 5), ids(2, 5), PADDED)],
    "real_tokens": [(ids(2, 5), None), (ids(2, 5), PADDED)],
    "rms_norm": [
        (randn(2, 8), randn(8), 1e-6),
        (randn(2, 8), None, 1e-6),
        (randn(2, 8), randn(8), 1e-6, 1.0, True),
    ],
    "rope": [(randn(2, 3, 5, 8), randn(2, 5, 8, seed=1), randn(2, 5, 8, seed=2))],
    "rope_quantize": [(randn(2, 3, 5, 8), randn(2, 5, 8), randn(2, 5, 8), MATRIX, "mxint4@4")],
    "select_tokens": [(randn(2, 5, 8), torch.tensor([1, 4])), (randn(2, 5, 8), None)],
    "silu_mul_quantize": [(randn(2, 8), randn(2, 8, seed=1), MATRIX, "mxint4@4")],
    "transform_quantize": [(randn(2, 8), MATRIX, "mxint4@4"), (randn(2, 8), None, "mxint4@4")],
    "mx_linear": [
        (randn(2, 5, 64), *packed(7, 64, "mxint4@32/mse"), None, "mxint4@32/mse"),
        (randn(3, 50), *packed(4, 50, "mxfp8_e4m3@16"), randn(4, seed=5), "mxfp8_e4m3@16"),
    ],
    "mx_expert_linear": [
        (randn(5, 64), *STACKED, EXPERTS, randn(3, 7, seed=5), "mxint4@32"),
        (randn(5, 2, 64), *STACKED, EXPERTS, None, "mxint4@32"),
    ],
    "mx_embedding": [(*packed(9, 48, "mxfp4_e2m1@32"), torch.tensor([[0, 8], [3, 3]]), "mxfp4_e2m1@32", 48)],
    "mx_decode": [(*packed(9, 48, "mxint6@32"), "mxint6@32", 48)],
}
CASES = [(name, i) for name, samples in SAMPLES.items() for i in range(len(samples))]


def test_every_op_of_the_dialect_has_samples() -> None:
    assert {op.name for op in all_ops().values()} == set(SAMPLES)


def with_gradients(args: tuple) -> tuple:
    return tuple(a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_schema_fake_kernel_and_autograd_registration_hold(name: str, index: int) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(ops, name).default, with_gradients(SAMPLES[name][index]), test_utils=checks)


@pytest.mark.parametrize("name", ["attention", "rms_norm", "fake_quantize"])
def test_forward_and_backward_trace_with_dynamic_shapes(name: str) -> None:
    args = with_gradients(SAMPLES[name][0])
    torch.library.opcheck(getattr(ops, name).default, args, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "index"), CASES)
def test_every_sample_traces_with_dynamic_shapes(name: str, index: int) -> None:
    args = with_gradients(SAMPLES[name][index])
    torch.library.opcheck(getattr(ops, name).default, args, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize(("name", "index"), CASES)
def test_the_op_gives_the_bits_of_its_definition(name: str, index: int) -> None:
    op = find_op(getattr(ops, name).default)
    args = SAMPLES[name][index]
    assert op is not None
    # Each on operands of its own: an op may write them.
    first, second = (tree_map_only(Tensor, torch.clone, args) for _ in range(2))
    assert torch.equal(op.target(*first), op.definition(*second))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize(("name", "index"), CASES)
def test_the_result_shares_no_memory_with_an_operand(name: str, index: int) -> None:
    args = SAMPLES[name][index]
    result = getattr(ops, name)(*args).untyped_storage().data_ptr()
    assert all(a.untyped_storage().data_ptr() != result for a in args if isinstance(a, Tensor))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "rope", "attention", "hadamard", "block_transform"])
def test_the_derivative_is_that_of_the_definition(name: str) -> None:
    for sample in SAMPLES[name]:
        args = [a.double().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in sample]
        assert torch.autograd.gradcheck(getattr(ops, name), args)


def test_a_cast_is_differentiated_as_a_cast() -> None:
    x = randn(5, dtype=torch.bfloat16).requires_grad_()
    ops.cast(x, "compute").backward(torch.arange(5.0))
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad.float(), torch.arange(5.0))


def test_rounding_passes_gradients_straight_through() -> None:
    x = (randn(2, 64) * 100).requires_grad_()
    upstream = randn(2, 64, seed=4)
    ops.fake_quantize(x, "mxint4@32").backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_only_the_gradients_that_are_asked_for_are_computed() -> None:
    x, gain = randn(2, 8).requires_grad_(), randn(8)
    ops.rms_norm(x, gain, 1e-6).sum().backward()
    assert x.grad is not None and gain.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_the_input_is_kept(dtype: torch.dtype) -> None:
    x = randn(2, 8, dtype=dtype)
    assert ops.rms_norm(x, randn(8, dtype=dtype), 1e-6).dtype == dtype
    assert ops.hadamard(x, 4).dtype == dtype
    assert ops.block_transform(x, MATRIX).dtype == dtype
    assert ops.fake_quantize(x, "mxint4@4").dtype == dtype
    assert ops.cast(x, "compute").dtype == compute_dtype(dtype)
    assert ops.cast(x, "model").dtype == torch.bfloat16


def test_rms_norm_is_the_paper_s_in_float64() -> None:
    x, gain = randn(3, 16, dtype=torch.float64), randn(16, dtype=torch.float64, seed=1)
    root = (x.square().sum(-1, keepdim=True) / 16 + 1e-5).sqrt()
    assert torch.allclose(ops.rms_norm(x, gain, 1e-5), gain * x / root, rtol=1e-14)
    assert torch.allclose(ops.rms_norm(x, gain, 1e-5, 1.0, True), (1 + gain) * x / root, rtol=1e-14)
    assert torch.allclose(ops.rms_norm(x, None, 1e-5), x / root, rtol=1e-14)


def test_layer_norm_is_the_paper_s_in_float64_however_it_is_spelled() -> None:
    x, gain, bias = (randn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate([(3, 8), (8,), (8,)]))
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    for spelled in (False, True):
        assert torch.allclose(ops.layer_norm(x, gain, bias, 1e-5, 1.0, spelled), (1 + gain) * normal + bias, rtol=1e-13)
        assert torch.allclose(ops.layer_norm(x, None, None, 1e-5, 0.0, spelled), normal, rtol=1e-13)


def test_rms_norm_squares_in_float32_where_half_precision_overflows() -> None:
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert torch.equal(ops.rms_norm(x, None, 0.0), torch.ones(1, 4, dtype=torch.float16))


def test_where_the_gain_is_applied_decides_the_rounding() -> None:
    x, gain = randn(4, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16, seed=1)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(ops.rms_norm(x, gain, 1e-6), gain * wide.bfloat16())
    assert torch.equal(ops.rms_norm(x, gain, 1e-6, 0.0, True), (gain * wide).bfloat16())
    assert not torch.equal(ops.rms_norm(x, gain, 1e-6), ops.rms_norm(x, gain, 1e-6, 0.0, True))


def test_rope_multiplies_complex_pairs_by_a_phase() -> None:
    x = randn(2, 3, 5, 8, dtype=torch.float64)
    angle = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    both = torch.cat((angle, angle), -1).expand(2, 5, 8)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((pairs.real, pairs.imag), -1)
    assert torch.allclose(ops.rope(x, both.cos(), both.sin()), expected, atol=1e-14)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("mask", [None, PADDED, PADDED.bool()], ids=["unmasked", "int", "bool"])
def test_attention_is_the_softmax_over_what_a_query_may_see(
    causal: bool, window: int | None, mask: Tensor | None
) -> None:
    q, k, v = (randn(2, h, 5, 8, dtype=torch.float64, seed=s) for s, h in enumerate((4, 2, 2)))
    actual = ops.attention(q, k, v, mask, 0.3, causal, window)
    for row in range(2):
        for head in range(4):
            for t in range(5):
                seen = [s for s in range(5) if sees(t, s, causal, window, None if mask is None else mask[row])]
                scores = torch.softmax(0.3 * k[row, head // 2, seen] @ q[row, head, t], 0)
                expected = scores @ v[row, head // 2, seen]
                assert torch.allclose(actual[row, head, t], expected, atol=1e-12)


def sees(query: int, key: int, causal: bool, window: int | None, mask: Tensor | None) -> bool:
    """A padded key is seen by nobody but itself, so that no row is empty."""
    if key == query:
        return True
    near = window is None or query - key < window
    return (not causal or key < query) and near and (mask is None or bool(mask[key]))


def test_padding_makes_no_nan() -> None:
    q, k, v = (randn(1, 1, 3, 4, seed=s) for s in range(3))
    assert ops.attention(q, k, v, torch.tensor([[0, 0, 1]]), 0.5).isfinite().all()


def test_positions_count_real_tokens() -> None:
    assert ops.positions(ids(2, 5), None, None).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert ops.positions(ids(2, 5), None, PADDED).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert torch.equal(ops.positions(ids(2, 5), ids(2, 5) * 7, PADDED), ids(2, 5) * 7)


@pytest.mark.parametrize(
    ("shape", "matrices", "formula"),
    [
        ((2, 3, 8), (4, 4), "...bi,ij->...bj"),
        ((2, 3, 8), (2, 4, 4), "...bi,bij->...bj"),
    ],
)
def test_a_block_transform_multiplies_each_block_by_its_matrix(
    shape: tuple[int, ...], matrices: tuple[int, ...], formula: str
) -> None:
    x, matrix = randn(*shape, dtype=torch.float64), randn(*matrices, dtype=torch.float64, seed=1)
    expected = torch.einsum(formula, x.unflatten(-1, (2, 4)), matrix).flatten(-2)
    assert torch.allclose(ops.block_transform(x, matrix), expected, atol=1e-14)


def test_neighbouring_heads_share_a_matrix() -> None:
    x, matrix = randn(2, 6, 3, 8, dtype=torch.float64), randn(3, 2, 4, 4, dtype=torch.float64, seed=1)
    expected = torch.einsum("xhgtbi,hbij->xhgtbj", x.reshape(2, 3, 2, 3, 2, 4), matrix).reshape(2, 6, 3, 8)
    assert torch.allclose(ops.block_transform(x, matrix), expected, atol=1e-14)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("block", [4, 20, 32, 36, 48, 64])
def test_a_block_that_is_not_finite_keeps_to_itself(block: int, own: bool) -> None:
    x = randn(40, 4 * block, dtype=torch.bfloat16)
    x[5, 3], x[9, block + 1], x[39, -1] = float("nan"), float("inf"), float("-inf")
    matrix = randn(*((4,) if own else ()), block, block, dtype=torch.bfloat16, seed=1)
    out = ops.block_transform(x, matrix).unflatten(-1, (4, block))
    broken = torch.zeros(40, 4, dtype=torch.bool)
    broken[5, 0] = broken[9, 1] = broken[39, 3] = True
    assert torch.equal(~out.isfinite(), broken.unsqueeze(-1).expand_as(out))


@pytest.mark.parametrize("block", [16, 32, 128])
def test_a_product_in_bfloat16_rounds_once(block: int) -> None:
    x, matrix = randn(64, 2 * block, dtype=torch.bfloat16), randn(2, block, block, dtype=torch.bfloat16, seed=1)
    exact = ops.block_transform(x.double(), matrix.double())
    # Half a unit in the last place, and what a sum in float32 adds where much cancels.
    off = (ops.block_transform(x, matrix).double() - exact).abs()
    assert bool((off <= exact.abs() * 2.0**-8 + block * 2.0**-20).all())


@pytest.mark.parametrize("block", [2, 4, 12, 24])
def test_hadamard_is_the_block_transform_by_the_hadamard_matrix(block: int) -> None:
    x = randn(3, 48, dtype=torch.float64)
    matrix = hadamard_matrix(block, torch.float64)
    assert torch.allclose(ops.hadamard(x, block), ops.block_transform(x, matrix), atol=1e-13)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(block)))


def test_an_order_without_a_hadamard_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="3"):
        ops.hadamard(randn(2, 3), 3)


def test_fake_quantize_is_the_format_s() -> None:
    x = randn(3, 40)
    assert torch.equal(ops.fake_quantize(x, "mxint4@32/mse", 0), parse("mxint4@32/mse").fake_quantize(x, 0))
    with pytest.raises(FormatError, match="mxint4@"):
        ops.fake_quantize(x, "mxint4@")


def test_a_cast_to_an_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match="'storage': expected 'compute' or 'model'"):
        ops.cast(randn(2), "storage")


def test_a_definition_is_all_that_an_op_needs() -> None:
    @define("test_double")
    def double(x: Tensor) -> Tensor:
        return 2 * x

    try:
        x = randn(3).requires_grad_()
        out = ops.test_double(x)
        out.sum().backward()
        assert torch.equal(out, 2 * x) and torch.equal(x.grad, torch.full((3,), 2.0))
        assert find_op(ops.test_double.default).definition is double
    finally:
        from mxfx.ops import catalogue

        del catalogue._RECORDS[ops.test_double.default]


def test_an_op_of_another_library_is_no_op_of_the_dialect() -> None:
    assert find_op(torch.ops.aten.add.Tensor) is None
    assert find_op(print) is None


def test_a_result_is_as_contiguous_as_a_trace_is_told() -> None:
    x = randn(2, 5, 3, 8).transpose(1, 2)
    matrices = randn(3, 1, 8, 8)
    for call in (lambda x: ops.hadamard(x, 8), lambda x: ops.block_transform(x, matrices)):
        assert call(x).is_contiguous()
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


@pytest.mark.parametrize(
    ("shape", "matrix", "said"),
    [
        ((2, 5, 64), (4, 8, 8), "4 blocks of 8 do not make up the last axis of (2, 5, 64)"),
        ((2, 5, 60), (8, 8), "blocks of 8 do not divide the last axis"),
        ((2, 5, 64), (2, 8, 8, 8), "2 heads of matrices do not fit (2, 5, 64)"),
        ((2, 3, 5, 64), (2, 8, 8, 8), "2 heads of matrices do not fit"),
        ((2, 5, 64), (8, 4), "expected (block, block)"),
    ],
)
def test_a_matrix_whose_shape_does_not_fit_is_an_error_of_the_op(shape: tuple, matrix: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        ops.block_transform(randn(*shape), randn(*matrix))
    with pytest.raises(ValueError, match=re.escape(said)):
        ops.block_transform(torch.empty(shape, device="meta"), torch.empty(matrix, device="meta"))
