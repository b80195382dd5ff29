"""Triton kernels as providers of dialect ops. Importing this package registers them; it needs no Triton."""

from mxfx.ops.kernels.providers import PROVIDERS

__all__ = ["PROVIDERS"]
