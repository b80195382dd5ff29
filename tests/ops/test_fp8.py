"""Which formats and which packed weights E4M3 holds by one power of two a row."""

from __future__ import annotations

import pytest
import torch

from mxfx.formats import parse
from mxfx.ops import fp8


@pytest.mark.parametrize("text", ["mxint2@16", "mxint5@32", "mxfp4_e2m1@32", "mxfp6_e2m3@32", "mxfp6_e3m2@32"])
def test_a_format_that_is_carried_leaves_rows_some_octaves(text: str) -> None:
    """The least entry of a block beside its largest, in a row of its own, is held."""
    fmt = parse(text)
    assert fp8.not_carried(fmt) is None
    largest = fmt.element.max_value
    least = 1.0 if text.startswith("mxint") else 2.0 ** (fmt.element.min_exponent - fmt.element.mantissa_bits)  # type: ignore[attr-defined]
    for octaves, held in ((0, True), (fp8.octaves_of(fmt), True), (fp8.octaves_of(fmt) + 8, False)):
        row = torch.tensor([[largest * 2.0**octaves, largest, least]])
        assert torch.equal(fp8.from_rows(*fp8.to_rows(row), torch.float32), row) == held, octaves


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("mxint6@32", "significant bits"),
        ("mxfp8_e3m4@32", "significant bits"),
        ("mxfp8_e4m3@32", "a block may span more octaves"),
        ("mxfp8_e5m2@32", "a block may span more octaves"),
        ("nvfp4", "no blocks with a power of two"),
        ("minifloat_e4m3", "no blocks with a power of two"),
    ],
)
def test_a_format_that_is_not_carried_says_why(text: str, why: str) -> None:
    assert why in str(fp8.not_carried(parse(text)))


def test_rows_of_a_weight_are_held_under_the_power_of_two_that_their_scales_give() -> None:
    """Of a block of few entries the scale counts, not what it holds; a code of 6 may come to lie at 384."""
    fmt = parse("mxint4@2")
    codes = torch.tensor([[0x11, 0x11]] * 3, dtype=torch.uint8)
    scales = torch.tensor([[127 + 14, 127], [127 + 15, 127], [1, 1]], dtype=torch.uint8)
    assert fp8.octaves_beyond(codes, scales, fmt, 4) == 1
    four = parse("mxfp4_e2m1@2")
    scales = torch.tensor([[127 + 14, 127], [127 + 15, 127]], dtype=torch.uint8)
    assert fp8.octaves_beyond(torch.tensor([[0x77, 0x11]] * 2, dtype=torch.uint8), scales, four, 4) == 1
