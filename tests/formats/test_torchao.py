"""Bit-equal to torchao's MX casts on finite input, for the rules that torchao has."""

import pytest
import torch

from mxfx.formats import parse
from tests.formats.reference import MX_FLOATS, same_bits

RULES = ("floor", "rceil", "ceil", "even")


def torchao_cast(x: torch.Tensor, stem: str, block: int, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` (rows, n) through torchao: the E8M0 bytes (rows, n / block), and the values back in float32."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    element = {
        "mxfp4_e2m1": torch.float4_e2m1fn_x2,
        "mxfp6_e3m2": DTYPE_FP6_E3M2,
        "mxfp6_e2m3": DTYPE_FP6_E2M3,
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
    }[stem]
    scales, codes = to_mx(x, element, block, ScaleCalculationMode(rule))
    return scales.view(torch.uint8), to_dtype(codes, scales, element, block, torch.float32)


def finite_blocks(block: int) -> torch.Tensor:
    """Values that bfloat16 holds, so that torchao's float32 log2 under RCEIL is far from an integer."""
    generator = torch.Generator().manual_seed(block)
    normal = torch.randn(200, block, generator=generator)
    sizes = torch.randint(-80, 80, (200, 1), generator=generator).float().exp2()
    powers = torch.randint(-8, 8, (200, block), generator=generator).float().exp2() * normal.sign()
    ties = torch.randint(-127, 128, (200, block), generator=generator).float() / 16
    zeros = torch.where(
        torch.rand(200, block, generator=generator) < 0.9, torch.copysign(torch.zeros(()), normal), normal
    )
    return torch.cat([normal * sizes, normal**3, powers, ties, zeros]).bfloat16()


@pytest.mark.parametrize("stem", MX_FLOATS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_random_blocks_powers_ties_and_zeros(stem: str, rule: str, block: int, dtype: torch.dtype) -> None:
    x = finite_blocks(block).to(dtype)
    expected = torchao_cast(x, stem, block, rule)[1].to(dtype)
    assert same_bits(parse(f"{stem}@{block}/{rule}").fake_quantize(x), expected)


@pytest.mark.parametrize("stem", MX_FLOATS)
@pytest.mark.parametrize("rule", RULES)
def test_scales_are_torchaos_bytes(stem: str, rule: str) -> None:
    x = finite_blocks(32).float()
    scales = parse(f"{stem}@32/{rule}").encode(x).scales
    assert scales is not None and torch.equal(scales, torchao_cast(x, stem, 32, rule)[0])


@pytest.mark.thorough
@pytest.mark.parametrize("stem", MX_FLOATS)
@pytest.mark.parametrize("rule", RULES)
def test_every_finite_bf16_pattern_as_the_largest_of_its_block(stem: str, rule: str) -> None:
    patterns = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    # Below, torchao replaces the scale 2^-127 by 2^-126; above, a value decodes to Inf where mxfx saturates.
    usable = patterns[(patterns >= 2.0**-100) & (patterns < 2.0**127)]
    x = usable[:, None] * torch.linspace(-1, 1, 32)[None].bfloat16()
    expected = torchao_cast(x, stem, 32, rule)[1].bfloat16()
    assert same_bits(parse(f"{stem}@32/{rule}").fake_quantize(x), expected)
