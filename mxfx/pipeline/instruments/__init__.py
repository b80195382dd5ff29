"""What stands around passes: each a small class with hooks before and after."""

from mxfx.pipeline.instruments.numerics import Numbers, NumericsError
from mxfx.pipeline.instruments.timing import Timing
from mxfx.pipeline.instruments.verify import Verify

__all__ = ["Numbers", "NumericsError", "Timing", "Verify"]
