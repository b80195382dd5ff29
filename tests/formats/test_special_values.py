"""NaN, infinities, zeros, subnormals, ragged tails, axes, layouts and dtypes."""

import pytest
import torch

from mxfx.formats import NAN_EXPONENT, FormatError, parse
from tests.formats.reference import MX_FLOATS, MX_INTS, RULES, same_bits

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMATS = [f"{stem}@4/{rule}" for stem in ("mxint2", "mxint4", "mxint8", "mxfp4_e2m1", "mxfp8_e5m2") for rule in RULES]


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_or_inf_makes_its_block_nan_and_no_other(text: str, dtype: torch.dtype, poison: float) -> None:
    fmt = parse(text)
    clean = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = clean.clone()
    x[1, 6] = poison
    expected = fmt.fake_quantize(clean)
    expected[1, 4:8] = float("nan")
    assert same_bits(fmt.fake_quantize(x), expected)
    encoded = fmt.encode(x)
    assert encoded.scales is not None
    assert (encoded.scales == 255).tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert encoded.codes[1, 4:8].tolist() == [0, 0, 0, 0]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert fmt.choose(x.to(compute).unflatten(-1, (3, 4)))[1, 1] == NAN_EXPONENT


@pytest.mark.parametrize("stem", MX_INTS + MX_FLOATS)
@pytest.mark.parametrize("rule", RULES)
def test_a_zero_block_stays_zero_and_only_floats_keep_its_sign(stem: str, rule: str) -> None:
    x = torch.tensor([0.0, -0.0, 0.0, -0.0])
    expected = x if stem in MX_FLOATS else torch.zeros(4)
    assert same_bits(parse(f"{stem}@4/{rule}").fake_quantize(x), expected)


def test_a_negative_number_that_rounds_to_zero_keeps_its_sign_in_float_elements_only() -> None:
    x = torch.tensor([1.0, -1e-3])
    assert same_bits(parse("mxfp4_e2m1@2").fake_quantize(x), torch.tensor([1.0, -0.0]))
    assert same_bits(parse("mxint4@2").fake_quantize(x), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_input_never_gives_infinity(text: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest, 1.0, 0.0], [largest * 0.51, -largest * 0.99, 0.0, 0.0]], dtype=dtype)
    assert parse(text).fake_quantize(x).isfinite().all()


def test_what_rounds_beyond_the_dtype_becomes_its_largest_value() -> None:
    x = torch.tensor([-65504.0, 0.0], dtype=torch.float16)
    assert parse("mxint4@2").fake_quantize(x).tolist() == [-65504.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_that_lie_on_the_grid_are_kept(dtype: torch.dtype) -> None:
    # E8M0 ends at 2^-127 and E5M2 at 2^-16, so float32 and float64 reach below the smallest MX number.
    smallest = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 2.0**-133)
    x = torch.tensor([64, -32, 2, 1], dtype=torch.float64).mul(smallest).to(dtype)
    assert same_bits(parse("mxfp8_e5m2@4").fake_quantize(x), x)


@pytest.mark.parametrize("text", ["mxint4@32/mse", "mxfp4_e2m1@32"])
@pytest.mark.parametrize("length", [1, 31, 33, 95])
def test_a_ragged_tail_is_a_short_block(text: str, length: int) -> None:
    fmt = parse(text)
    x = torch.randn(5, length, generator=torch.Generator().manual_seed(length))
    blocks = [fmt.fake_quantize(part) for part in x.split(32, dim=-1)]
    assert same_bits(fmt.fake_quantize(x), torch.cat(blocks, dim=-1))


@pytest.mark.parametrize("text", ["mxint4@8/mse", "mxfp4_e2m1@8", "minifloat_e3m4"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis_of_any_layout(text: str, axis: int) -> None:
    fmt = parse(text)
    x = torch.randn(11, 7, 20, generator=torch.Generator().manual_seed(0)).permute(2, 0, 1)[::2]
    expected = fmt.fake_quantize(x.movedim(axis, -1).contiguous()).movedim(-1, axis)
    before = x.clone()
    assert same_bits(fmt.fake_quantize(x, axis), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("text", ["mxint4@32/mse", "mxfp8_e4m3@32", "minifloat_e3m4"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_tensor_too_large_for_the_cache_is_rounded_as_its_rows_are(text: str, axis: int) -> None:
    fmt = parse(text)
    x = torch.randn(70, 61, 257, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = fmt.fake_quantize(x, axis).movedim(axis, -1)
    rows = x.movedim(axis, -1)
    assert all(same_bits(whole[row], fmt.fake_quantize(rows[row])) for row in range(0, len(rows), 9))


def test_empty_tensors_stay_empty() -> None:
    for shape in [(0, 32), (4, 0)]:
        assert parse("mxint4@32/mse").fake_quantize(torch.zeros(shape)).shape == shape


def test_a_tensor_that_has_no_numbers_or_no_such_axis_is_refused() -> None:
    fmt = parse("mxint4@32")
    with pytest.raises(FormatError, match=r"not torch\.int64"):
        fmt.fake_quantize(torch.zeros(32, dtype=torch.int64))
    with pytest.raises(FormatError, match=r"axis 2 .* \(4, 32\)"):
        fmt.encode(torch.zeros(4, 32), axis=2)
    with pytest.raises(FormatError, match=r"axis -1 .* \(\)"):
        fmt.fake_quantize(torch.zeros(()))
