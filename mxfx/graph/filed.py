"""Tensors whose bytes lie in a file that is mapped: the host holds the pages that are worked on, not all of them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

#: Of glibc's <malloc.h>.
_M_MMAP_THRESHOLD = -3
#: Smaller tensors stay in memory.
LARGE = 1 << 20


class Files:
    """Makes such tensors in a folder. Their files have no name there: they go when the tensor goes, or the process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # Freed tensors go back to the system: in glibc's own heap each of them would leave a hole that the next, beside
        # some small object that stays, does not fit in.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the CPU; small ones as they are."""
        if tensor.nbytes < LARGE:
            return tensor
        tensor = short(tensor)
        mapped, memory = self._map(tensor.shape, tensor.dtype)
        mapped.copy_(tensor)
        # Out of this process' memory; they stay in the system's cache of the file as long as it has room.
        memory.madvise(mmap.MADV_DONTNEED)
        return mapped

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor to be filled."""
        return self._map(shape, dtype)[0] if shape.numel() else torch.empty(shape, dtype=dtype)

    def _map(self, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, mmap.mmap]:
        size = shape.numel() * dtype.itemsize
        with tempfile.TemporaryFile(dir=self._folder, prefix="weight-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            memory = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(memory, dtype=dtype, count=shape.numel()).view(shape), memory


def short(tensor: Tensor) -> Tensor:
    """A float32 tensor in bfloat16 where that loses nothing, as of weights on a grid of few bits."""
    if tensor.dtype != torch.float32:
        return tensor
    found = tensor.to(torch.bfloat16)
    return found if torch.equal(found.float(), tensor) else tensor
