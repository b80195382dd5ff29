"""Laws that hold for every block, searched for counterexamples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfx.formats import Format, parse
from tests.formats.reference import MX_FLOATS, MX_INTS, RULES, same_bits

ELEMENTS = st.sampled_from(MX_INTS + MX_FLOATS)
BLOCKS = st.lists(
    st.one_of(st.floats(-8, 8, width=32, allow_subnormal=False), st.integers(-512, 512).map(lambda n: n / 64)),
    min_size=8,
    max_size=8,
).map(torch.tensor)
fast = settings(max_examples=150, deadline=None, derandomize=True)


@fast
@given(stem=ELEMENTS, rule=st.sampled_from(RULES), x=BLOCKS, shift=st.integers(-40, 40))
def test_a_power_of_two_passes_through(stem: str, rule: str, x: torch.Tensor, shift: int) -> None:
    fmt = parse(f"{stem}@8/{rule}")
    x = torch.where(x.abs() < 2.0**-20, 0.0, x)  # nothing reaches the end of the E8M0 range
    assert same_bits(fmt.fake_quantize(x * 2.0**shift), fmt.fake_quantize(x) * 2.0**shift)


@fast
@given(stem=ELEMENTS, rule=st.sampled_from(RULES), x=BLOCKS)
def test_rounding_keeps_the_order_within_a_block(stem: str, rule: str, x: torch.Tensor) -> None:
    rounded = parse(f"{stem}@8/{rule}").fake_quantize(x.sort().values)
    assert (rounded.diff() >= 0).all()


@fast
@given(stem=ELEMENTS, x=BLOCKS)
def test_mse_never_loses_to_floor(stem: str, x: torch.Tensor) -> None:
    searched, floor = (parse(f"{stem}@8/{rule}").fake_quantize(x).double() for rule in ("mse", "floor"))
    best, usual = ((q - x.double()).square().sum().item() for q in (searched, floor))
    assert best <= usual * (1 + 1e-12)


@fast
@given(stem=st.sampled_from(MX_FLOATS), rule=st.sampled_from(("floor", "rceil", "even", "ceil")), x=BLOCKS)
def test_float_elements_are_idempotent(stem: str, rule: str, x: torch.Tensor) -> None:
    fmt = parse(f"{stem}@8/{rule}")
    once = fmt.fake_quantize(x)
    assert same_bits(fmt.fake_quantize(once), once)


@fast
@given(stem=st.sampled_from(MX_INTS), x=BLOCKS)
def test_integers_are_idempotent_under_floor_where_the_most_negative_code_is_not_used(
    stem: str, x: torch.Tensor
) -> None:
    fmt = parse(f"{stem}@8")
    once = fmt.fake_quantize(x)
    if (fmt.encode(x).codes > fmt.element.min_value).all():  # type: ignore[attr-defined]
        assert same_bits(fmt.fake_quantize(once), once)


def test_the_most_negative_code_makes_floor_not_idempotent() -> None:
    fmt = parse("mxint4@2")
    once = fmt.fake_quantize(torch.tensor([-7.75, 3.0]))
    assert once.tolist() == [-8.0, 3.0]
    assert fmt.fake_quantize(once).tolist() == [-8.0, 4.0]  # amax is 8 now, so the step is 2; 3 is a tie


@fast
@given(stem=ELEMENTS, rule=st.sampled_from(RULES), x=BLOCKS)
def test_every_value_is_an_element_times_the_scale_and_within_its_range(stem: str, rule: str, x: torch.Tensor) -> None:
    fmt = parse(f"{stem}@8/{rule}")
    scale = 2.0 ** fmt.choose(x).item()
    elements = fmt.fake_quantize(x).double() / scale
    lowest = getattr(fmt.element, "min_value", -fmt.element.max_value)
    assert (elements <= fmt.element.max_value).all() and (elements >= lowest).all()
    assert torch.equal(fmt.element.round(elements), elements)


@fast
@given(stem=ELEMENTS, rule=st.sampled_from(("rceil", "floor", "even")), x=BLOCKS)
def test_error_is_half_a_step_where_nothing_saturates(stem: str, rule: str, x: torch.Tensor) -> None:
    fmt = parse(f"{stem}@8/{rule}")
    scale = 2.0 ** fmt.choose(x).item()
    inside = x.abs().double() <= fmt.element.max_value * scale
    coarsest = 2.0 ** (fmt.element.max_exponent - fmt.element.mantissa_bits) * scale
    error = (fmt.fake_quantize(x).double() - x.double()).abs()
    assert (error[inside] <= coarsest / 2).all()
    assert rule != "rceil" or inside.all()


@pytest.mark.parametrize("stem", MX_INTS + MX_FLOATS)
def test_round_to_grid_at_the_shared_exponent_is_fake_quantize(stem: str) -> None:
    fmt: Format = parse(f"{stem}@8/mse")
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert same_bits(fmt.round_to_grid(x, fmt.choose(x).unsqueeze(-1)), fmt.fake_quantize(x))
