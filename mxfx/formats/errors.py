"""The one error of this room."""

from mxfx.ground.errors import MxfxError


class FormatError(MxfxError, ValueError):
    """A format that does not exist, or a tensor that a format cannot take; says what was expected."""
