"""From the written form of a format, such as `mxint4@32/mse`, to the value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from mxfx.formats.e4m3 import E4M3, NVFP4_BLOCK, NVFP4_ELEMENT, BlockRule
from mxfx.formats.e8m0 import E8M0, ScaleRule
from mxfx.formats.element import Element, FloatElement, IntElement, Rounding
from mxfx.formats.errors import FormatError
from mxfx.formats.format import Format
from mxfx.formats.scale import Scale
from mxfx.ground.nearest import nearest


@dataclass(frozen=True)
class _Stem:
    """What stands before `@`: the element; its scales by rule, the default first; the only block size, if there is
    one.
    """

    element: Element
    scales: Mapping[str, Scale]
    block: int | None = None


# Not of the class: torch.compile on torch 2.11 cannot trace one as an iterable.
_E8M0 = {str(rule): E8M0(rule) for rule in ScaleRule.__members__.values()}
_E4M3 = {str(rule): E4M3(rule) for rule in BlockRule.__members__.values()}

STEMS: dict[str, _Stem] = {
    **{f"mxint{bits}": _Stem(IntElement(bits), _E8M0) for bits in range(2, 9)},
    "mxfp4_e2m1": _Stem(FloatElement(2, 1), _E8M0),
    "mxfp4_e1m2": _Stem(FloatElement(1, 2), _E8M0),
    "mxfp6_e3m2": _Stem(FloatElement(3, 2), _E8M0),
    "mxfp6_e2m3": _Stem(FloatElement(2, 3), _E8M0),
    "mxfp8_e4m3": _Stem(FloatElement(4, 3, reserved_codes=1), _E8M0),
    "mxfp8_e5m2": _Stem(FloatElement(5, 2, reserved_codes=4), _E8M0),
    "mxfp8_e3m4": _Stem(FloatElement(3, 4), _E8M0),
    "nvfp4": _Stem(NVFP4_ELEMENT, _E4M3, NVFP4_BLOCK),
}

_WRITTEN = re.compile(r"(?P<stem>[^@/]*)(?:@(?P<block>[^@/]*))?(?:/(?P<rule>[^@/]*))?")
_MINIFLOAT = re.compile(r"minifloat_e(\d+)m(\d+)(_ieee)?")
_ROUNDINGS: tuple[Rounding, ...] = ("rn", "rd", "ru", "rz")
_BLOCK = re.compile(r"[1-9]\d{0,5}")
_EXPECTED = "expected ELEMENT@BLOCK or ELEMENT@BLOCK/RULE, such as mxint4@32/mse, nvfp4, or minifloat_eXmY"


@lru_cache(maxsize=256)
def parse(text: str) -> Format:
    """The format that `text` names.

    `ELEMENT@BLOCK[/RULE]` with an element of `mxint2` … `mxint8`, `mxfp4_e2m1`, `mxfp6_e3m2`, `mxfp6_e2m3`,
    `mxfp8_e4m3`, `mxfp8_e5m2` (OCP), `mxfp4_e1m2`, `mxfp8_e3m4` (not OCP), a block of 1 to 999999 elements and a rule
    of `floor` (the default), `rceil`, `even`, `ceil`, `mse`; `nvfp4[@16]` with a rule of `six` (the default) or
    `four-over-six`; or `minifloat_eXmY`, with `_ieee` behind it where the highest exponent stands for Inf and NaN, and
    `/rd`, `/ru`, `/rz` where it rounds down, up or towards zero. `str(parse(text))` is the canonical form.

    Raises:
        FormatError: names the part that is wrong and the nearest format that exists.
    """
    parts = _WRITTEN.fullmatch(text)
    if parts is None:
        raise FormatError(f"unknown format {text!r}: {_EXPECTED}")
    if text.startswith("minifloat"):
        return _parse_minifloat(text, parts)
    stem, block, rule = parts["stem"], parts["block"], parts["rule"]
    if stem not in STEMS:
        raise _error(text, f"no element type {stem!r}", parts)
    known = STEMS[stem]
    if block is None and known.block is None:
        raise _error(text, "the block size is missing", parts)
    if block is not None and _BLOCK.fullmatch(block) is None:
        raise _error(text, f"the block size {block!r} is no whole number from 1 to 999999", parts)
    if block is not None and known.block not in (None, int(block)):
        raise _error(text, f"{stem} has blocks of {known.block}", parts)
    if rule is not None and rule not in known.scales:
        raise _error(text, f"no scale rule {rule!r} (there are {', '.join(known.scales)})", parts)
    scale = next(iter(known.scales.values())) if rule is None else known.scales[rule]
    return Format(known.element, known.block or int(block or 0), scale)


def _parse_minifloat(text: str, parts: re.Match[str]) -> Format:
    widths, rounding = _MINIFLOAT.fullmatch(parts["stem"]), parts["rule"] or "rn"
    if widths is None:
        raise FormatError(f"unknown format {text!r}: expected minifloat_eXmY, such as minifloat_e3m4")
    if parts["block"] is not None or rounding not in _ROUNDINGS:
        reason = "a minifloat has no shared scale, so neither block size nor rule but how it rounds: /rd, /ru or /rz"
        raise FormatError(f"unknown format {text!r}: {reason}; did you mean {parts['stem']!r}?")
    exponent_bits, mantissa_bits = int(widths[1]), int(widths[2])
    # The codes of the highest exponent are Inf and NaN, as in IEEE 754.
    reserved = 2**mantissa_bits if widths[3] else 0
    try:
        return Format(FloatElement(exponent_bits, mantissa_bits, reserved, rounding), None)
    except FormatError as error:
        raise FormatError(f"unknown format {text!r}: {error}") from None


def _error(text: str, reason: str, parts: re.Match[str]) -> FormatError:
    stem = _nearest(parts["stem"].lower(), list(STEMS), "mxint4")
    block = f"@{parts['block'] if _BLOCK.fullmatch(parts['block'] or '') else 32}"
    if STEMS[stem].block is not None:
        block = ""
    rules = list(STEMS[stem].scales)
    rule = "" if parts["rule"] is None else "/" + _nearest(parts["rule"].lower(), rules, rules[0])
    return FormatError(f"unknown format {text!r}: {reason}; did you mean {f'{stem}{block}{rule}'!r}? ({_EXPECTED})")


def _nearest(given: str, valid: list[str], otherwise: str) -> str:
    longer = [name for name in valid if given and name.startswith(given)]
    return next(iter(longer), None) or nearest(given, valid, cutoff=0.3) or otherwise
