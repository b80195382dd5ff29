"""Programs: what a traced model is, before and after every pass."""

import mxfx.ops  # noqa: F401  (every program speaks the dialect)
