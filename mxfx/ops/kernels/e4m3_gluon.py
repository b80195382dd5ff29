"""Rows of E4M3 times rows of E4M3 on Hopper, whose tensor cores never wait for the sums in float32 between them.

What is computed, and why, is `e4m3_triton`'s: an instruction sums 32 products of one exponent exactly, and float32 adds
up what instructions give. Triton waits for an instruction before it adds; here one warp brings operands by TMA, and
two or three warp groups multiply, each a few instructions ahead of its additions.

Importable only where `triton` has Gluon.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Tiling:
    """What a program multiplies at a time.

    groups: warp groups that multiply. high, across: instructions by which each covers its part of the tile. wide:
    channels of an instruction, which takes 64 rows. ahead: instructions on their way (1 or 2). stages: operands of 128
    terms in shared memory. group: row tiles that share a weight's tiles.
    """

    groups: int = 2
    high: int = 2
    across: int = 2
    wide: int = 64
    ahead: int = 2
    stages: int = 4
    group: int = 8

    @property
    def rows(self) -> int:
        return self.groups * self.high * 64

    @property
    def channels(self) -> int:
        return self.across * self.wide


TERMS = 128
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


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
    """`e4m3_triton.multiply_rows_of_e4m3`."""
    tiling = tiling or Tiling()
    (rows, terms), channels = x.shape, weight.shape[0]
    tiles = triton.cdiv(rows, tiling.rows) * triton.cdiv(channels, tiling.channels)
    programs = min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count)
    x_desc = TensorDescriptor.from_tensor(x, [tiling.high * 64, TERMS], SHARED)
    weight_desc = TensorDescriptor.from_tensor(weight, [tiling.channels, TERMS], SHARED)
    _kernel[(programs,)](
        x_desc,
        weight_desc,
        row_scales,
        channel_scales,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        rows,
        channels,
        terms,
        **constants(tiling, bias is not None, residual is not None),
        num_warps=4,
    )


def constants(tiling: Tiling, bias: bool, residual: bool) -> dict[str, object]:
    return {
        "HIGH": tiling.high,
        "ACROSS": tiling.across,
        "WIDE": tiling.wide,
        "AHEAD": tiling.ahead,
        "GROUPS": tiling.groups,
        "STAGES": tiling.stages,
        "GROUP": tiling.group,
        "BIAS": bias,
        "RESIDUAL": residual,
    }


@gluon.jit
def _place(tile, rows, channels, ROWS: gl.constexpr, CHANNELS: gl.constexpr, GROUP: gl.constexpr):
    """First row and channel of a tile; `GROUP` tiles of rows go through all channels together."""
    each = GROUP * gl.cdiv(channels, CHANNELS)
    first = tile // each * GROUP
    size = gl.minimum(gl.cdiv(rows, ROWS) - first, GROUP)
    place = tile % each
    return (first + place % size) * ROWS, place // size * CHANNELS


@gluon.jit
def _load(
    loads, GROUPS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr
):
    x_desc, weight_desc, x_tiles, weight_tiles, full, empty, rows, channels, terms, tiles = loads
    EACH: gl.constexpr = x_desc.block_type.shape[0]
    CHANNELS: gl.constexpr = weight_desc.block_type.shape[0]
    TERMS: gl.constexpr = x_desc.block_type.shape[1]
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, channel = _place(tile, rows, channels, EACH * GROUPS, CHANNELS, GROUP)
        for term in range(0, terms, TERMS):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, (EACH * GROUPS + CHANNELS) * TERMS)
            tma.async_copy_global_to_shared(weight_desc, [channel, term], bar, weight_tiles.index(stage))
            for g in gl.static_range(GROUPS):
                tma.async_copy_global_to_shared(
                    x_desc, [row + g * EACH, term], bar, x_tiles.index(stage * GROUPS + g)
                )
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _start(
    x, weight, into, TURN: gl.constexpr, PIECES: gl.constexpr, ACROSS: gl.constexpr, WIDE: gl.constexpr
):
    """An instruction of a turn: pieces of the tile follow each other, then the next 32 terms."""
    k: gl.constexpr = TURN // PIECES * 32
    i: gl.constexpr = TURN % PIECES // ACROSS * 64
    j: gl.constexpr = TURN % ACROSS * WIDE
    few = x.slice(i, 64, 0).slice(k, 32, 1)
    few_channels = weight.slice(j, WIDE, 0).slice(k, 32, 1).permute((1, 0))
    return warpgroup_mma(few, few_channels, into, use_acc=False, is_async=True)


@gluon.jit
def _added(total, part, AT: gl.constexpr):
    after: gl.constexpr = AT + 1
    return total[:AT] + (total[AT] + part,) + total[after:]


@gluon.jit
def _multiply(
    operands,
    G: gl.constexpr, HIGH: gl.constexpr, ACROSS: gl.constexpr, WIDE: gl.constexpr, AHEAD: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    (
        x_tiles, weight_tiles, full, empty, row_scales_ptr, channel_scales_ptr, bias_ptr, residual_ptr, out_ptr,
        rows, channels, terms, tiles,
    ) = operands  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32])
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDE, WIDE // 8], [4, 1], [1, 0])
    TERMS: gl.constexpr = x_tiles.shape[2]
    PIECES: gl.constexpr = HIGH * ACROSS
    TURNS: gl.constexpr = TERMS // 32 * PIECES
    zero = gl.zeros([64, WIDE], gl.float32, SUMS)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        total = (zero,) * PIECES
        for _ in range(0, terms, TERMS):
            mbarrier.wait(full.index(stage), phase)
            x = x_tiles.index(stage * GROUPS + G)
            weight = weight_tiles.index(stage)
            free = (zero,) * AHEAD
            sums = ()
            for turn in gl.static_range(TURNS + AHEAD - 1):
                if turn < TURNS:
                    sums = sums + (_start(x, weight, free[0], turn, PIECES, ACROSS, WIDE),)
                    free = free[1:]
                if turn >= AHEAD - 1:
                    done = warpgroup_mma_wait(AHEAD - 1 if turn < TURNS else 0, [sums[0]])
                    sums = sums[1:]
                    total = _added(total, done, (turn - AHEAD + 1) % PIECES)
                    free = free + (done,)
            mbarrier.arrive(empty.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        first, start = _place(tile, rows, channels, HIGH * GROUPS * 64, ACROSS * WIDE, GROUP)
        for piece in gl.static_range(PIECES):
            at_row = first + (G * HIGH + piece // ACROSS) * 64
            at_channel = start + piece % ACROSS * WIDE
            row = at_row + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
            channel = at_channel + gl.arange(0, WIDE, gl.SliceLayout(0, SUMS))
            scale = gl.load(row_scales_ptr + row, mask=row < rows, other=0.0)
            factor = gl.load(channel_scales_ptr + channel, mask=channel < channels, other=0.0)
            y = total[piece] * scale[:, None] * factor[None, :]
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
    HIGH: gl.constexpr, ACROSS: gl.constexpr, WIDE: gl.constexpr, AHEAD: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    CHANNELS: gl.constexpr = ACROSS * WIDE
    E4M3: gl.constexpr = x_desc.dtype
    x_tiles = gl.allocate_shared_memory(E4M3, [STAGES * GROUPS, HIGH * 64, x_desc.block_type.shape[1]], x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(E4M3, [STAGES, CHANNELS, x_desc.block_type.shape[1]], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    tiles = gl.cdiv(rows, HIGH * GROUPS * 64) * gl.cdiv(channels, CHANNELS)
    operands = (
        x_tiles, weight_tiles, full, empty, row_scales_ptr, channel_scales_ptr, bias_ptr, residual_ptr, out_ptr,
        rows, channels, terms, tiles,
    )  # fmt: skip
    loads = (x_desc, weight_desc, x_tiles, weight_tiles, full, empty, rows, channels, terms, tiles)
    # Constants in a tuple that has a name would be the kernel's run-time values.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (operands, 0, HIGH, ACROSS, WIDE, AHEAD, GROUPS, STAGES, GROUP, BIAS, RESIDUAL)),
                (_multiply, (operands, 1, HIGH, ACROSS, WIDE, AHEAD, GROUPS, STAGES, GROUP, BIAS, RESIDUAL)),
                (_load, (loads, GROUPS, STAGES, GROUP)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (operands, 0, HIGH, ACROSS, WIDE, AHEAD, GROUPS, STAGES, GROUP, BIAS, RESIDUAL)),
                (_multiply, (operands, 1, HIGH, ACROSS, WIDE, AHEAD, GROUPS, STAGES, GROUP, BIAS, RESIDUAL)),
                (_multiply, (operands, 2, HIGH, ACROSS, WIDE, AHEAD, GROUPS, STAGES, GROUP, BIAS, RESIDUAL)),
                (_load, (loads, GROUPS, STAGES, GROUP)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
