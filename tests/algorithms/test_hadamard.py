"""Hadamard matrices: orthonormal at every order, fast transform equal to the dense product."""

import pytest
import torch

from mxfx.algorithms.hadamard import (
    HadamardError,
    hadamard_factors,
    hadamard_matrix,
    hadamard_transform,
    has_hadamard,
    random_signs,
)

# Sylvester; Paley I and II over primes; over prime powers (28 = 27 + 1, 52 = 2·26, 100 = 2·50, 344 = 7³ + 1).
ORDERS = [
    1,
    2,
    4,
    32,
    256,
    12,
    20,
    24,
    28,
    36,
    40,
    44,
    48,
    52,
    60,
    68,
    76,
    84,
    100,
    108,
    140,
    144,
    148,
    180,
    344,
]


@pytest.mark.parametrize("order", ORDERS)
def test_matrix_is_orthonormal_with_entries_of_one_magnitude(order: int) -> None:
    matrix = hadamard_matrix(order, torch.float64)
    identity = torch.eye(order, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.mT, identity, rtol=0, atol=1e-13)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("order", [12, 28, 36, 52, 64, 100, 344, 576, 1536])
def test_transform_equals_the_dense_product(order: int) -> None:
    x = torch.randn(2, 3, order, dtype=torch.float64, generator=torch.Generator().manual_seed(order))
    torch.testing.assert_close(hadamard_transform(x), x @ hadamard_matrix(order, x.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [576, 1536, 2048, 3072, 4864, 8192, 8960, 11008, 13824, 14336, 18944, 28672, 53248])
def test_width_of_a_current_model_is_reachable(width: int) -> None:
    factors = hadamard_factors(width)
    assert torch.tensor(factors).prod() == width
    assert max(factors) <= 344


def test_power_of_two_is_sylvesters_symmetric_matrix() -> None:
    two = hadamard_matrix(2, torch.float64)
    expected = torch.kron(two, torch.kron(two, two))
    torch.testing.assert_close(hadamard_matrix(8, torch.float64), expected, rtol=0, atol=1e-15)


def test_blocks_are_transformed_one_by_one() -> None:
    x = torch.randn(5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks = [part @ hadamard_matrix(32, torch.float64) for part in x.split(32, dim=-1)]
    torch.testing.assert_close(hadamard_transform(x, 32), torch.cat(blocks, -1), rtol=0, atol=1e-13)


def test_bfloat16_is_computed_in_float32() -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(hadamard_transform(x, 32), hadamard_transform(x.float(), 32).bfloat16())


def test_impossible_order_names_nearest_orders_and_usable_blocks() -> None:
    assert not has_hadamard(116)
    with pytest.raises(HadamardError, match=r"116.*112 and 120.*\[4, 2, 1\]"):
        hadamard_matrix(116)


@pytest.mark.parametrize("order", [0, -4])
def test_order_must_be_positive(order: int) -> None:
    with pytest.raises(HadamardError, match="positive"):
        hadamard_matrix(order)


def test_block_must_divide_the_axis() -> None:
    with pytest.raises(ValueError, match=r"block 32 does not divide.*48, 24, 16"):
        hadamard_transform(torch.zeros(2, 48), 32)


def test_signs_follow_the_seed() -> None:
    first = random_signs(64, torch.Generator().manual_seed(3))
    assert torch.equal(first, random_signs(64, torch.Generator().manual_seed(3)))
    assert set(first.tolist()) == {-1.0, 1.0}
