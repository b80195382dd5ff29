"""What lies on a grid, whatever scales it was rounded with, is stored as codes and scales and comes back to the bit."""

import pytest
import torch

from mxfx.formats import parse
from mxfx.formats.stored import codes_length, restore, scales_length, store
from tests.formats.reference import MX_FLOATS, MX_INTS, RULES, same_bits

WIDTHS = (64, 45, 7)


def wild(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(24, width) over many binades, with zeros of both signs, a zero row, and tiny and huge rows."""
    generator = torch.Generator().manual_seed(width)
    scale = torch.logspace(-30, 30, 24, 2.0).unsqueeze(-1)
    x = torch.randn(24, width, generator=generator) * scale
    x[0] = 0.0
    x[1, 0], x[2, :3] = -0.0, 0.0
    x[3], x[4] = x[3] * 2.0**-100, x[4] * 2.0**110
    return x.to(dtype)


@pytest.mark.parametrize("stem", MX_INTS + MX_FLOATS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rounded_tensor_comes_back_bit_for_bit(stem: str, rule: str) -> None:
    for width in WIDTHS:
        for block in (16, 32):
            fmt = parse(f"{stem}@{block}/{rule}")
            rounded = fmt.fake_quantize(wild(width))
            stored = store(rounded, fmt)
            assert stored is not None, (stem, rule, width)
            codes, scales = stored
            assert codes.dtype == scales.dtype == torch.uint8
            assert codes.shape == (24, codes_length(width, fmt)) and scales.shape == (24, scales_length(width, fmt))
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                assert same_bits(restore(codes, scales, fmt, width, dtype), rounded.to(dtype)), (stem, rule, dtype)
            small = rounded[5:]  # float16 has the range of none of the others
            assert same_bits(restore(codes[5:], scales[5:], fmt, width, torch.float16), small.to(torch.float16))


@pytest.mark.parametrize("stem", ["mxint4", "mxfp4_e2m1", "mxint8", "mxfp6_e2m3"])
def test_any_exponents_of_a_solver_are_found_again(stem: str) -> None:
    """A solver may round onto a grid that no rule would choose: with room above, or with saturated entries."""
    fmt, generator = parse(f"{stem}@16"), torch.Generator().manual_seed(1)
    x = torch.randn(64, 48, generator=generator)
    for shift in (-2, -1, 0, 1, 3):
        exponent = fmt.choose(x.unflatten(-1, (-1, 16))) + shift
        rounded = fmt.round_to_grid(x.unflatten(-1, (-1, 16)), exponent.unsqueeze(-1)).flatten(-2)
        stored = store(rounded, fmt)
        assert stored is not None
        assert same_bits(restore(*stored, fmt, 48, torch.float32), rounded)


def test_the_code_without_an_opposite_keeps_its_neighbours() -> None:
    """Under `floor`, -8 would ask for twice the step, on which 7 has no place."""
    values = torch.tensor([[-8.0, 7.0, 1.0, -5.0]])
    codes, scales = store(values, parse("mxint4@4"))  # type: ignore[misc]
    assert scales.tolist() == [[127]] and codes.tolist() == [[0x78, 0xB1]]
    assert torch.equal(restore(codes, scales, parse("mxint4@4"), 4, torch.float32), values)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_block(broken: float) -> None:
    fmt = parse("mxint4@16")
    x = fmt.fake_quantize(torch.randn(4, 40, generator=torch.Generator().manual_seed(3)))
    x[1, 17] = broken
    codes, scales = store(x, fmt)  # type: ignore[misc]
    assert scales[1, 1] == 255
    back = restore(codes, scales, fmt, 40, torch.float32)
    assert back[1, 16:32].isnan().all()
    outside = torch.ones(4, 40, dtype=torch.bool)
    outside[1, 16:32] = False
    assert torch.equal(back[outside], x[outside])


@pytest.mark.parametrize("text", ["mxint4@32", "mxfp4_e2m1@32", "mxint8@16"])
def test_a_tensor_off_the_grid_is_refused(text: str) -> None:
    fmt = parse(text)
    x = fmt.fake_quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(4)))
    x[5, 40] *= 1.0009765625
    assert store(x, fmt) is None
    assert store(x[:5], fmt) is not None


def test_minus_zero_has_no_integer_code() -> None:
    assert store(torch.tensor([[1.0, -0.0]]), parse("mxint4@2")) is None
    assert store(torch.tensor([[1.0, -0.0]]), parse("mxfp4_e2m1@2")) is not None


@pytest.mark.parametrize("text", ["minifloat_e3m4", "nvfp4"])
def test_formats_without_powers_of_two_for_blocks_have_no_packed_form(text: str) -> None:
    assert store(torch.ones(2, 16), parse(text)) is None
