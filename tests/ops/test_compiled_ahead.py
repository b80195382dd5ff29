"""Kernels of a step of decoding compile for Hopper, without one: what the interpreter takes and a compiler may not."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mxfx.algorithms.launch import Launch
from mxfx.formats import parse
from mxfx.ops.kernels import (
    cache_triton,
    e4m3_gluon,
    early_triton,
    heads_triton,
    integer_mma_triton,
    integer_triton,
    norm_triton,
    skinny_triton,
    transform_triton,
)
from mxfx.ops.kernels.cache_tiles_triton import KEY_LANES, VALUE_LANES, read_of

pytestmark = pytest.mark.triton
ADA, HOPPER = GPUTarget("cuda", 89, 32), GPUTarget("cuda", 90, 32)
FORMAT = parse("mxint4@32/mse")
BF16, CPU = torch.bfloat16, torch.device("cpu")


def compiled(
    kernel: Any,
    kinds: Sequence[str],
    scalars: Sequence[object],
    constants: Mapping,
    options: Mapping,
    target: GPUTarget = HOPPER,
) -> Any:
    """A kernel for pointers to `kinds`, then scalars; as at a launch, it is told which numbers 16 divides.

    All pointers are aligned to 16 bytes.
    """
    names = kernel.arg_names
    given = [*kinds, *("fp32" if isinstance(value, float) else "i32" for value in scalars)]
    signature = dict(zip(names, given, strict=False)) | dict.fromkeys(constants, "constexpr")
    at = {(names.index(name),): value for name, value in constants.items()}
    given = [*kinds, *scalars]
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, value in enumerate(given)
        if (value.startswith("*") if isinstance(value, str) else isinstance(value, int) and value % 16 == 0)
    }
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return triton.compile(source(kernel, signature, at, aligned), target=target, options=dict(options))


def launch(made: Launch, kinds: Sequence[str], target: GPUTarget = HOPPER) -> Any:
    return compiled(made._kernel, kinds, made._with_turns(1), made._constants, made._options, target)


@pytest.mark.parametrize("rows", [1, 6])
def test_products_in_integers(rows: int) -> None:
    sizes = (2048, 512, 512)
    tiling = integer_triton.tiling_for(rows, sum(sizes), 64)
    made = integer_triton._launch(rows, 2048, sizes, sum(sizes), 0, BF16, CPU, True, True, FORMAT, tiling)
    found = launch(made, ["*i32", "*u8", *["*i32"] * 3, *["*u8"] * 3, *["*bf16"] * 5])
    assert "dp4a.s32.s32" in found.asm["ptx"]
    # Weights go from memory to the threads that multiply them: shared memory holds no more than sums.
    assert found.metadata.shared <= 256


@pytest.mark.parametrize("target", [ADA, HOPPER], ids=["Ada", "Hopper"])
@pytest.mark.parametrize("rows", [8, 40])
def test_products_in_integers_on_tensor_cores(rows: int, target: GPUTarget) -> None:
    sizes, tiling = (2048, 512, 512), integer_mma_triton.tiling_for(rows, 3072)
    made = integer_mma_triton._launch(rows, 2048, sizes, 3072, 0, BF16, CPU, True, True, FORMAT, tiling)
    found = launch(made, ["*i8", "*i32", *["*u8"] * 3, *["*i32"] * 3, *["*bf16"] * 5], target)
    assert "mma.sync.aligned.m16n8k32.row.col" in found.asm["ptx"] and ".s32.s8.s8.s32" in found.asm["ptx"]
    # Codes are decoded in the registers that tensor cores read: what shared memory holds is still packed.
    loop = found.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
    assert "tt.dot" in loop and "convert_layout" not in loop and "local_alloc" not in loop


@pytest.mark.parametrize("target", [ADA, HOPPER], ids=["Ada", "Hopper"])
@pytest.mark.parametrize("kind", ["bf16", "u8"])
def test_some_rows_times_codes_that_are_decoded_as_they_arrive(kind: str, target: GPUTarget) -> None:
    dtype, tiling = {"bf16": BF16, "u8": torch.uint8}[kind], skinny_triton.tiling_for(2048)
    made = skinny_triton._launch(16, 2048, 2048, 2048, dtype, BF16, CPU, True, FORMAT, tiling)
    found = launch(made, [f"*{kind}", "*fp32", "*i16", "*u8", "*bf16", "*bf16"], target)
    assert "fma.rn.bf16x2" in found.asm["ptx"]


@pytest.mark.parametrize("rows", [20, 200, 16384])
def test_rows_of_e4m3_are_added_in_float32_while_tensor_cores_multiply(rows: int, tmp_path: Path) -> None:
    tiling = e4m3_gluon.tiling_for(rows, 2048, 132)
    made = e4m3_gluon._launch(rows, 2048, 2048, CPU, True, True, tiling)
    tiles = [f"tensordesc<fp8e4nv[{n}, 128],{e4m3_gluon.SHARED!r}>" for n in (64, tiling.channels)]
    found = launch(made, [*tiles, *["*fp32"] * 2, *["*bf16"] * 3])
    # Each instruction sums 32 products, of one exponent, and nothing that was summed before.
    instructions = found.asm["ptx"].count(f"wgmma.mma_async.sync.aligned.m64n{tiling.channels}k32.f32.e4m3.e4m3")
    assert instructions == 4 * tiling.groups
    said = _ptxas(found.asm["ptx"], tmp_path)
    assert "0 bytes spill stores" in said and "C7510" not in said  # C7510: instructions wait for each other


def _ptxas(text: str, folder: Path) -> str:
    """What the assembler says of a kernel."""
    (folder / "kernel.ptx").write_text(text)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr


@pytest.mark.parametrize("before", ["none", "silu", "scale", "sum"])
@pytest.mark.parametrize("own", [False, True])
def test_quantizers_that_write_integers(before: str, own: bool) -> None:
    added = before == "sum"
    before = "scale" if added else before
    if before == "scale" and not own:
        given = ((1, 1, 2048), (2048, 2048, 1), BF16, CPU, 32, 0, False, "last", 0.0, 1e-5, FORMAT, added)
        launch(norm_triton._launch(*given), [*["*bf16"] * 3, "*i8", "*u8", "*i64", "*bf16", "*bf16"])
        return
    matrix, eps = (64, 32, 32) if own else None, 1e-5 if before == "scale" else None
    given = ((1, 1, 2048), (4096, 4096, 1), BF16, CPU, matrix, int(own), False, FORMAT, before, False, 0.0, eps, True)
    made = transform_triton._launch(*given, False, added)
    launch(made, [*["*bf16"] * 4, "*i8", "*u8", "*i64", "*bf16"])


@pytest.mark.parametrize("kind", ["bf16", "u8"])
def test_norms_of_sums_of_many_rows(kind: str) -> None:
    """What a row is divided by, and norms without matrices of their own."""
    size = ((8, 2048, 2048), (2048 * 2048, 2048, 1))
    launch(norm_triton._launch_scales(*size, CPU, 1e-5, True), ["*bf16", "*fp32", "*bf16", "*bf16"])
    made = norm_triton._launch(*size, BF16, CPU, 32, 1, False, "last", 0.0, 1e-5, FORMAT, True)
    kinds = ["*u8", "*fp32", "*i64"] if kind == "u8" else ["*bf16"] * 3
    launch(made, [*["*bf16"] * 3, *kinds, "*bf16", "*bf16"])


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


def test_kernels_of_a_step_wait_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that may start early; those of many rows do not."""
    monkeypatch.setattr(early_triton, "_can", lambda device: True)
    norm = ((16, 1, 2048), (2048, 2048, 1))
    rest = (BF16, CPU, None, 0, False, FORMAT, "none", False, 0.0, None, False)
    head = heads_triton._head_of((1, 32, 1, 64), BF16, None, None, False, True)
    value = heads_triton._head_of((1, 8, 1, 64), BF16, None, str(FORMAT), False, False)
    strides, sizes = (3072, 64, 3072), (2048, 512, 512)
    some = (16, 2048, 2048, 2048, BF16, BF16, CPU, False, FORMAT, skinny_triton.tiling_for(2048))
    tiles = (16, 2048, sizes, 3072, 0, BF16, CPU, False, False, FORMAT, integer_mma_triton.tiling_for(16, 3072))
    made: list[tuple[Launch, list[str]]] = [
        (norm_triton._launch_scales.__wrapped__(*norm, CPU, 1e-5, True), ["*bf16", "*fp32", "*bf16", "*bf16"]),
        (
            norm_triton._launch.__wrapped__(*norm, BF16, CPU, 32, 0, False, "last", 0.0, 1e-5, FORMAT),
            ["*bf16"] * 4 + ["*u8", "*i64", "*bf16", "*bf16"],
        ),
        (transform_triton._launch.__wrapped__(*norm, *rest), ["*bf16"] * 5 + ["*u8", "*i64", "*bf16"]),
        (skinny_triton._launch.__wrapped__(*some), ["*bf16", "*fp32", "*i16", "*u8", "*bf16", "*bf16"]),
        (
            integer_mma_triton._launch.__wrapped__(*tiles),
            ["*i8", "*i32", *["*u8"] * 3, *["*i32"] * 3, *["*bf16"] * 5],
        ),
        (
            heads_triton._launch.__wrapped__((1, 32, 8, 1), CPU, strides, strides, strides, 0, head, head, value),
            ["*bf16"] * 11,
        ),
    ]
    for one, kinds in made:
        assert one._options["launch_pdl"] and "griddepcontrol.wait" in launch(one, kinds).asm["ptx"]
    many = norm_triton._launch_scales.__wrapped__((8, 2048, 2048), (2048 * 2048, 2048, 1), CPU, 1e-5, True)
    assert not many._options["launch_pdl"] and not many._constants["EARLY"]


