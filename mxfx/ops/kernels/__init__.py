"""Kernels as providers of dialect ops. Importing this package makes their ops; it needs no Triton."""

import mxfx.ops.kernels.packed  # noqa: F401  (registers ops and providers)
from mxfx.ops.kernels.library import kernel

__all__ = ["kernel"]
