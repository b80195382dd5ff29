"""What an MX format is: parse it, round onto its grid, encode, decode, pack. Knows torch only."""

from mxfx.formats.element import Element, FloatElement, IntElement
from mxfx.formats.errors import FormatError
from mxfx.formats.format import Encoded, Format
from mxfx.formats.parse import parse
from mxfx.formats.scale import NAN_EXPONENT, ScaleRule

__all__ = [
    "NAN_EXPONENT",
    "Element",
    "Encoded",
    "FloatElement",
    "Format",
    "FormatError",
    "IntElement",
    "ScaleRule",
    "parse",
]
