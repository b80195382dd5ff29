"""The kernels' arithmetic, in Triton's interpreter: bit-equal to the reference in every format and rule."""

from __future__ import annotations

import itertools

import pytest

from tests.interpreter import IN_INTERPRETER, lines_at_once, numpy_scalars, passes_in_interpreter  # noqa: F401

ELEMENTS = ("mxint2", "mxint4", "mxint8", "mxfp4_e2m1", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2")
RULES = ("floor", "rceil", "even", "ceil", "mse")

if not IN_INTERPRETER:

    @pytest.mark.triton
    def test_all_of_this_file_passes_in_the_interpreter():
        passes_in_interpreter(__file__)

else:
    import torch

    from mxfx.algorithms import launch
    from mxfx.algorithms.hadamard import hadamard_matrix, kronecker_orders
    from mxfx.formats import parse
    from mxfx.ops import block_transform, fused, hadamard, rope
    from mxfx.ops.kernels import cuda, limits
    from mxfx.ops.kernels.divergence_triton import divergence_triton
    from mxfx.ops.kernels.quantize_triton import fake_quantize_triton
    from mxfx.ops.kernels.transform_triton import transform_triton

    def _equal(got: torch.Tensor, wanted: torch.Tensor) -> bool:
        same = (got == wanted) & (torch.signbit(got) == torch.signbit(wanted)) | got.isnan() & wanted.isnan()
        return got.dtype == wanted.dtype and got.shape == wanted.shape and bool(same.all())

    def _wild(dtype: torch.dtype) -> torch.Tensor:
        """Random bit patterns, blocks of ordinary numbers, ties, and blocks with NaN and Inf."""
        generator = torch.Generator().manual_seed(4)
        bits = torch.randint(-(2**15), 2**15, (256, 2), generator=generator).to(torch.int16)
        patterns = (
            bits.view(torch.float32).view(8, 32).to(dtype) if dtype == torch.float32 else bits.view(dtype).view(-1, 32)
        )
        # The interpreter misreads bfloat16 subnormals; tools/bench/gpu_check.py tries all of them on a GPU.
        lowest = -100 if dtype == torch.bfloat16 else -145
        scales = torch.exp2(torch.randint(lowest, 118, (24, 1), generator=generator).float())
        plain = torch.randn(24, 32, generator=generator)
        ties = torch.randint(-32, 33, (24, 32), generator=generator).float() / 8
        broken = torch.randn(3, 32, generator=generator)
        broken[0, 3], broken[1, 31], broken[2, 0] = float("nan"), float("inf"), -float("inf")
        return torch.cat((patterns, *(t.to(dtype) for t in (plain, plain * scales, ties, broken))))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("element", ELEMENTS)
    def test_quantization_is_bit_equal_to_the_reference(element, dtype):
        x = _wild(dtype)
        # Numbers are widened as they are read: rules, and what fills up a block of 20, are the same in every dtype.
        wide, brain = dtype == torch.float32, dtype == torch.bfloat16
        rules = RULES if wide else ("floor", "ceil", "mse") if brain else ("rceil", "even", "mse")
        for rule, block in itertools.product(rules, (32, 20) if wide else (32,)):
            fmt = parse(f"{element}@{block}/{rule}")
            assert _equal(fake_quantize_triton(x, fmt), fmt.fake_quantize(x)), str(fmt)

    @pytest.mark.parametrize("columns", [11, 4096, 5000])
    def test_divergence_of_rows_and_its_gradient(columns):
        actual, expected = 8 * torch.randn(3, columns), 8 * torch.randn(3, columns)
        expected[:, 5] = -float("inf")
        found, gradient = divergence_triton(actual, expected)
        wide = actual.double().requires_grad_()
        log_a, log_e = wide.log_softmax(-1), expected.double().log_softmax(-1)
        wanted = torch.where(log_e.exp() > 0, log_e.exp() * (log_e - log_a), 0.0).sum(-1)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        (of_mean,) = torch.autograd.grad(wanted.mean(), wide)
        torch.testing.assert_close(gradient.double(), of_mean, rtol=1e-4, atol=1e-7)

    def test_any_strides_give_the_reference_contiguous():
        fmt, base = parse("mxint4@32/mse"), torch.randn(3, 5, 4, 64)
        for x in (
            base.transpose(1, 2),
            base[..., 3:38],
            base[:, ::2],
            base.permute(3, 0, 1, 2),
            base[:0],
            base[..., ::2],
        ):
            got = fake_quantize_triton(x, fmt)
            assert got.is_contiguous() and _equal(got, fmt.fake_quantize(x))

    @pytest.mark.parametrize(("block", "text"), [(32, "mxint8@32/mse"), (64, "mxint8@16"), (36, "mxint8@36")])
    def test_transforms_round_like_their_definitions(block, text):
        """int8 codes of a float32 product: summed in another order, a code flips about once in 10⁵."""
        fmt, x, gate = parse(text), torch.randn(6, 4 * block), torch.randn(6, 4 * block)
        shared, own = hadamard_matrix(block), torch.randn(4, block, block) / block**0.5
        close = lambda got, wanted: torch.testing.assert_close(got, wanted, rtol=0, atol=0.2)  # noqa: E731
        close(transform_triton(x, shared, True, fmt), fused.transform_quantize(x, shared, text))
        close(transform_triton(x, own, False, fmt), fused.transform_quantize(x, own, text))
        close(transform_triton(x, own, False, fmt, gate=gate), fused.silu_mul_quantize(gate, x, own, text))
        weight = torch.rand(4 * block)
        for matrix, signs in ((shared, True), (own, False)):
            close(
                cuda.norm_quantize(x, weight, matrix, text, 1e-5, 1.0, True, signs),
                fused.norm_quantize(x, weight, matrix, text, 1e-5, 1.0, True),
            )
        close(cuda.norm_quantize(x, None, own, text, 1e-5), fused.norm_quantize(x, None, own, text, 1e-5))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_matrix_of_the_inputs_dtype_is_used_as_it_is(dtype):
        x, own = torch.randn(6, 128).to(dtype), (torch.randn(4, 32, 32) / 6).to(dtype)
        torch.testing.assert_close(transform_triton(x, own), block_transform(x, own), rtol=2e-3, atol=2e-3)

    @pytest.mark.parametrize("block", [16, 32, 64])
    @pytest.mark.parametrize("text", [None, "mxint8@16"])
    def test_a_matrix_for_each_head(block, text):
        x = torch.randn(2, 9, 6, 64).transpose(1, 2)
        matrix = torch.randn(3, 64 // block, block, block) / block**0.5
        wanted = block_transform(x, matrix) if text is None else fused.transform_quantize(x, matrix, text)
        for strided in (x, x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3)):
            got = transform_triton(strided, matrix, False, text and parse(text))
            assert got.is_contiguous()
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4 if text is None else 0.2)

    @pytest.mark.parametrize(("width", "order"), [(192, 192), (480, 240), (256, 256), (576, 576)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_hadamard_transform_of_high_order(width, order, dtype):
        x = torch.randn(3, width).to(dtype)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(cuda.hadamard(x, order), hadamard(x, order), **tolerance)
        text = f"mxint8@{min(32, kronecker_orders(order)[1])}/mse"
        if limits.takes_kronecker(x, order, parse(text)):
            got, wanted = cuda.hadamard_quantize(x, order, text), fused.hadamard_quantize(x, order, text)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0.1)
            assert (got != wanted).float().mean() < 0.01

    def test_a_block_that_is_not_finite_leaves_its_neighbours_alone():
        x, cos = torch.randn(2, 4, 5, 64), torch.randn(2, 5, 64)
        for value in (float("nan"), float("inf")):
            x[0, 1, 2, 3] = value
            for shape in ((2, 32, 32), (4, 16, 16), (2, 2, 32, 32), (32, 32)):
                matrix = torch.randn(shape) / 5
                got, wanted = transform_triton(x, matrix), block_transform(x, matrix)
                assert torch.equal(got.isfinite(), wanted.isfinite())
                finite = wanted.isfinite()
                torch.testing.assert_close(got[finite], wanted[finite], rtol=1e-5, atol=1e-4)
                text = f"mxint8@{shape[-1]}"
                got = cuda.rope_quantize(x, cos, cos, matrix, text)
                assert torch.equal(got.isnan(), fused.rope_quantize(x, cos, cos, matrix, text).isnan())

    def test_a_launch_compiles_once_for_every_dtype(monkeypatch):
        """A kernel compiled for one dtype would read another's memory as if it were its own."""
        prepared = []
        monkeypatch.setattr(launch.Launch, "_prepare", lambda self, tensors: prepared.append(tensors) or print)
        bound = launch.Launch(None, lambda at_a_time: 1, (), {})
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            bound(torch.zeros(4, dtype=dtype), torch.zeros(4))
        assert [tensors[0].dtype for tensors in prepared] == [torch.float32, torch.bfloat16]

    @pytest.mark.parametrize(("width", "matrix"), [(64, (32, 32)), (64, (64, 64)), (64, None), (128, (64, 64))])
    def test_rope_rounds_like_its_definition(width, matrix):
        _check_rope(width, None if matrix is None else hadamard_matrix(matrix[-1]), True)

    @pytest.mark.parametrize(("width", "shape"), [(64, (3, 2, 32, 32)), (96, (3, 3, 32, 32)), (40, (1, 2, 20, 20))])
    def test_rope_with_a_matrix_for_each_head(width, shape):
        _check_rope(width, torch.randn(shape) / 5, False)

    def _check_rope(width: int, matrix: torch.Tensor | None, signs: bool) -> None:
        x = torch.randn(2, 9, 3, width).transpose(1, 2)
        cos, sin = torch.randn(2, 2, 9, width)
        text = "mxint8@20" if width == 40 else "mxint8@32"
        got = cuda.rope_quantize(x, cos, sin, matrix, text, signs)
        wanted = fused.rope_quantize(x, cos, sin, matrix, text)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.2)

    @pytest.mark.parametrize(("heads", "shape"), [(1, None), (1, (1, 2, 32, 32)), (3, (3, 2, 32, 32)), (2, (32, 32))])
    def test_rope_of_one_contiguous_sequence(heads, shape):
        """Where every row begins at the end of the one before it, which head and position it is still counts."""
        x, (cos, sin) = torch.randn(1, heads, 9, 64), torch.randn(2, 1, 9, 64)
        matrix = None if shape is None else torch.randn(shape) / 5
        got = cuda.rope_quantize(x, cos, sin, matrix, "mxint8@32")
        torch.testing.assert_close(got, fused.rope_quantize(x, cos, sin, matrix, "mxint8@32"), rtol=0, atol=0.2)
        if shape is not None:
            torch.testing.assert_close(transform_triton(x, matrix), block_transform(x, matrix), rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("rows", [256, 300])
    def test_a_program_walks_down_whole_and_ragged_columns(rows):
        x, gate, own = torch.randn(rows, 64), torch.randn(rows, 64), torch.randn(2, 32, 32) / 5
        torch.testing.assert_close(transform_triton(x, own), block_transform(x, own), rtol=1e-5, atol=1e-4)
        strided = torch.randn(rows, 96)[:, :64]
        torch.testing.assert_close(transform_triton(strided, own), block_transform(strided, own), rtol=1e-5, atol=1e-4)
        got = transform_triton(x, own, False, parse("mxint8@32"), gate=gate)
        wanted = fused.silu_mul_quantize(gate, x, own, "mxint8@32")
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_rope_alone_is_bit_equal(dtype):
        x = torch.randn(2, 9, 3, 80).to(dtype).transpose(1, 2)
        cos, sin = torch.randn(2, 1, 9, 80).to(dtype)
        assert _equal(cuda.rope(x, cos, sin), rope(x, cos, sin))
