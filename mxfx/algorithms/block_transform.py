"""Data-aware block transforms in closed form, channel scales and channel orders.

A linear y = x Wᵀ computes the same with x T and W T⁻ᵀ for any invertible T. Block-diagonal T of the
width of an MX block cost little at run time and decide how well both operands fit their grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxfx.algorithms.hadamard import hadamard_matrix
from mxfx.formats import Format


@dataclass(frozen=True)
class BlockTransform:
    """A block-diagonal change of basis; all tensors float64.

    Attributes:
        matrix: T, `(blocks, b, b)`; activations become `x @ T`, block by block.
        inverse: T⁻¹, `(blocks, b, b)`; weights become `W @ T⁻ᵀ`.
        condition: 2-norm condition number of the data-aware transform of each block `(blocks,)`, as it
            was before any fallback; infinite where a second moment was not positive definite.
        fell_back: `(blocks,)` bool; True where T is the plain Hadamard rotation instead.
    """

    matrix: Tensor
    inverse: Tensor
    condition: Tensor
    fell_back: Tensor

    def activations(self, x: Tensor) -> Tensor:
        """`x T` for x `(…, blocks * b)`; same dtype."""
        return apply_blocks(x, self.matrix)

    def weight(self, weight: Tensor) -> Tensor:
        """`W T⁻ᵀ` for W `(out, blocks * b)`; same dtype."""
        return apply_blocks(weight, self.inverse.mT)

    def stored_as(self, dtype: torch.dtype, fmt: Format | None = None) -> BlockTransform:
        """The same with T rounded to `dtype`, or onto `fmt` before, and the inverse of just that: the function of both
        stays exact.

        In the dtype of the activations that it multiplies, T needs one pass through 16-bit tensor cores; its entries'
        rounding, by 2⁻⁹ or to a grid, moves the basis a little, not what is computed in it.
        """
        matrix = (self.matrix if fmt is None else fmt.fake_quantize(self.matrix)).to(dtype).double()
        return replace(self, matrix=matrix, inverse=torch.linalg.inv(matrix))


def wush(
    second_moment_x: Tensor,
    second_moment_w: Tensor,
    eps: float = 1e-4,
    max_condition: float = 1e3,
    mixing: Tensor | None = None,
) -> BlockTransform:
    """The closed-form transform that balances both operands and then mixes (WUSH, arXiv 2512.00956).

    With Sx = Lx Lxᵀ, Sw = Lw Lwᵀ and Lwᵀ Lx = U S Vᵀ:

        T = Lx⁻ᵀ V S^½ M,    T⁻¹ = Mᵀ S^-½ Vᵀ Lxᵀ

    so that Tᵀ Sx T = T⁻¹ Sw T⁻ᵀ = Mᵀ S M: activations and weights have the same second moment, which
    the Hadamard M spreads evenly over the block.

    Args:
        second_moment_x: `(blocks, b, b)`, Xᵀ X of the block's columns over tokens, any positive scale.
        second_moment_w: `(blocks, b, b)`, Wᵀ W over the rows of *all* linears that read x.
        eps: ridge on both moments, relative to the mean of each block's diagonal.
        max_condition: above this condition number a block takes the plain rotation M instead.
        mixing: orthogonal M `(b, b)`, such as a Hadamard with random signs; None takes Hadamard's.

    Raises:
        ValueError: shapes that are not two equal stacks of square matrices; non-finite entries.
        HadamardError: no Hadamard matrix of order b, and no `mixing` given.
    """
    _check_moments(second_moment_x, second_moment_w)
    b = second_moment_x.shape[-1]
    device = second_moment_x.device
    mix = hadamard_matrix(b, torch.float64, device) if mixing is None else mixing.to(device, torch.float64)
    lower_x, lower_w, indefinite = _factors(second_moment_x, second_moment_w, eps)
    _, singular, right = torch.linalg.svd(lower_w.mT @ lower_x)
    root = singular.sqrt()
    whiten = torch.linalg.solve_triangular(lower_x.mT, right.mT, upper=True)
    matrix = (whiten * root[:, None, :]) @ mix
    inverse = mix.mT @ ((right / root[:, :, None]) @ lower_x.mT)

    condition = torch.linalg.cond(matrix).masked_fill(indefinite, torch.inf)
    fell_back = ~(condition <= max_condition)
    matrix = torch.where(fell_back[:, None, None], mix, matrix)
    inverse = torch.where(fell_back[:, None, None], mix.mT, inverse)
    return BlockTransform(matrix, inverse, condition, fell_back)


def expected_error(
    second_moment_x: Tensor, second_moment_w: Tensor, width: int, quantized: int, eps: float = 1e-4
) -> float:
    """What rounding both operands in the basis of `wush` adds to their product, up to a factor that all orders share.

    In that basis every channel of a block has the second moment m = tr S / b, of activations and of weights. A block of
    a format rounds all its channels by a step that its largest sets, so a channel's error is that largest m times the
    m of what it is multiplied by: Σ over the format's blocks of max m · Σ m.

    Args:
        second_moment_x, second_moment_w, eps: as `wush` takes them.
        width: channels of a row; `blocks * b` is a multiple of it.
        quantized: channels of a block of the formats.
    """
    b = second_moment_x.shape[-1]
    lower_x, lower_w, indefinite = _factors(second_moment_x, second_moment_w, eps)
    plain = (_mean_diagonal(second_moment_x) * _mean_diagonal(second_moment_w)).sqrt()
    balanced = torch.linalg.svdvals(lower_w.mT @ lower_x).mean(-1)
    spread = torch.where(indefinite, plain, balanced).repeat_interleave(b).reshape(-1, width)
    by_block = torch.nn.functional.pad(spread, (0, -width % quantized)).unflatten(-1, (-1, quantized))
    return float((by_block.amax(-1) * by_block.sum(-1)).sum())


def best_order(
    second_moment_x: Tensor,
    second_moment_w: Tensor,
    orders: Sequence[int],
    width: int,
    quantized: int,
    eps: float = 1e-4,
) -> int:
    """The order of blocks of the least `expected_error`; the moments are those of a common multiple of `orders`."""
    if len(orders) == 1:
        return orders[0]

    def error(order: int) -> float:
        return expected_error(narrow(second_moment_x, order), narrow(second_moment_w, order), width, quantized, eps)

    return min(orders, key=error)


def narrow(moments: Tensor, block: int) -> Tensor:
    """The diagonal blocks `(n / block, block, block)` of wider ones `(n / b, b, b)`."""
    wide = moments.shape[-1]
    tiles = moments.reshape(-1, wide // block, block, wide // block, block)
    return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, block, block)


def apply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """`x @ blockdiag(blocks)` along the last axis, in float32 or better; dtype of `x`.

    Args:
        x: `(…, n)`.
        blocks: `(n // b, b, b)`, or `(b, b)` for one matrix shared by all blocks.

    Raises:
        ValueError: n is not the blocks' total width.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    b = blocks.shape[-1]
    count = blocks.shape[0] if blocks.ndim == 3 else x.shape[-1] // b
    if count * b != x.shape[-1]:
        raise ValueError(f"apply_blocks: {tuple(blocks.shape)} blocks do not fill the last axis of {tuple(x.shape)}")
    columns = x.to(compute).reshape(-1, count, b)
    matrices = blocks.to(x.device, compute)
    if blocks.ndim == 2:
        return torch.matmul(columns, matrices).reshape(x.shape).to(x.dtype)
    return torch.bmm(columns.transpose(0, 1), matrices).transpose(0, 1).reshape(x.shape).to(x.dtype)


