"""Every element's values are those that the OCP specifications list, code by code."""

import numpy as np
import pytest
import torch

from mxfx.formats import parse
from tests.formats.reference import MORE_FLOATS, MX_FLOATS, float_magnitudes, nearest, ocp_magnitudes, same_bits

LARGEST = {
    "mxfp4_e2m1": 6.0,
    "mxfp6_e3m2": 28.0,
    "mxfp6_e2m3": 7.5,
    "mxfp8_e4m3": 448.0,
    "mxfp8_e5m2": 57344.0,
    "mxfp4_e1m2": 3.5,
    "mxfp8_e3m4": 31.0,
}
EMAX = {
    "mxfp4_e2m1": 2,
    "mxfp6_e3m2": 4,
    "mxfp6_e2m3": 2,
    "mxfp8_e4m3": 8,
    "mxfp8_e5m2": 15,
    "mxfp4_e1m2": 1,
    "mxfp8_e3m4": 4,
}
SMALLEST = {
    "mxfp4_e2m1": 0.5,
    "mxfp6_e3m2": 2**-4,
    "mxfp6_e2m3": 2**-3,
    "mxfp8_e4m3": 2**-9,
    "mxfp8_e5m2": 2**-16,
    "mxfp4_e1m2": 0.5,
    "mxfp8_e3m4": 2**-6,
}


@pytest.mark.parametrize("stem", MX_FLOATS + MORE_FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_code_decodes_to_the_value_of_the_specification(stem: str, dtype: torch.dtype) -> None:
    element = parse(f"{stem}@32").element
    magnitudes = torch.from_numpy(ocp_magnitudes(stem.split("_")[1])).to(dtype)
    codes = torch.arange(len(magnitudes)).to(element.code_dtype)
    assert torch.equal(element.from_codes(codes, dtype), magnitudes)
    assert torch.equal(element.from_codes(codes | (1 << (element.bits - 1)), dtype), -magnitudes)
    assert torch.equal(element.to_codes(magnitudes), codes)
    assert element.max_value == LARGEST[stem] and element.max_exponent == EMAX[stem]
    assert magnitudes[1] == SMALLEST[stem]


@pytest.mark.parametrize("stem", MX_FLOATS + MORE_FLOATS)
def test_rounding_hits_the_nearest_value_and_the_even_one_of_two(stem: str) -> None:
    grid = ocp_magnitudes(stem.split("_")[1])
    middles = (grid[1:] + grid[:-1]) / 2
    around = np.concatenate([grid, middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf), [1e30]])
    values = np.concatenate([around, -around])
    expected = np.copysign(nearest(np.abs(values), grid, np.arange(len(grid)) % 2 == 0), values)
    rounded = parse(f"{stem}@32").element.round(torch.from_numpy(values))
    assert same_bits(rounded, torch.from_numpy(expected))


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_round_half_to_even_and_saturate_at_both_ends(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    quarters = torch.arange(4 * low - 9, 4 * high + 10, dtype=torch.float32) / 4
    expected = torch.tensor([float(min(max(round(q), low), high)) for q in quarters.tolist()])
    assert same_bits(parse(f"mxint{bits}@32").element.round(quarters), expected)


@pytest.mark.parametrize(
    ("exponent_bits", "mantissa_bits"), [(1, 2), (2, 5), (3, 4), (4, 3), (5, 2), (5, 10), (6, 9), (8, 7)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_minifloat_uses_every_code_for_a_finite_number(
    exponent_bits: int, mantissa_bits: int, dtype: torch.dtype
) -> None:
    grid = float_magnitudes(exponent_bits, mantissa_bits, 2 ** (exponent_bits - 1) - 1)
    fmt = parse(f"minifloat_e{exponent_bits}m{mantissa_bits}")
    sizes = torch.linspace(-140, 127, 4001, dtype=torch.float64).exp2()
    middles = torch.from_numpy((grid[1:] + grid[:-1]) / 2)
    values = torch.cat([sizes, -sizes, torch.from_numpy(grid), middles, -middles, torch.zeros(1, dtype=torch.float64)])
    x = values[values.abs() <= torch.finfo(dtype).max].to(dtype)
    exact = x.double().numpy()
    expected = torch.from_numpy(np.copysign(nearest(np.abs(exact), grid, np.arange(len(grid)) % 2 == 0), exact))
    largest = torch.finfo(dtype).max
    assert same_bits(fmt.fake_quantize(x), expected.clamp(-largest, largest).to(dtype))


def test_a_minifloat_saturates_infinity_and_passes_nan_through() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 1.0])
    expected = torch.tensor([480.0, -480.0, float("nan"), -0.0, 1.0])
    assert same_bits(parse("minifloat_e4m3").fake_quantize(x), expected)