def attention(width: int, text: str | None, packed: bool) -> Any:
    fmt, warps, places = (
        None if text is None else parse(text),
        1 if packed else 4,
        32 if width > 64 or not packed else 64,
    )
    key, value = (read_of(width, fmt, lanes, BF16, places, warps) for lanes in (KEY_LANES, VALUE_LANES))
    kind, scales = ("*bf16", "*bf16") if text is None else ("*i16", "*u8")
    kinds = ["*bf16", kind, kind, scales, scales, "*bf16", "*i64", *["*fp32"] * 3, "*bf16"]
    given = {
        "HAS_BIAS": False,
        "HAS_CAP": False,
        "HAS_SINKS": False,
        "ALONE": False,
        "GROUP": 4,
        "GROUP_PADDED": 8,
        "EARLY": True,
    }
    scalars = [8, 64, 4, 0.3, 1.0, *[4096] * 9]
    options = {"num_warps": warps, "num_stages": 1 if packed else 2}
    return compiled(cache_triton._attend_kernel, kinds, scalars, {"KEY": key, "VALUE": value, **given}, options)


@pytest.mark.parametrize(("width", "text"), [(8, None), (16, "mxint8@16"), (32, "mxint4@16"), (96, "mxfp8_e4m3@32")])
def test_attention_of_heads_of_all_widths(width: int, text: str | None) -> None:
    attention(width, text, text is not None)


@pytest.mark.parametrize("text", ["mxint4@32/mse", "mxfp4_e2m1@32"])
@pytest.mark.parametrize("width", [64, 128])
def test_codes_are_decoded_by_the_lanes_that_multiply_them(width: int, text: str) -> None:
    found = attention(width, text, True)
    # Shared memory serves queries and sums; one tile of decoded keys would take 4096 bytes or more.
    assert found.metadata.shared <= 1024
    loop = found.asm["ptx"].split("mma.sync")[1:-1]
    assert len(loop) > 60 and not any("ldmatrix" in part or "st.shared" in part for part in loop[:31])
