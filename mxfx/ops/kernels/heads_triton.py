"""Queries, keys and values of few tokens in one launch: each program takes one head of one of them.

The product with a transform is taken in ordinary arithmetic, in float32: a tensor core would multiply fifteen rows of
nothing with it.

Importable only where `triton` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfx.algorithms.launch import KEPT_SHAPES, Launch
from mxfx.ops.kernels import takes
from mxfx.ops.kernels.activation_triton import rotate
from mxfx.ops.kernels.cuda import _format, if_it_fits
from mxfx.ops.kernels.early_triton import starts_early, wait
from mxfx.ops.kernels.heads import _ready, heads_together
from mxfx.ops.kernels.limits import DTYPES
from mxfx.ops.kernels.matrix_triton import quantize_blocks
from mxfx.ops.kernels.rounding_triton import Grid, as_stored, grid_of
from mxfx.ops.kernels.transform_triton import transform_triton

#: Tokens that are few.
TOKENS = 16
#: Elements of a head, and of the matrices of one, that a warp keeps in registers.
WIDEST, LARGEST = 256, 8192


@dataclass(frozen=True)
class Head:
    """What happens to a head, at compile time.

    `block` is how wide a matrix is, or a head where there is none; `own` says that each head and block has its own;
    `format_block` is that of `grid`.
    """

    width: int
    rotated: bool
    block: int
    matrix: bool
    own: bool
    group: int
    signs: bool
    format_block: int
    grid: Grid | None

    @property
    def value(self) -> Head:
        """Itself: a kernel meets its constants wrapped, except in the interpreter."""
        return self


def ready_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    matrices: list[Tensor | None],
    q_format: str | None,
    k_format: str | None,
    v_format: str,
    q_hadamard: bool,
    k_hadamard: bool,
    v_hadamard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mxfx.ops.kernels.heads.ready_heads`; of few tokens in one launch. `NotImplemented` for what it does not take."""
    batch, heads, seq, _ = q.shape
    if batch * seq > TOKENS:
        signs = (q_hadamard, k_hadamard, v_hadamard)
        return _many(q, k, v, (cos, sin), matrices, (q_format, k_format, v_format), signs)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return NotImplemented
    if takes.rope(q, cos, sin) or takes.rope(k, cos, sin) or q.numel() == 0:
        return NotImplemented
    formats, signs = (q_format, k_format, v_format), (q_hadamard, k_hadamard, v_hadamard)
    # Keys and values may be one tensor.
    given = zip((q, k, v), matrices, formats, signs, (True, True, False), strict=True)
    made = [_head(*each) for each in given]
    if any(head is None for head in made):
        return NotImplemented
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    outs = (heads_together(q), *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)))
    launch = _launch(
        (batch, heads, k.shape[1], seq), q.device, q.stride()[:3], k.stride()[:3], v.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0), *made,
    )  # fmt: skip
    launch(q, k, v, cos, sin, *(q if m is None else m.contiguous() for m in matrices), *outs)
    return outs


