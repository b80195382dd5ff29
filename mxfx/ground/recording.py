"""CUDA graphs: what launches many small kernels, run for real and then recorded, to be replayed as one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from mxfx.ground import ranks

Found = TypeVar("Found")


def record(
    run: Callable[[], Found], device: torch.device, ready: Callable[[], None] = lambda: None
) -> tuple[torch.cuda.CUDAGraph, Found]:
    """A CUDA graph of ``run``, and what it gave: tensors that each replay writes anew.

    Before it is recorded it runs twice (kernels compile, libraries make their workspaces) on a stream aside, as
    recording demands; then ``ready`` is called.
    """
    with torch.cuda.device(device):
        current, aside = torch.cuda.current_stream(), _aside(torch.cuda.current_device())
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
        current.wait_stream(aside)
        ready()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode=ranks.recording()):
            found = run()
    return graph, found


@cache
def _aside(index: int) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace, 32 MiB on Hopper, for each stream that it has ever seen."""
    return torch.cuda.Stream(index)
