"""What an MX format is: parse it, round onto its grid, encode, decode, pack. Knows torch only."""

from mxfx.formats.e4m3 import E4M3, BlockRule
from mxfx.formats.e8m0 import E8M0, NAN_EXPONENT, ScaleRule
from mxfx.formats.element import Element, FloatElement, IntElement
from mxfx.formats.errors import FormatError
from mxfx.formats.format import Encoded, Format
from mxfx.formats.parse import parse
from mxfx.formats.scale import Scale

__all__ = [
    "E4M3",
    "E8M0",
    "NAN_EXPONENT",
    "BlockRule",
    "Element",
    "Encoded",
    "FloatElement",
    "Format",
    "FormatError",
    "IntElement",
    "Scale",
    "ScaleRule",
    "parse",
]
