"""Heads of few tokens made ready in one launch, in Triton's interpreter: what the kernels of each step give."""

from __future__ import annotations

import pytest

from tests.interpreter import IN_INTERPRETER, lines_at_once, numpy_scalars, passes_in_interpreter  # noqa: F401

if not IN_INTERPRETER:

    @pytest.mark.triton
    def test_all_of_this_file_passes_in_the_interpreter():
        passes_in_interpreter(__file__)

else:
    import torch
    from torch import Tensor

    from mxfx.algorithms.hadamard import hadamard_matrix
    from mxfx.ops.kernels import cuda, heads_triton
    from mxfx.ops.kernels.transform_triton import transform_triton

    def _apart(x: Tensor, angles: tuple | None, matrix: Tensor | None, format: str | None, signs: bool) -> Tensor:
        x = x if angles is None else cuda.rope(x, *angles)
        x = x if matrix is None else transform_triton(x, matrix, signs)
        return x.contiguous() if format is None else cuda.fake_quantize(x, format, -1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    # The last is of many tokens, whose heads have kernels of their own.
    @pytest.mark.parametrize("sizes", [(1, 1, 4, 2, 64), (3, 2, 4, 1, 32), (2, 1, 2, 2, 128), (2, 9, 4, 2, 64)])
    @pytest.mark.parametrize("matrices", ["none", "own", "signs"])
    def test_each_head_is_what_its_own_kernels_give(sizes, dtype, matrices):
        batch, seq, heads, kv_heads, width = sizes
        generator = torch.Generator().manual_seed(0)
        # As slices of one product lie.
        together = torch.randn(batch, seq, (heads + 2 * kv_heads) * width, generator=generator).to(dtype)
        parts = together.split([heads * width, kv_heads * width, kv_heads * width], -1)
        given = tuple(part.reshape(batch, seq, -1, width).transpose(1, 2) for part in parts)
        angles = tuple(torch.randn(2, batch, seq, width, generator=generator).to(dtype))
        own = (torch.randn(kv_heads, width // 32, 32, 32, generator=generator) / 6).to(dtype)
        shared = hadamard_matrix(32, dtype)
        taken = {
            "none": ([None] * 3, (None, "mxint4@32", "mxint4@32/mse")),
            "own": ([own, own, None], (None, "mxint4@32/mse", "mxint4@16")),
            "signs": ([shared] * 3, ("mxint4@32", "mxfp4_e2m1@32", "mxint8@32")),
        }
        turns, formats = taken[matrices]
        signs = (matrices == "signs",) * 3
        found = heads_triton.ready_heads(*given, *angles, turns, *formats, *signs)
        rest = zip(given, (angles, angles, None), turns, formats, signs, strict=True)
        for got, (x, turned, matrix, format, sign) in zip(found, rest, strict=True):
            wanted = _apart(x, turned, matrix, format, sign)
            assert (got.transpose(1, 2) if got is found[0] else got).is_contiguous() and got.dtype == dtype
            if matrix is None:
                assert torch.equal(got, wanted)
            else:
                # Sums of products in another order; rounding hides the difference, or shows a whole step of the grid.
                close = (got.double() - wanted.double()).abs() <= (2e-6 if dtype == torch.float32 else 4e-3)
                assert close.double().mean() > 0.99

    @pytest.mark.parametrize(
        ("tokens", "width", "format"), [(17, 30, "mxint4@32"), (1, 48, "mxint4@16"), (1, 32, "mxint4@24")]
    )
    def test_what_it_does_not_take_is_left_to_the_kernels_of_each_step(tokens, width, format):
        q, k, v = (torch.randn(1, 2, tokens, width) for _ in range(3))
        angles = (torch.randn(1, tokens, width), torch.randn(1, tokens, width))
        turns = [torch.randn(24, 24) if tokens > 1 else None, None, None]
        given = (q, k, v, *angles, turns, None, format, format, False, False, False)
        assert heads_triton.ready_heads(*given) is NotImplemented

    def test_matrices_that_do_not_fit_the_heads_are_left_to_the_definition():
        """Which says so; the kernel would read beyond them."""
        of = {}
        for matrix in ((2, 1, 32, 32), (3, 1, 32, 32), (2, 2, 32, 32)):
            of[matrix] = heads_triton._head_of((1, 4, 1, 32), torch.float32, matrix, None, False, True)
        assert [head is None for head in of.values()] == [False, True, True]
