"""What stands around passes: each a small class with hooks before and after."""

from mxfx.pipeline.instruments.begun import Begun
from mxfx.pipeline.instruments.dump import Dump
from mxfx.pipeline.instruments.ledger import BudgetError, Ledger
from mxfx.pipeline.instruments.numerics import Numbers, NumericsError
from mxfx.pipeline.instruments.reproduce import Reproduce
from mxfx.pipeline.instruments.timing import Timing
from mxfx.pipeline.instruments.verify import Verify

__all__ = ["Begun", "BudgetError", "Dump", "Ledger", "Numbers", "NumericsError", "Reproduce", "Timing", "Verify"]
