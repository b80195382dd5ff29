"""Codes of four bits as bfloat16, two at a time, by their bits; every result is exact.

Importable only where `triton` is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfx.ops.kernels.rounding_triton import _PACKS


@triton.constexpr_function
def _four_bits(part):
    """Two codes, nibble `part` of two halfwords, as bfloat16: 128 + (code + 8) by its bits, less 136; then scaled.

    By FMA alone, which is exact here: bfloat16 is subtracted and multiplied only since Hopper.
    """
    return (
        "{.reg .b32 x, c, one, less, zero; mov.b32 c, 0x43084308; mov.b32 one, 0x3f803f80; mov.b32 less, 0xc308c308; "
        "mov.b32 zero, 0x80008000; shr.b32 x, $1, "
        + str(4 * part)
        + "; lop3.b32 x, x, 0x000f000f, c, 0x6a; fma.rn.bf16x2 x, x, one, less; fma.rn.bf16x2 $0, x, $2, zero;}"
    )


@triton.jit
def nibbles(halfwords, scale, part: tl.constexpr, dtype: tl.constexpr):
    """Integers number `part` of int16 halfwords, four to each, times bfloat16 scales of the same shape.

    `dtype` is bfloat16; the interpreter, which cannot multiply tiles of it, may ask for float32.
    """
    if _PACKS:
        values = tl.inline_asm_elementwise(
            _four_bits(part), "=r,r,r", [halfwords, scale], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        # Beside 128 the last bits of a bfloat16 are units: 128 + (code + 8).
        shifted = (((halfwords.to(tl.int32) >> (4 * part)) & 0xF) ^ 0x4308).to(tl.int16).to(tl.bfloat16, bitcast=True)
        values = ((shifted.to(tl.float32) - 136.0) * scale.to(tl.float32)).to(dtype)
    return values


@triton.jit
def held(x):
    """int16 `x`, of which the compiler does not know that it was loaded.

    It would lay operands of products out for loads of so few bits, and move codes between lanes to get there.
    """
    if _PACKS:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int16, is_pure=False, pack=2)
    return x


@triton.jit
def narrow_power(biased):
    """2^(biased - 127) as bfloat16 for E8M0 bytes, int16; infinity for 255, whose codes are zero: a product is NaN."""
    if _PACKS:
        powers = tl.inline_asm_elementwise(
            "{.reg .b32 x, c; mov.b32 c, 0x00400040; shl.b32 x, $1, 7; max.u16x2 $0, x, c;}",
            "=r,r", [biased], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        powers = tl.maximum(biased << 7, 0x40).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return powers


@triton.constexpr_function
def _four_bit_floats(part):
    """Two codes of E2M1, nibble `part` of two halfwords, as bfloat16: their bits below the exponent, times 2^126."""
    shift, up = 6 - 4 * part, 12 - 4 * part
    return (
        "{.reg .b32 x, s, c, zero; mov.b32 zero, 0x80008000; "
        + (f"shl.b32 x, $1, {shift}; " if shift > 0 else f"shr.b32 x, $1, {-shift}; ")
        + f"shl.b32 s, $1, {up}; and.b32 s, s, 0x80008000; mov.b32 c, 0x01c001c0; lop3.b32 x, x, c, s, 0xea; "
        + "mov.b32 c, 0x7e807e80; fma.rn.bf16x2 x, x, c, zero; fma.rn.bf16x2 $0, x, $2, zero;}"
    )


@triton.jit
def float_nibbles(halfwords, scale, part: tl.constexpr, dtype: tl.constexpr):
    """As `nibbles`, of E2M1."""
    if _PACKS:
        values = tl.inline_asm_elementwise(
            _four_bit_floats(part), "=r,r,r", [halfwords, scale], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        code = halfwords.to(tl.int32) >> (4 * part)
        bits = ((code & 7) << 6) | ((code & 8) << 12)
        values = (bits << 16).to(tl.float32, bitcast=True) * 2.0**126 * scale.to(tl.float32)
        values = values.to(dtype)
    return values
