"""From the written form of a format, such as `mxint4@32/mse`, to the value."""

from __future__ import annotations

import re
from functools import lru_cache

from mxfx.formats.element import Element, FloatElement, IntElement
from mxfx.formats.errors import FormatError
from mxfx.formats.format import Format
from mxfx.formats.scale import ScaleRule
from mxfx.ground.nearest import nearest

MX_ELEMENTS: dict[str, Element] = {
    **{f"mxint{bits}": IntElement(bits) for bits in range(2, 9)},
    "mxfp4_e2m1": FloatElement(2, 1),
    "mxfp6_e3m2": FloatElement(3, 2),
    "mxfp6_e2m3": FloatElement(2, 3),
    "mxfp8_e4m3": FloatElement(4, 3, reserved_codes=1),
    "mxfp8_e5m2": FloatElement(5, 2, reserved_codes=4),
}

_WRITTEN = re.compile(r"(?P<stem>[^@/]*)(?:@(?P<block>[^@/]*))?(?:/(?P<rule>[^@/]*))?")
_MINIFLOAT = re.compile(r"minifloat_e(\d+)m(\d+)")
_BLOCK = re.compile(r"[1-9]\d{0,5}")
_EXPECTED = "expected ELEMENT@BLOCK or ELEMENT@BLOCK/RULE, such as mxint4@32/mse, or minifloat_eXmY"

# Not list(ScaleRule): torch.compile on torch 2.11 cannot trace a class as an iterable.
_RULES = [str(rule) for rule in ScaleRule.__members__.values()]


@lru_cache(maxsize=256)
def parse(text: str) -> Format:
    """The format that `text` names.

    `ELEMENT@BLOCK[/RULE]` with an element of `mxint2` … `mxint8`, `mxfp4_e2m1`, `mxfp6_e3m2`, `mxfp6_e2m3`,
    `mxfp8_e4m3`, `mxfp8_e5m2`, a block of 1 to 999999 elements and a rule of `floor` (the default), `rceil`,
    `even`, `ceil`, `mse`; or `minifloat_eXmY` alone. `str(parse(text))` is the canonical form.

    Raises:
        FormatError: names the part that is wrong and the nearest format that exists.
    """
    parts = _WRITTEN.fullmatch(text)
    if parts is None:
        raise FormatError(f"unknown format {text!r}: {_EXPECTED}")
    if text.startswith("minifloat"):
        return _parse_minifloat(text, parts)
    stem, block, rule = parts["stem"], parts["block"], parts["rule"]
    if stem not in MX_ELEMENTS:
        raise _error(text, f"no element type {stem!r}", parts)
    if block is None:
        raise _error(text, "the block size is missing", parts)
    if _BLOCK.fullmatch(block) is None:
        raise _error(text, f"the block size {block!r} is no whole number from 1 to 999999", parts)
    if rule is not None and rule not in _RULES:
        raise _error(text, f"no scale rule {rule!r} (there are {', '.join(ScaleRule)})", parts)
    return Format(MX_ELEMENTS[stem], int(block), ScaleRule(rule) if rule else ScaleRule.FLOOR)


def _parse_minifloat(text: str, parts: re.Match[str]) -> Format:
    widths = _MINIFLOAT.fullmatch(parts["stem"])
    if widths is None:
        raise FormatError(f"unknown format {text!r}: expected minifloat_eXmY, such as minifloat_e3m4")
    if parts["block"] is not None or parts["rule"] is not None:
        reason = "a minifloat has no shared scale, so neither block size nor rule"
        raise FormatError(f"unknown format {text!r}: {reason}; did you mean {parts['stem']!r}?")
    exponent_bits, mantissa_bits = int(widths[1]), int(widths[2])
    try:
        return Format(FloatElement(exponent_bits, mantissa_bits), None)
    except FormatError as error:
        raise FormatError(f"unknown format {text!r}: {error}") from None


def _error(text: str, reason: str, parts: re.Match[str]) -> FormatError:
    stem = _nearest(parts["stem"].lower(), list(MX_ELEMENTS), "mxint4")
    block = parts["block"] if _BLOCK.fullmatch(parts["block"] or "") else "32"
    rule = "" if parts["rule"] is None else "/" + _nearest(parts["rule"].lower(), _RULES, "floor")
    return FormatError(f"unknown format {text!r}: {reason}; did you mean {f'{stem}@{block}{rule}'!r}? ({_EXPECTED})")


def _nearest(given: str, valid: list[str], otherwise: str) -> str:
    longer = [name for name in valid if given and name.startswith(given)]
    return next(iter(longer), None) or nearest(given, valid, cutoff=0.3) or otherwise
