"""Codes, scales and bytes hold exactly what `fake_quantize` computes."""

import pytest
import torch

from mxfx.formats import FormatError, parse
from tests.formats.reference import MORE_FLOATS, MX_FLOATS, MX_INTS, RULES, same_bits

MINIFLOATS = ("minifloat_e3m4", "minifloat_e1m2", "minifloat_e5m10", "minifloat_e8m7", "minifloat_e2m1")


def wide_tensor(dtype: torch.dtype) -> torch.Tensor:
    """(3, 40, 5): values over many binades, with zeros of both signs, NaN and Inf; 16 does not divide 40."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 5, generator=generator, dtype=torch.float64) * torch.logspace(-9, 4, 40, 2.0)[:, None]
    x[0, :2, 0] = torch.tensor([0.0, -0.0])
    x[1, 3, 2], x[2, 20, 1] = float("nan"), float("inf")
    return x.to(dtype)


@pytest.mark.parametrize("stem", MX_INTS + MX_FLOATS + MORE_FLOATS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_decoded_packed_codes_equal_fake_quantize(stem: str, rule: str, dtype: torch.dtype) -> None:
    fmt = parse(f"{stem}@16/{rule}")
    x = wide_tensor(dtype)
    for axis, scales in [(-1, (3, 40, 1)), (1, (3, 3, 5))]:
        encoded = fmt.encode(x, axis)
        assert encoded.scales is not None
        assert encoded.shape == x.shape and encoded.dtype == dtype and encoded.scales.shape == scales
        assert same_bits(fmt.decode(encoded, dtype), fmt.fake_quantize(x, axis))
        packed = fmt.pack(encoded.codes)
        assert packed.dtype == torch.uint8 and packed.shape == (3, 40, -(-5 * fmt.bits // 8))
        assert torch.equal(fmt.unpack(packed, 5), encoded.codes)


@pytest.mark.parametrize("text", MINIFLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_minifloat_codes_round_trip(text: str, dtype: torch.dtype) -> None:
    fmt = parse(text)
    x = wide_tensor(dtype).nan_to_num(nan=1.0, posinf=float("inf"))
    encoded = fmt.encode(x)
    assert encoded.scales is None
    assert same_bits(fmt.decode(encoded, dtype), fmt.fake_quantize(x))
    assert torch.equal(fmt.unpack(fmt.pack(encoded.codes), 5), encoded.codes)


def test_nan_has_no_minifloat_code() -> None:
    with pytest.raises(FormatError, match="2 of 3 elements are NaN"):
        parse("minifloat_e3m4").encode(torch.tensor([1.0, float("nan"), float("nan")]))


def test_codes_and_scales_of_a_known_block() -> None:
    encoded = parse("mxint4@4").encode(torch.tensor([7.0, -8.0, 2.5, -0.5]))
    assert encoded.codes.tolist() == [4, -4, 1, 0]
    assert encoded.scales is not None and encoded.scales.tolist() == [128]
    encoded = parse("mxfp4_e2m1@4").encode(torch.tensor([6.0, -1.5, 0.5, -0.0]))
    assert encoded.codes.tolist() == [0b0111, 0b1011, 0b0001, 0b1000]
    assert encoded.scales is not None and encoded.scales.tolist() == [127]


def test_four_bit_codes_lie_two_a_byte_the_first_one_low() -> None:
    fmt = parse("mxint4@32")
    assert fmt.pack(torch.tensor([1, -1, 7], dtype=torch.int8)).tolist() == [0xF1, 0x07]
    assert fmt.unpack(torch.tensor([0xF1, 0x07], dtype=torch.uint8), 3).tolist() == [1, -1, 7]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_packing_is_dense_little_endian_at_every_width(bits: int, length: int) -> None:
    fmt = parse(f"mxint{bits}@32")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (2, length), generator=torch.Generator().manual_seed(bits), dtype=torch.int8)
    packed = fmt.pack(codes)
    expected = [sum((code % 2**bits) << (bits * i) for i, code in enumerate(row)) for row in codes.tolist()]
    assert [int.from_bytes(bytes(row), "little") for row in packed.tolist()] == expected
    assert torch.equal(fmt.unpack(packed, length), codes)


def test_pack_and_unpack_refuse_what_is_not_theirs() -> None:
    fmt = parse("mxint4@32")
    with pytest.raises(FormatError, match=r"torch\.int8, not torch\.uint8"):
        fmt.pack(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(FormatError, match="rows of 2 bytes"):
        fmt.unpack(torch.zeros(3, dtype=torch.uint8), 4)
    with pytest.raises(FormatError, match=r"not torch\.int8"):
        fmt.decode(fmt.encode(torch.zeros(4)), torch.int8)
