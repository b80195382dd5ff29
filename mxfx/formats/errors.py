"""The one error of this room."""


class FormatError(ValueError):
    """A format that does not exist, or a tensor that a format cannot take; says what was expected."""
