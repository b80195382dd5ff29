"""Block transforms: function kept, second moments balanced, bad conditioning caught."""

import pytest
import torch
from torch import Tensor

from mxfx.algorithms.block_transform import (
    apply_blocks,
    smoothing_scales,
    wush,
    zigzag_permutation,
)
from mxfx.algorithms.hadamard import hadamard_matrix
from tests.algorithms.synthetic_layer import correlated_inputs


@pytest.fixture(scope="module")
def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = correlated_inputs(600, 96, generator)
    x[:, 5] *= 30
    return x, correlated_inputs(80, 96, generator)


def moments(x: Tensor, w: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    """Second moments of each block of columns, `(columns / block, block, block)`."""
    blocks = (rows.unflatten(-1, (-1, block)).transpose(0, 1) for rows in (x, w))
    of_x, of_w = (columns.mT @ columns / columns.shape[1] for columns in blocks)
    return of_x, of_w


def relative(error: Tensor, reference: Tensor) -> float:
    return (error.norm() / reference.norm()).item()


def test_product_is_unchanged(operands: tuple[Tensor, Tensor]) -> None:
    x, w = operands
    transform = wush(*moments(x, w))
    expected = x @ w.mT
    assert not transform.fell_back.any()
    assert relative(transform.activations(x) @ transform.weight(w).mT - expected, expected) < 1e-10


def test_inverse_is_the_inverse(operands: tuple[Tensor, Tensor]) -> None:
    transform = wush(*moments(*operands))
    identity = torch.eye(32, dtype=torch.float64).expand(3, 32, 32)
    torch.testing.assert_close(transform.matrix @ transform.inverse, identity, rtol=0, atol=1e-10)


def test_activations_and_weights_get_equal_second_moments(operands: tuple[Tensor, Tensor]) -> None:
    sx, sw = moments(*operands)
    transform = wush(sx, sw, eps=0.0)
    t, inverse = transform.matrix, transform.inverse
    balanced_x, balanced_w = t.mT @ sx @ t, inverse @ sw @ inverse.mT
    assert relative(balanced_x - balanced_w, balanced_x) < 1e-9


def test_energy_is_spread_evenly_over_the_block(operands: tuple[Tensor, Tensor]) -> None:
    sx, sw = moments(*operands)
    t = wush(sx, sw, eps=0.0).matrix
    energy = (t.mT @ sx @ t).diagonal(dim1=1, dim2=2)
    assert (energy.amax(-1) / energy.mean(-1) < 3).all()
    raw = sx.diagonal(dim1=1, dim2=2)
    assert (raw.amax(-1) / raw.mean(-1)).max() > 10


def test_badly_conditioned_block_takes_the_rotation_and_says_so(operands: tuple[Tensor, Tensor]) -> None:
    sx, sw = moments(*operands)
    sx = sx.clone()
    sx[1] = torch.diag(torch.logspace(0, 12, 32, dtype=torch.float64))
    transform = wush(sx, sw, eps=0.0, max_condition=100.0)
    assert transform.fell_back.tolist() == [False, True, False]
    assert transform.condition[1] > 100
    torch.testing.assert_close(transform.matrix[1], hadamard_matrix(32, torch.float64))
    torch.testing.assert_close(transform.inverse[1], hadamard_matrix(32, torch.float64).mT)


def test_dead_block_takes_the_rotation() -> None:
    transform = wush(torch.zeros(1, 32, 32), torch.eye(32)[None])
    assert transform.fell_back.all() and transform.condition.isinf().all()
    assert transform.matrix.isfinite().all()


def test_moments_must_match_and_be_finite() -> None:
    with pytest.raises(ValueError, match="same shape"):
        wush(torch.eye(8)[None], torch.eye(8))
    with pytest.raises(ValueError, match="NaN or Inf"):
        wush(torch.full((1, 8, 8), torch.nan), torch.eye(8)[None])


def test_one_matrix_serves_all_blocks() -> None:
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    t = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(apply_blocks(x, t), apply_blocks(x, t.expand(3, 8, 8)))


def test_blocks_must_fill_the_axis() -> None:
    with pytest.raises(ValueError, match="do not fill"):
        apply_blocks(torch.zeros(2, 40), torch.zeros(1, 32, 32))


def test_half_smoothing_equalizes_both_sides() -> None:
    x = torch.tensor([1.0, 100.0, 0.01, 4.0], dtype=torch.float64)
    w = torch.tensor([2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    scales = smoothing_scales(x, w)
    ratio = (x / scales) / (w * scales)
    torch.testing.assert_close(ratio, ratio[0].expand(4))
    assert scales.log().sum().abs() < 1e-12


def test_channel_without_signal_keeps_its_scale() -> None:
    scales = smoothing_scales(torch.tensor([0.0, 1.0, 9.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert scales[:2].tolist() == [1.0, 1.0]
    assert scales.isfinite().all() and (scales > 0).all()


def test_zigzag_deals_large_channels_evenly() -> None:
    magnitude = torch.arange(16.0).flip(0)
    order = zigzag_permutation(magnitude, block=4)
    sums = magnitude[order].reshape(4, 4).sum(-1)
    assert sorted(order.tolist()) == list(range(16))
    assert sums.tolist() == [30.0] * 4
