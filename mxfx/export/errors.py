"""What a target cannot express, or failed to prove."""

from __future__ import annotations

from mxfx.ground.errors import MxfxError


class ExportError(MxfxError, ValueError):
    """A program cannot be written for a target; the message says what stands against it and what to do."""
