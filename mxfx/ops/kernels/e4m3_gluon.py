"""Rows of E4M3 times rows of E4M3 on Hopper, whose sums lose nothing that float32 holds.

Hopper's tensor cores align the products of an FP8 instruction, and what was summed before, to the largest of them, and
keep some 14 bits: rows whose blocks span more octaves than that leaves lose their least bits. The products of one
block have one exponent, so an instruction, which sums 32, is exact; here the ordinary cores add what instructions give
in float32. For that a warp brings operands by TMA, and up to three groups of warps multiply: while one adds, another's
instruction runs. Triton alone lets tensor cores wait for sums, and is no faster than a product in bfloat16.

Importable only where `triton` has Gluon.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch

#: Rows of one instruction, and terms of a tile in shared memory.
HIGH, TERMS = 64, 128
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


@dataclass(frozen=True)
class Tiling:
    """What a program multiplies at a time.

    groups: of four warps, one to three; each multiplies 64 rows of the tile. channels: of an instruction, and of the
    tile. ahead: instructions of a group on their way, 1 or 2. stages: operands of 128 terms in shared memory. order:
    tiles of rows that share a weight's.

    Groups of several instructions a turn, for tiles of up to 256 rows or channels, were slower on an H200.
    """

    groups: int = 3
    channels: int = 128
    ahead: int = 1
    stages: int = 5
    order: int = 16

    @property
    def rows(self) -> int:
        return self.groups * HIGH


#: With each what its programs do beside those of the first, in time, where all processors of a device have one (H200).
TILINGS = (
    (Tiling(), 1.0),
    (Tiling(2, ahead=2, stages=6), 0.96),
    (Tiling(1, channels=64, ahead=2, stages=8), 0.62),
    (Tiling(1, channels=32, ahead=2, stages=10), 0.4),
)


def tiling_for(rows: int, channels: int, processors: int) -> Tiling:
    """The tiles that are through first: as many rounds of all processors as they take, by what one takes.

    Of twelve shapes of 64 to 16384 rows that were measured on an H200 these are the fastest of the four.
    """

    def cost(tiling: Tiling, speed: float) -> float:
        tiles = triton.cdiv(rows, tiling.rows) * triton.cdiv(channels, tiling.channels)
        return triton.cdiv(tiles, processors) * tiling.rows * tiling.channels / speed

    return min(TILINGS, key=lambda one: cost(*one))[0]


def multiply_rows_of_e4m3(
    x: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    channel_scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    tiling: Tiling | None = None,
) -> None:
    """Write `residual + linear(x, weight, bias)` to `out` (m, n).

    x (m, k) and weight (n, k), both contiguous, are E4M3, k a multiple of 16; row_scales (m,) and channel_scales (n,)
    powers of two, float32. The product with its bias (n,) is rounded to `out`'s dtype, and again with the residual
    (m, n), contiguous, of that dtype.
    """
    (rows, terms), channels = x.shape, weight.shape[0]
    tiling = tiling or tiling_for(rows, channels, _processors(x.device))
    launch = _launch(rows, terms, channels, x.device, bias is not None, residual is not None, tiling)
    launch(
        x, weight, row_scales, channel_scales, out if bias is None else bias, out if residual is None else residual, out
    )


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    rows: int, terms: int, channels: int, device: torch.device, bias: bool, residual: bool, tiling: Tiling
) -> Launch:
    tiles = triton.cdiv(rows, tiling.rows) * triton.cdiv(channels, tiling.channels)
    blocks = (HIGH, tiling.channels)
    return Launch(
        _kernel,
        lambda at_a_time: min(tiles, at_a_time),
        (rows, channels, terms),
        {"TILING": tiling, "STAGES": tiling.stages, "BIAS": bias, "RESIDUAL": residual},
        read_by_tiles=[partial(_described, block) for block in blocks],
        num_warps=4,
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _described(block: int, tensor: Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [block, TERMS], SHARED)


@gluon.jit
def _place(tile, rows, channels, TILING: gl.constexpr):
    """First row and channel of a tile; `order` tiles of rows go through all channels together."""
    each = TILING.value.order * gl.cdiv(channels, TILING.value.channels)
    first = tile // each * TILING.value.order
    size = gl.minimum(gl.cdiv(rows, TILING.value.rows) - first, TILING.value.order)
    place = tile % each
    return (first + place % size) * TILING.value.rows, place // size * TILING.value.channels


@gluon.jit
def _load(x_desc, weight_desc, tiles_of, sizes, TILING: gl.constexpr, STAGES: gl.constexpr):
    """One warp: operands of one tile after the other, as soon as all groups are done with what lay there."""
    x_tiles, weight_tiles, full, empty = tiles_of
    rows, channels, terms, tiles = sizes
    EACH: gl.constexpr = x_desc.block_type.shape[0]
    GROUPS: gl.constexpr = TILING.value.groups
    TERMS: gl.constexpr = x_desc.block_type.shape[1]
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, channel = _place(tile, rows, channels, TILING)
        for term in range(0, terms, TERMS):
            mbarrier.wait(empty.index(stage), phase)
            here = full.index(stage)
            mbarrier.expect(here, (TILING.value.rows + TILING.value.channels) * TERMS)
            tma.async_copy_global_to_shared(weight_desc, [channel, term], here, weight_tiles.index(stage))
            for group in gl.static_range(GROUPS):
                part = x_tiles.index(stage * GROUPS + group)
                tma.async_copy_global_to_shared(x_desc, [row + group * EACH, term], here, part)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _start(x, weight, into, TURN: gl.constexpr):
    """An instruction: the next 32 terms of a tile."""
    k: gl.constexpr = TURN * 32
    return warpgroup_mma(x.slice(k, 32, 1), weight.slice(k, 32, 1).permute((1, 0)), into, use_acc=False, is_async=True)


@gluon.jit
def _added(total, part, rows):
    # Always so. The compiler orders what lies between branches: without one it puts additions off until instructions
    # want more registers than there are.
    if rows > 0:
        total += part
    return total


@gluon.jit
def _multiply(
    tensors, tiles_of, sizes,
    G: gl.constexpr, TILING: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Group `G` of four warps: its rows of one tile after the other."""
    row_scales_ptr, channel_scales_ptr, bias_ptr, residual_ptr, out_ptr = tensors
    x_tiles, weight_tiles, full, empty = tiles_of
    rows, channels, terms, tiles = sizes
    WIDE: gl.constexpr = TILING.value.channels
    AHEAD: gl.constexpr = TILING.value.ahead
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32])
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDE, WIDE // 8], [4, 1], [1, 0])
    TERMS: gl.constexpr = x_tiles.shape[2]
    TURNS: gl.constexpr = TERMS // 32
    zero = gl.zeros([64, WIDE], gl.float32, SUMS)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        total = zero
        for _ in range(0, terms, TERMS):
            mbarrier.wait(full.index(stage), phase)
            x, weight = x_tiles.index(stage * TILING.value.groups + G), weight_tiles.index(stage)
            # Sums go where some were read before: so the compiler finds registers for all.
            free = (zero,) * AHEAD
            sums = ()
            for turn in gl.static_range(TURNS + AHEAD - 1):
                if turn < TURNS:
                    sums = sums + (_start(x, weight, free[0], turn),)  # noqa: RUF005
                    free = free[1:]
                if turn >= AHEAD - 1:
                    done = warpgroup_mma_wait(AHEAD - 1 if turn < TURNS else 0, [sums[0]])  # type: ignore[misc]
                    sums = sums[1:]
                    free = free + (done,)  # noqa: RUF005
                    total = _added(total, done, rows)
            mbarrier.arrive(empty.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        first, at_channel = _place(tile, rows, channels, TILING)
        at_row = first + G * 64
        row = at_row + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        channel = at_channel + gl.arange(0, WIDE, gl.SliceLayout(0, SUMS))
        scale = gl.load(row_scales_ptr + row, mask=row < rows, other=0.0)
        factor = gl.load(channel_scales_ptr + channel, mask=channel < channels, other=0.0)
        y = total * scale[:, None] * factor[None, :]
        if BIAS:
            y += gl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(gl.float32)[None, :]
        y = gl.convert_layout(y.to(out_ptr.dtype.element_ty), LINES)
        row = at_row + gl.arange(0, 64, gl.SliceLayout(1, LINES))
        channel = at_channel + gl.arange(0, WIDE, gl.SliceLayout(0, LINES))
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        at_out = row.to(gl.int64)[:, None] * channels + channel[None, :]
        if RESIDUAL:
            y = y + gl.load(residual_ptr + at_out, mask=inside, other=0.0)
        gl.store(out_ptr + at_out, y, mask=inside)


@gluon.jit
def _kernel(
    x_desc, weight_desc, row_scales_ptr, channel_scales_ptr, bias_ptr, residual_ptr, out_ptr, rows, channels, terms,
    TILING: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    GROUPS: gl.constexpr = TILING.value.groups
    of_x: gl.constexpr = [STAGES * GROUPS, x_desc.block_type.shape[0], x_desc.block_type.shape[1]]
    of_weight: gl.constexpr = [STAGES, weight_desc.block_type.shape[0], weight_desc.block_type.shape[1]]
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, of_x, x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(weight_desc.dtype, of_weight, weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    sizes = (rows, channels, terms, gl.cdiv(rows, TILING.value.rows) * gl.cdiv(channels, TILING.value.channels))
    tensors = (row_scales_ptr, channel_scales_ptr, bias_ptr, residual_ptr, out_ptr)
    tiles = (x_tiles, weight_tiles, full, empty)
    # Groups that multiply get all registers that are left.
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (tensors, tiles, sizes, 0, TILING, STAGES, BIAS, RESIDUAL)),
                (_load, (x_desc, weight_desc, tiles, sizes, TILING, STAGES)),
            ],
            [1],
            [40],
        )
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (tensors, tiles, sizes, 0, TILING, STAGES, BIAS, RESIDUAL)),
                (_multiply, (tensors, tiles, sizes, 1, TILING, STAGES, BIAS, RESIDUAL)),
                (_load, (x_desc, weight_desc, tiles, sizes, TILING, STAGES)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (tensors, tiles, sizes, 0, TILING, STAGES, BIAS, RESIDUAL)),
                (_multiply, (tensors, tiles, sizes, 1, TILING, STAGES, BIAS, RESIDUAL)),
                (_multiply, (tensors, tiles, sizes, 2, TILING, STAGES, BIAS, RESIDUAL)),
                (_load, (x_desc, weight_desc, tiles, sizes, TILING, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
