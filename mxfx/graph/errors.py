"""What goes wrong between a model and its program."""

from __future__ import annotations

from mxfx.ground.errors import MxfxError


class TraceError(MxfxError, ValueError):
    """The model cannot be traced; the message says which part and why."""
