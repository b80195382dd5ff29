"""The GPTQ kernel's arithmetic, in Triton's interpreter, on views of larger tensors as the solver passes them."""

from __future__ import annotations

import pytest

from tests.interpreter import IN_INTERPRETER, lines_at_once, numpy_scalars, passes_in_interpreter  # noqa: F401

if not IN_INTERPRETER:

    @pytest.mark.triton
    def test_all_of_this_file_passes_in_the_interpreter() -> None:
        passes_in_interpreter(__file__)

else:
    import torch

    from mxfx.algorithms.block_solver import BlockSolution, searched_exponents, solve_block
    from mxfx.algorithms.gptq_solver import candidate_scales
    from mxfx.algorithms.gptq_triton import solve_block_triton
    from mxfx.formats import parse

    def _views(width: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Columns, feedback and precision of the second block of two."""
        generator = torch.Generator().manual_seed(0)
        n = 2 * width
        mixed = torch.randn(2, n, n, generator=generator) / n**0.5 + 2 * torch.eye(n)
        feedback = mixed.triu() / mixed.diagonal(dim1=1, dim2=2)[:, :, None]
        precision = torch.rand(2, n, generator=generator) + 0.5
        columns = torch.randn(2, n, rows, generator=generator)
        columns[:, :, 0] = 0
        columns *= 2.0 ** torch.arange(rows).sub(rows // 2).mul(3).clamp(-100, 100)
        cut = slice(width, n)
        return columns[:, cut], feedback[:, cut, cut], precision[:, cut]

    @pytest.mark.parametrize(
        ("name", "width", "given"),
        [
            ("mxint4@32", 32, False),
            ("mxfp4_e2m1@20", 20, False),
            ("mxint4@16/ceil", 16, True),
            ("minifloat_e3m4", 40, True),
        ],
    )
    def test_the_kernel_writes_what_the_cpu_path_does(name: str, width: int, given: bool) -> None:
        fmt, rows = parse(name), 37
        columns, feedback, precision = _views(width, rows)
        candidates = candidate_scales(columns, fmt, "sweep") if given else None
        expected = solve_block(columns, candidates, feedback, precision, fmt)
        around = BlockSolution(
            torch.zeros(2, 3 * width, rows),
            torch.zeros(2, 2 * width, rows),
            torch.zeros(2, 3, rows, dtype=torch.int32),
        )
        out = BlockSolution(around.values[:, width : 2 * width], around.residual[:, :width], around.scales[:, 1])
        solve_block_triton(columns, candidates, feedback, precision, fmt.element, out.values, out.residual, out.scales)
        same = expected.scales == out.scales
        # A fused multiply-add may move a value across a rounding boundary once in a while.
        assert same.float().mean() > 0.97
        assert (out.values == expected.values).float().mean() > 0.99
        rest = around.values.clone()
        rest[:, width : 2 * width] = 0
        assert not rest.any() and not around.residual[:, width:].any() and not around.scales[:, [0, 2]].any()

    def test_the_search_is_that_of_the_cpu_path() -> None:
        """One column and one candidate that loses nothing: the first exponent is the one kept."""
        fmt = parse("mxint8@1")
        magnitudes = 2.0 ** torch.arange(-120, 120.0).repeat(2) * torch.tensor([1.0, 1.99]).repeat_interleave(240)
        columns, one = magnitudes[None, None], torch.ones(1, 1, 1)
        allowed = searched_exponents(columns, fmt.element)
        kept = torch.zeros(1, 480, dtype=torch.int32)
        out = BlockSolution(torch.empty_like(columns), torch.empty_like(columns), kept)
        solve_block_triton(columns, None, one, one[0], fmt.element, out.values, out.residual, out.scales)
        expected = solve_block(columns, allowed, one, one[0], fmt)
        assert torch.equal(out.scales, expected.scales)
        assert torch.equal(out.values, expected.values)
