"""MXINT where a published formula defines it."""

import pytest
import torch

from mxfx.formats import parse
from mxfx.formats.format import precisions
from tests.formats.reference import same_bits


def test_ocp_mxint8_has_64_steps_below_the_power_of_two_of_amax() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True))[1] - 1
    # OCP MX v1.0, 5.3.4: int8 with an implicit scale of 2^-6.
    step = torch.ldexp(torch.ones(64, 1), exponent - 6)
    expected = (x / step).round().clamp(-128, 127) * step + 0.0
    assert same_bits(parse("mxint8@32").fake_quantize(x), expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_ceil_is_the_formula_of_the_mase_tutorial(bits: int, block: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(40, block, generator=generator) * torch.logspace(-12, 12, 40, 2.0)[:, None]
    x[:8, 0] = 2.0 ** torch.arange(3, 11)
    amax = x.double().abs().amax(-1, keepdim=True)
    # In float64 log2 is exact at powers of two and far from an integer elsewhere, for amax in float32.
    step = torch.exp2(amax.log2().ceil() - bits + 1)
    expected = ((x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step + 0.0).float()
    assert same_bits(parse(f"mxint{bits}@{block}/ceil").fake_quantize(x), expected)


def test_floor_and_ceil_differ_at_exact_powers_of_two_only() -> None:
    power = torch.tensor([1.0, 0.5, 0.25, 0.0])
    assert parse("mxint4@4/floor").fake_quantize(power).tolist() == [1.0, 0.5, 0.25, 0.0]
    assert parse("mxint4@4/ceil").fake_quantize(power).tolist() == [0.875, 0.5, 0.25, 0.0]
    other = torch.tensor([1.0625, 0.5, 0.3, 0.0])
    assert torch.equal(parse("mxint4@4/floor").fake_quantize(other), parse("mxint4@4/ceil").fake_quantize(other))


@pytest.mark.parametrize(
    ("rule", "amax", "exponent"),
    [
        ("floor", 7.75, 0), ("rceil", 7.0, 0), ("rceil", 7.03125, 1), ("even", 7.25, 0), ("even", 7.5, 1),
        ("ceil", 8.0, 0), ("ceil", 8.0625, 1), ("floor", 8.0, 1), ("mse", 4.0, 0),
    ],
)  # fmt: skip
def test_the_step_of_mxint4_under_each_rule(rule: str, amax: float, exponent: int) -> None:
    assert parse(f"mxint4@4/{rule}").choose(torch.tensor([amax, 0.0, 0.0, 0.0])).item() == exponent


def test_mse_takes_the_finer_step_where_saturating_one_value_costs_less() -> None:
    x = torch.tensor([4.25] + [0.5] * 31)
    assert parse("mxint4@32/floor").choose(x).item() == 0
    assert parse("mxint4@32/mse").choose(x).item() == -1
    assert parse("mxint4@32/mse").fake_quantize(x).tolist() == [3.5] + [0.5] * 31


def test_mse_keeps_the_coarser_step_on_a_tie() -> None:
    # Coarser: 4.0 exact and 0.5 to 0, error 0.25; the finer step: 3.5 and 0.5, error 0.25.
    x = torch.tensor([4.0, 0.5])
    assert parse("mxint4@2/mse").choose(x).item() == 0


def test_candidates_are_the_step_that_saturates_nothing_and_the_two_below() -> None:
    blocks = torch.tensor([[4.0, 1.0], [7.5, 1.0]])
    fmt = parse("mxint4@2/mse")
    expected = torch.tensor([[0, 1], [-1, 0], [-2, -1]], dtype=torch.int32)
    assert torch.equal(fmt.scale.candidates(blocks, fmt.element, None, sweep=True), expected)


def test_published_relative_error_on_gaussian_blocks() -> None:
    x = torch.randn(20000, 32, generator=torch.Generator().manual_seed(0))
    for text, published in [
        ("mxint4@32", 0.01749),
        ("mxint4@32/mse", 0.01314),
        ("mxfp4_e2m1@32", 0.0133),
        ("mxfp4_e2m1@32/mse", 0.01245),
    ]:
        error = (parse(text).fake_quantize(x) - x).square().mean() / x.square().mean()
        assert error.item() == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["mxint2@32/mse", "mxint4@32/mse", "mxfp4_e2m1@32/mse", "mxfp8_e4m3@32/mse"])
def test_errors_of_few_significant_bits_are_compared_faster_and_alike(text, dtype):
    fmt, generator = parse(text), torch.Generator().manual_seed(0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    patterns = every[torch.randperm(2**16, generator=generator)].view(-1, 32)
    binades = 2.0 ** torch.randint(-14, 12, (2000, 1), generator=generator)
    ties = torch.randint(-16, 17, (2000, 32), generator=generator) / 2
    for x in (patterns, (torch.randn(2000, 32, generator=generator) * binades).to(dtype), (ties * binades).to(dtype)):
        blocks = x.float()
        few = fmt.scale.choose(blocks, fmt.element, None, precisions()[dtype])
        assert torch.equal(few, fmt.choose(blocks))
