"""The GPTQ kernel's arithmetic, in Triton's interpreter, on views of larger tensors as the solver passes them.

The interpreter is chosen when Triton is first imported, so it gets a process of its own, in which this file finds
`TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.triton
    def test_all_of_this_file_passes_in_the_interpreter() -> None:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-3000:]

else:
    import torch
    from triton.runtime import interpreter

    from mxfx.algorithms.block_solver import BlockSolution, searched_exponents, solve_block
    from mxfx.algorithms.gptq import candidate_exponents
    from mxfx.algorithms.gptq_triton import solve_block_triton
    from mxfx.formats import parse

    @pytest.fixture(autouse=True)
    def numpy_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter keeps a scalar as an array of one element, which NumPy 2.5 no longer takes for an index."""
        patched = interpreter._patch_lang_tensor

        def patch(tensor, scope):
            patched(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)

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
        candidates = candidate_exponents(columns, fmt, "sweep") if given else None
        expected = solve_block(columns, candidates, feedback, precision, fmt.element)
        around = BlockSolution(
            torch.zeros(2, 3 * width, rows),
            torch.zeros(2, 2 * width, rows),
            torch.zeros(2, 3, rows, dtype=torch.int32),
        )
        out = BlockSolution(around.values[:, width : 2 * width], around.residual[:, :width], around.exponents[:, 1])
        solve_block_triton(
            columns, candidates, feedback, precision, fmt.element, out.values, out.residual, out.exponents
        )
        same = expected.exponents == out.exponents
        # A fused multiply-add may move a value across a rounding boundary once in a while.
        assert same.float().mean() > 0.97
        assert (out.values == expected.values).float().mean() > 0.99
        rest = around.values.clone()
        rest[:, width : 2 * width] = 0
        assert not rest.any() and not around.residual[:, width:].any() and not around.exponents[:, [0, 2]].any()

    def test_the_search_is_that_of_the_cpu_path() -> None:
        """One column and one candidate that loses nothing: the first exponent is the one kept."""
        element = parse("mxint8@1").element
        magnitudes = 2.0 ** torch.arange(-120, 120.0).repeat(2) * torch.tensor([1.0, 1.99]).repeat_interleave(240)
        columns, one = magnitudes[None, None], torch.ones(1, 1, 1)
        allowed = searched_exponents(columns, element)
        kept = torch.zeros(1, 480, dtype=torch.int32)
        out = BlockSolution(torch.empty_like(columns), torch.empty_like(columns), kept)
        solve_block_triton(columns, None, one, one[0], element, out.values, out.residual, out.exponents)
        expected = solve_block(columns, allowed, one, one[0], element)
        assert torch.equal(out.exponents, expected.exponents)
        assert torch.equal(out.values, expected.values)
