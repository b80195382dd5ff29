"""The dialect's widths -> formats: ``weight_width = 4``, ``weight_block_size = 32`` of ``mxint`` is
``mxint4@32/ceil``. A width of 16 bits or more leaves the operand in the model's precision.

The tutorial's MXINT takes the step from ceil(log2 amax), hence ``/ceil``. Its MXFP becomes OCP MX v1.0 with
the default rule; its own element coder loses carries and subnormals and reaches past OCP's largest values,
which is not imitated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mxfx.compat.table import Table
from mxfx.config import options
from mxfx.config.locate import Cursor
from mxfx.formats import Format

_MXFP = {
    (4, 3): "mxfp8_e4m3",
    (5, 2): "mxfp8_e5m2",
    (3, 2): "mxfp6_e3m2",
    (2, 3): "mxfp6_e2m3",
    (2, 1): "mxfp4_e2m1",
    # Not OCP's, with every code a finite number.
    (3, 4): "mxfp8_e3m4",
    (1, 2): "mxfp4_e1m2",
}

#: From here on the dialect means the model's own precision.
_LEFT_ALONE = 16

#: Keys under which a minifloat's exponent and fraction come as one token.
_TOKENS = ("vector_format", "fp_format", "format")
_TOKEN = re.compile(r"FP_E(\d+)M(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Written:
    """A format in mxfx's notation, and the key that gave its width."""

    text: str
    at: Cursor

    @property
    def element(self) -> str:
        """The format without its scale rule."""
        return self.text.partition("/")[0]


def read_format(table: Table, operand: str, family: str, *, search: bool = False) -> Written | None:
    """The format of ``operand`` (``weight``, ``bias``, ``data_in``) in a table of ``family`` mxint, mxfp or
    minifloat.

    None if the table has none of the operand's keys, or such that leave it as it is (``Table.left`` tells). ``search``
    asks for the scale with the smaller error (``/mse``).

    Raises ``ConfigError`` for missing, foreign or impossible widths.
    """
    mine = _keys(operand, family)
    foreign = {key for other in _FAMILIES for key in _keys(operand, other)} - set(mine)
    table.refuse({key: f"{family} takes {' and '.join(mine)}" for key in sorted(foreign)})
    kind = _minifloat_kind(table, operand) if family == "minifloat" else ""
    if family == "minifloat" and operand == "data_in":
        token = next((key for key in _TOKENS if key in table), None)
        if token is not None:
            return _from_token(table, token, kind)
    if not any(key in table for key in mine):
        for key in mine:
            table.take(key, int)
        return None
    widths = [table.need(key, int) for key in mine]
    if family == "mxint" and widths[0] >= _LEFT_ALONE:
        table.left.add(operand)
        return None
    at = table.at / mine[0]
    written = Written(_text(family, widths, table, mine, search) + kind, at)
    options.read(Format, written.text, at)
    return written


_FAMILIES = ("mxint", "mxfp", "minifloat")


def _keys(operand: str, family: str) -> tuple[str, ...]:
    """The keys of an operand, the one that an error about the format points at first."""
    floats = (f"{operand}_exponent_width", f"{operand}_frac_width")
    if family == "mxint":
        return (f"{operand}_width", f"{operand}_block_size")
    return (*floats, f"{operand}_block_size") if family == "mxfp" else floats


def _text(family: str, widths: list[int], table: Table, keys: tuple[str, ...], search: bool) -> str:
    if family == "mxint":
        _check_mxint_width(widths[0], table, keys[0])
        return f"mxint{widths[0]}@{widths[1]}/{'mse' if search else 'ceil'}"
    exponent, fraction = widths[:2]
    if family == "minifloat":
        return f"minifloat_e{exponent}m{fraction}"
    if (exponent, fraction) not in _MXFP:
        names = ", ".join(f"E{e}M{f}" for e, f in _MXFP)
        table.fail(
            keys[0],
            f"E{exponent}M{fraction} is no element of an MXFP format",
            f"one of {names}",
        )
    return f"{_MXFP[exponent, fraction]}@{widths[2]}" + ("/mse" if search else "")


def _check_mxint_width(width: int, table: Table, key: str) -> None:
    if not 2 <= width <= 8:
        hint = f"a {key} of {_LEFT_ALONE} or more keeps the operand in the model's precision"
        raise (table.at / key).error(f"{key} = {width}: there is no mxint{width}", "2 to 8 bits", hint)


def _minifloat_kind(table: Table, operand: str) -> str:
    """What the name of a minifloat ends in: codes for Inf and NaN (not produced), and how it rounds."""
    finite = table.take(f"{operand}_is_finite", bool, True)
    mode = table.take(f"{operand}_round_mode", Literal["rn", "rd", "ru", "rz"], "rn")
    return ("" if finite else "_ieee") + ("" if mode == "rn" else f"/{mode}")


def _from_token(table: Table, key: str, kind: str) -> Written | None:
    """``FP_E6M5`` under one of ``_TOKENS``; ``BF16`` leaves the operand as it is."""
    token, at = table.take(key, str), table.at / key
    if token.upper() == "BF16":
        table.left.add("data_in")
        return None
    found = _TOKEN.fullmatch(token)
    if found is None:
        raise at.error(f"{key} = {token!r} is no format of the vector unit", "FP_EXMY, such as FP_E6M5, or BF16")
    written = Written(f"minifloat_e{found[1]}m{found[2]}{kind}", at)
    options.read(Format, written.text, at)
    return written
