"""The written form of formats."""

import pytest
import torch

from mxfx.formats import E8M0, FloatElement, Format, FormatError, IntElement, ScaleRule, parse
from tests.formats.reference import MORE_FLOATS, MX_FLOATS, MX_INTS, RULES


@pytest.mark.parametrize("stem", MX_INTS + MX_FLOATS + MORE_FLOATS)
@pytest.mark.parametrize("rule", RULES)
def test_canonical_text_survives_the_round_trip(stem: str, rule: str) -> None:
    text = f"{stem}@32" if rule == "floor" else f"{stem}@32/{rule}"
    assert str(parse(text)) == text


def test_the_default_rule_is_not_written() -> None:
    assert str(parse("mxint4@32/floor")) == "mxint4@32"
    assert parse("mxint4@32/floor") == parse("mxint4@32")


def test_parse_gives_the_parts() -> None:
    assert parse("mxint4@16/mse") == Format(IntElement(4), 16, E8M0(ScaleRule.MSE))
    assert parse("mxfp6_e3m2@128") == Format(FloatElement(3, 2), 128)
    assert parse("minifloat_e3m4") == Format(FloatElement(3, 4), None)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("mxint4@32", 4.25),
        ("mxint4@16", 4.5),
        ("mxfp6_e2m3@64", 6.125),
        ("mxint8@24", 8 + 1 / 3),
        ("minifloat_e3m4", 8.0),
    ],
)
def test_bits_per_element_count_the_scale(text: str, bits: float) -> None:
    assert parse(text).bits_per_element == bits


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("mxit4@32", "mxint4@32"),
        ("MXINT4@32/mse", "mxint4@32/mse"),
        ("mxint9@16", "mxint8@16"),
        ("mxfp4@32", "mxfp4_e2m1@32"),
        ("mxfp8_e4m3@32/flor", "mxfp8_e4m3@32/floor"),
        ("mxint4@32/rciel", "mxint4@32/rceil"),
        ("mxint4", "mxint4@32"),
        ("mxint4/mse", "mxint4@32/mse"),
        ("mxint4@0", "mxint4@32"),
        ("mxint4@-8", "mxint4@32"),
        ("mxint4@", "mxint4@32"),
        ("minifloat_e3m4@32", "minifloat_e3m4"),
    ],
)
def test_an_unknown_format_is_answered_with_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(FormatError) as raised:
        parse(text)
    assert repr(text) in str(raised.value)
    assert repr(nearest) in str(raised.value)


@pytest.mark.parametrize(
    "text", ["", "int4", "mxint4@32@32", "mxint4@32/mse/mse", "minifloat", "minifloat_e9m3", "minifloat_e8m8"]
)
def test_no_text_but_a_format_is_a_format(text: str) -> None:
    with pytest.raises(FormatError, match="unknown format"):
        parse(text)


@pytest.mark.parametrize("text", ["minifloat_e3m4_ieee", "minifloat_e6m5/rz", "minifloat_e3m4_ieee/rd"])
def test_reserved_codes_and_rounding_of_a_minifloat_survive_the_round_trip(text: str) -> None:
    assert str(parse(text)) == text


def test_a_minifloat_with_codes_for_inf_ends_a_binade_earlier() -> None:
    assert parse("minifloat_e3m4").element.max_value == 31.0
    assert parse("minifloat_e3m4_ieee").element.max_value == 15.5


@pytest.mark.parametrize(
    ("mode", "rounded"),
    [("rd", [1, -1.25, 0, -0.25]), ("ru", [1.25, -1, 0.25, 0]), ("rz", [1, -1, 0, 0]), ("rn", [1.25, -1.25, 0, 0])],
)
def test_a_minifloat_rounds_as_its_name_says(mode: str, rounded: list[float]) -> None:
    values = torch.tensor([1.2, -1.2, 0.01, -0.01])
    found = parse(f"minifloat_e3m2/{mode}").fake_quantize(values)
    step = torch.tensor([1, 1, 0.25, 0.25])
    assert torch.equal(found, torch.tensor(rounded) * torch.where(step == 1, 1.0, 0.25))


def test_a_minifloat_has_neither_rule_nor_integers() -> None:
    with pytest.raises(FormatError, match="scale rule"):
        Format(FloatElement(3, 4), None, E8M0(ScaleRule.MSE))
    with pytest.raises(FormatError, match="block size"):
        Format(IntElement(4), None)
