"""The words of the printed form: dtypes, modules of functions, the section of nodes outside any module."""

from __future__ import annotations

import operator

import torch

import mxfx.ops
from mxfx.graph.fake import SIZES
from mxfx.ground.errors import MxfxError

VERSION = 1

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
MODULES = {"operator": operator, "runtime": mxfx.ops, "sizes": SIZES}
OUTSIDE = ""


class TextError(MxfxError, ValueError):
    """A text that is no printed program, or one that does not fit the weights; the message starts with its line."""


class HashMismatch(TextError):
    """A weight of the store is not the one that the text names."""