@if_it_fits
def _many(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: tuple[Tensor, Tensor],
    matrices: list[Tensor | None],
    formats: tuple[str | None, ...],
    signs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries by one kernel, whether they are rounded or not; keys and values by those that each of their steps has."""
    if q.dtype not in DTYPES or takes.rope(q, *angles) or takes.heads(q, matrices[0], formats[0]):
        return NotImplemented
    fmt = None if formats[0] is None else _format(formats[0])
    queries = transform_triton(q, matrices[0], signs[0], fmt, angles=angles, heads_together=True)
    keys = _ready(k, angles, matrices[1], formats[1], signs[1]).contiguous()
    return queries, keys, _ready(v, None, matrices[2], formats[2], signs[2]).contiguous()


def _head(x: Tensor, matrix: Tensor | None, format: str | None, signs: bool, rotated: bool) -> Head | None:
    """None for what the kernel does not take."""
    shape = None if matrix is None else tuple(matrix.shape)
    return _head_of(tuple(x.shape), x.dtype, shape, format, signs, rotated)


@lru_cache(maxsize=256)
def _head_of(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    matrix: tuple[int, ...] | None,
    format: str | None,
    signs: bool,
    rotated: bool,
) -> Head | None:
    width, fmt = shape[-1], None if format is None else _format(format)
    block = width if matrix is None else matrix[-1]
    wide = block if fmt is None else fmt.block
    powers = all(n is not None and n & (n - 1) == 0 for n in (width, block, wide))
    if not powers or wide is None or block % wide or width % block or width > WIDEST or (rotated and width < 2):
        return None
    if matrix is not None and (len(matrix) not in (2, 4) or width * block > LARGEST):
        return None
    if fmt is not None and takes.fake_quantize(torch.empty(1, 1, dtype=dtype), str(format)):
        return None
    own = matrix is not None and len(matrix) == 4
    if matrix is not None and own and (shape[1] % matrix[0] or matrix[1] * block != width):
        return None
    group = shape[1] // matrix[0] if matrix is not None and own else 1
    return Head(width, rotated, block, matrix is not None, own, group, signs, wide, fmt and grid_of(fmt, dtype))


@lru_cache(maxsize=KEPT_SHAPES)
def _launch(
    sizes: tuple[int, int, int, int],
    device: torch.device,
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    angle_stride: int,
    of_q: Head,
    of_k: Head,
    of_v: Head,
) -> Launch:
    batch, heads, kv_heads, seq = sizes
    early = starts_early(device, batch * seq)
    return Launch(
        _heads_kernel,
        lambda at_a_time: batch * seq * (heads + 2 * kv_heads),
        (heads, kv_heads, seq, *q, *k, *v, angle_stride),
        {"Q": of_q, "K": of_k, "V": of_v, "EARLY": early},
        num_warps=1,
        launch_pdl=early,
        # A product that meets its sum in one FMA would skip a rounding that the ops of RoPE make.
        enable_fp_fusion=False,
    )


@triton.jit
def _heads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_matrix_ptr,
    k_matrix_ptr,
    v_matrix_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    heads,
    kv_heads,
    seq,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    angle_stride,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program, one head of one token."""
    wait(EARLY)
    each = heads + 2 * kv_heads
    head = tl.program_id(0) % each
    token = tl.program_id(0) // each
    batch = (token // seq).to(tl.int64)
    token = (token % seq).to(tl.int64)
    angle = batch * angle_stride + token * Q.value.width
    cos_ptr += angle
    sin_ptr += angle
    if head < heads:
        x_ptr = q_ptr + batch * q_batch + head * q_head + token * q_token
        y_ptr = q_out_ptr + ((batch * seq + token) * heads + head) * Q.value.width
        _one_head(x_ptr, cos_ptr, sin_ptr, q_matrix_ptr, y_ptr, head, Q)
    elif head < heads + kv_heads:
        head -= heads
        x_ptr = k_ptr + batch * k_batch + head * k_head + token * k_token
        y_ptr = k_out_ptr + ((batch * kv_heads + head) * seq + token) * K.value.width
        _one_head(x_ptr, cos_ptr, sin_ptr, k_matrix_ptr, y_ptr, head, K)
    else:
        head -= heads + kv_heads
        x_ptr = v_ptr + batch * v_batch + head * v_head + token * v_token
        y_ptr = v_out_ptr + ((batch * kv_heads + head) * seq + token) * V.value.width
        _one_head(x_ptr, cos_ptr, sin_ptr, v_matrix_ptr, y_ptr, head, V)


@triton.jit
def _one_head(x_ptr, cos_ptr, sin_ptr, matrix_ptr, y_ptr, head, HEAD: tl.constexpr):
    narrow = x_ptr.dtype.element_ty
    BLOCK: tl.constexpr = HEAD.value.block
    BLOCKS: tl.constexpr = HEAD.value.width // BLOCK
    HALF: tl.constexpr = HEAD.value.width // 2
    at = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    if HEAD.value.rotated:
        turned = tl.load(x_ptr + tl.where(at < HALF, at + HALF, at - HALF))
        x = rotate(x, turned, tl.load(cos_ptr + at), tl.load(sin_ptr + at), at < HALF)
    y = as_stored(x.to(tl.float32), narrow)
    if HEAD.value.matrix:
        if HEAD.value.own:
            matrix_ptr += (head // HEAD.value.group) * (BLOCKS * BLOCK * BLOCK)
        line = tl.arange(0, BLOCK)
        inside = line[None, :, None] * BLOCK + line[None, None, :]
        if HEAD.value.own:
            inside += tl.arange(0, BLOCKS)[:, None, None] * (BLOCK * BLOCK)
        matrix = tl.load(matrix_ptr + inside).to(tl.float32)
        if HEAD.value.signs:
            matrix = tl.where(matrix > 0, 1.0, tl.where(matrix < 0, -1.0, 0.0))
        y = tl.sum(y[:, :, None] * matrix, axis=1)
        if HEAD.value.signs:
            y *= BLOCK**-0.5
        y = as_stored(y, narrow)
    GRID: tl.constexpr = HEAD.value.grid
    FORMAT_BLOCK: tl.constexpr = HEAD.value.format_block
    if GRID is not None:
        y = quantize_blocks(y, FORMAT_BLOCK, GRID, narrow)
    tl.store(y_ptr + at, y.to(narrow))
