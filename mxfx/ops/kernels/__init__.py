"""Triton kernels as providers of dialect ops. Importing this package registers them; it needs no Triton."""

import mxfx.ops.kernels.packed  # noqa: F401  (registers ops and providers)
from mxfx.ops.kernels.providers import PROVIDERS

__all__ = ["PROVIDERS"]
