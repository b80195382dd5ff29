"""Kernels of a step of decoding compile for Hopper, without one: what the interpreter takes and a compiler may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxfx.algorithms.launch import Launch
from mxfx.formats import parse
from mxfx.ops.kernels import cache_triton, heads_triton, integer_triton, norm_triton, transform_triton
from mxfx.ops.kernels.cache_rows_triton import row_of

pytestmark = pytest.mark.triton
HOPPER = GPUTarget("cuda", 90, 32)
FORMAT = parse("mxint4@32/mse")
BF16, CPU = torch.bfloat16, torch.device("cpu")


def compiled(kernel: Any, kinds: Sequence[str], scalars: Sequence[object], constants: Mapping, options: Mapping) -> Any:
    """A kernel for pointers to `kinds`, then scalars, all pointers aligned to 16 bytes."""
    names = kernel.arg_names
    given = [*kinds, *("fp32" if isinstance(value, float) else "i32" for value in scalars)]
    signature = dict(zip(names, given, strict=False)) | dict.fromkeys(constants, "constexpr")
    at = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(kinds))}
    return triton.compile(ASTSource(kernel, signature, at, aligned), target=HOPPER, options=dict(options))


def launch(made: Launch, kinds: Sequence[str]) -> Any:
    return compiled(made._kernel, kinds, made._with_turns(1), made._constants, made._options)


@pytest.mark.parametrize("rows", [1, 6])
def test_products_in_integers(rows: int) -> None:
    sizes = (2048, 512, 512)
    tiling = integer_triton.tiling_for(rows, sum(sizes), 64)
    made = integer_triton._launch(rows, 2048, sizes, sum(sizes), 0, BF16, CPU, True, True, FORMAT, tiling)
    found = launch(made, ["*i32", "*u8", *["*i32"] * 3, *["*u8"] * 3, *["*bf16"] * 5])
    assert "dp4a.s32.s32" in found.asm["ptx"]
    # Weights go from memory to the threads that multiply them: shared memory holds no more than sums.
    assert found.metadata.shared <= 256


@pytest.mark.parametrize("before", ["none", "silu", "scale"])
@pytest.mark.parametrize("own", [False, True])
def test_quantizers_that_write_integers(before: str, own: bool) -> None:
    if before == "scale" and not own:
        made = norm_triton._launch((1, 1, 2048), (2048, 2048, 1), BF16, CPU, 32, 0, False, "last", 0.0, 1e-5, FORMAT)
        launch(made, [*["*bf16"] * 3, "*i8", "*u8", "*i64"])
        return
    matrix, eps = (64, 32, 32) if own else None, 1e-5 if before == "scale" else None
    made = transform_triton._launch(
        *((1, 1, 2048), (4096, 4096, 1), BF16, CPU, matrix, int(own), False, FORMAT, before, False, 0.0, eps, True)
    )
    launch(made, [*["*bf16"] * 4, "*i8", "*u8", "*i64"])


@pytest.mark.parametrize("width", [64, 128])
def test_heads_of_a_step(width: int) -> None:
    matrix, text = (8, width // 32, 32, 32), str(FORMAT)
    heads = (
        heads_triton._head_of((1, 32, 1, width), BF16, matrix, None, False, True),
        heads_triton._head_of((1, 8, 1, width), BF16, matrix, text, False, True),
        heads_triton._head_of((1, 8, 1, width), BF16, None, text, False, False),
    )
    strides = (48 * width, width, 48 * width)
    assert all(heads)
    launch(heads_triton._launch((1, 32, 8, 1), CPU, strides, strides, strides, 0, *heads), ["*bf16"] * 11)


@pytest.mark.parametrize(("width", "text"), [(8, None), (16, "mxint8@16"), (32, "mxint4@16"), (64, "mxint4@32")])
def test_attention_of_narrow_heads(width: int, text: str | None) -> None:
    row = cache_triton._read_as(row_of(width, None if text is None else parse(text)), BF16)
    kind = "*bf16" if text is None else "*i16" if row.halfwords else "*u8"
    scales = "*bf16" if text is None else "*u8"
    kinds = ["*bf16", kind, kind, scales, scales, "*bf16", "*i64", *["*fp32"] * 3]
    constants = {
        "KEY": row,
        "VALUE": row,
        "GROUP": 2,
        "GROUP_PADDED": 8,
        "PLACES": 64,
        "HAS_BIAS": False,
        "HAS_CAP": False,
    }
    scalars = [2, 64, 4, 0.3, 1.0, *[4096] * 9]
    compiled(cache_triton._attend_kernel, kinds, scalars, constants, {"num_warps": 4 if text is None else 1})
