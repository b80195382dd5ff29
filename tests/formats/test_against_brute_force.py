"""Every format and rule equals the float64 brute force of `reference.py`, bit for bit."""

import pytest
import torch

from mxfx.formats import parse
from tests.formats.reference import (
    MORE_FLOATS,
    MX_FLOATS,
    MX_INTS,
    RULES,
    Reference,
    bf16_patterns,
    fp16_patterns,
    same_bits,
    saturated_to,
)

COMPANIONS = {
    "alone": lambda x: torch.zeros_like(x),
    "with a larger neighbour": lambda x: x * 5,
    "with a much larger neighbour": lambda x: x * 2**10,
    "with a neighbour of 1": lambda x: torch.ones_like(x),
}


def hard_blocks(rows: int, block: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Gaussian blocks over a wide range of sizes; then exact ties, powers of two, zeros, -0, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, block, generator=generator, dtype=torch.float64)
    reach = 20 if dtype == torch.float16 else 60
    sizes = torch.randint(-reach, reach // 2, (rows, 1), generator=generator).double().exp2()
    integers = torch.randint(-600, 600, (rows, block), generator=generator).double() / 8
    powers = torch.randint(-6, 6, (rows, block), generator=generator).double().exp2() * normal.sign()
    sparse = torch.where(
        torch.rand(rows, block, generator=generator) < 0.8, torch.copysign(torch.zeros(()), normal), normal
    )
    tiny = torch.randint(-40, 40, (rows, block), generator=generator) * torch.finfo(dtype).smallest_normal / 32
    return torch.cat([normal * sizes, integers, powers, sparse, tiny.double()]).to(dtype)


def assert_equals_brute_force(stem: str, rule: str, blocks: torch.Tensor) -> None:
    """`blocks` (rows, block)."""
    fmt = parse(f"{stem}@{blocks.shape[-1]}/{rule}")
    expected = saturated_to(Reference(stem, rule)(blocks), blocks.dtype)
    assert same_bits(fmt.fake_quantize(blocks), expected)


@pytest.mark.parametrize("stem", MX_INTS + MX_FLOATS + MORE_FLOATS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_hard_blocks(stem: str, rule: str, dtype: torch.dtype) -> None:
    assert_equals_brute_force(stem, rule, hard_blocks(30, 32, dtype))


@pytest.mark.parametrize("stem", MX_INTS)
@pytest.mark.parametrize("block", [1, 16, 24, 64, 128])
def test_block_sizes(stem: str, block: int) -> None:
    for rule in RULES:
        assert_equals_brute_force(stem, rule, hard_blocks(8, block, torch.float32, seed=block))


@pytest.mark.parametrize("stem", ["mxint2", "mxint4", "mxint8", "mxfp4_e2m1", "mxfp8_e4m3"])
@pytest.mark.parametrize("rule", RULES)
def test_the_ends_of_the_float64_range_meet_the_ends_of_e8m0(stem: str, rule: str) -> None:
    sizes = torch.tensor(
        [-1074.0, -1030, -300, -150, -130, -128, -127, -126, -125, 120, 126, 127, 128, 129, 140, 300, 1000]
    )
    blocks = (
        torch.randn(17, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        * sizes.double().exp2()[:, None]
    )
    assert_equals_brute_force(stem, rule, blocks)


def pattern_blocks(patterns: torch.Tensor, companion: str, position: int) -> torch.Tensor:
    """Each pattern in a block of 4 with one companion, made from its own value, next to it."""
    blocks = torch.zeros(len(patterns), 4, dtype=patterns.dtype)
    neighbour = COMPANIONS[companion](patterns)
    blocks[:, (position + 1) % 4] = torch.where(neighbour.isfinite(), neighbour, 0)
    blocks[:, position] = patterns
    return blocks


@pytest.mark.parametrize("companion", COMPANIONS)
@pytest.mark.parametrize("patterns", [bf16_patterns, fp16_patterns])
@pytest.mark.parametrize(
    ("stem", "rule"), [("mxint4", "mse"), ("mxint8", "floor"), ("mxint4", "ceil"), ("mxfp4_e2m1", "even")]
)
def test_every_16_bit_pattern(stem: str, rule: str, patterns, companion: str) -> None:
    assert_equals_brute_force(stem, rule, pattern_blocks(patterns()[::5], companion, position=3))


@pytest.mark.thorough
@pytest.mark.parametrize("companion", COMPANIONS)
@pytest.mark.parametrize("patterns", [bf16_patterns, fp16_patterns])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stem", MX_INTS + MX_FLOATS)
def test_every_16_bit_pattern_in_every_format(stem: str, rule: str, patterns, companion: str) -> None:
    for position in range(4):
        assert_equals_brute_force(stem, rule, pattern_blocks(patterns(), companion, position))