def smoothing_scales(magnitude_x: Tensor, magnitude_w: Tensor, alpha: float = 0.5, max_ratio: float = 1e4) -> Tensor:
    """Scales s of input channels: x / s and W * s share the burden (SmoothQuant, arXiv 2211.10438, eq. 4).

    s_j = |x_j|^α / |w_j|^(1-α), divided by its geometric mean. Channels that are zero on either side
    keep s = 1, and s stays within [1/max_ratio, max_ratio].

    Args:
        magnitude_x: `(n,)` size of each activation channel: maximum, or root mean square.
        magnitude_w: `(n,)` size of each weight column over all linears that read x.
        alpha: 0 leaves weights flat, 1 leaves activations flat; must lie in [0, 1].

    Returns:
        `(n,)` float64, positive.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"smoothing_scales: alpha must lie in [0, 1], got {alpha}")
    x, w = magnitude_x.double(), magnitude_w.double()
    live = (x > 0) & (w > 0)
    log_scale = torch.where(live, alpha * x.log() - (1.0 - alpha) * w.log(), 0.0)
    center = log_scale.sum() / live.sum().clamp(min=1)
    scales = torch.where(live, (log_scale - center).exp(), 1.0)
    return scales.clamp(1.0 / max_ratio, max_ratio)


def zigzag_permutation(magnitude: Tensor, block: int) -> Tensor:
    """A channel order that gives every block of `block` channels a like share of large and small ones.

    Channels sorted by falling magnitude are dealt to the blocks forwards, then backwards, and so on
    (the zigzag of DuQuant, arXiv 2406.01721, §3.2).

    Args:
        magnitude: `(n,)` energy or maximum of each channel.

    Returns:
        `(n,)` int64 `p`; `x[..., p]` is the new order.

    Raises:
        ValueError: `block` does not divide n.
    """
    n = magnitude.shape[0]
    if block < 1 or n % block:
        raise ValueError(f"zigzag_permutation: block {block} does not divide {n} channels")
    ranks = torch.arange(n, device=magnitude.device).reshape(block, n // block)
    ranks[1::2] = ranks[1::2].flip(-1)
    order = torch.argsort(magnitude, descending=True, stable=True)
    return order[ranks.T.reshape(-1)]


def _factors(second_moment_x: Tensor, second_moment_w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lower Cholesky factors of both, with their ridge, and which blocks have none: identities stand there."""
    lower_x, info_x = torch.linalg.cholesky_ex(_with_ridge(second_moment_x, eps))
    lower_w, info_w = torch.linalg.cholesky_ex(_with_ridge(second_moment_w, eps))
    indefinite = (info_x != 0) | (info_w != 0)
    identity = torch.eye(second_moment_x.shape[-1], dtype=torch.float64, device=second_moment_x.device)
    factors = (torch.where(indefinite[:, None, None], identity, lower) for lower in (lower_x, lower_w))
    return *factors, indefinite


def _with_ridge(moment: Tensor, eps: float) -> Tensor:
    moment = moment.double()
    moment = 0.5 * (moment + moment.mT)
    ridge = eps * _mean_diagonal(moment)
    return moment + torch.diag_embed(ridge[:, None].expand(-1, moment.shape[-1]))


def _mean_diagonal(moment: Tensor) -> Tensor:
    return moment.double().diagonal(dim1=-2, dim2=-1).mean(-1)


def _check_moments(x: Tensor, w: Tensor) -> None:
    if x.ndim != 3 or x.shape != w.shape or x.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"wush: expected two stacks (blocks, b, b) of the same shape, got {tuple(x.shape)} for "
            f"activations and {tuple(w.shape)} for weights"
        )
    if not (x.isfinite().all() and w.isfinite().all()):
        raise ValueError("wush: a second moment holds NaN or Inf; check the calibration activations")
