"""Copies between host and device that go on beside the work: buffers of pinned memory, one stream for each direction.

Without CUDA the same calls copy at once, so that what is scheduled here is the same on every device.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

#: Batches whose results may wait for their way to the host: one on its way, one behind it.
_BEHIND = 2
#: Bytes of a weight that are copied at a time, and the buffers for them: one is filled while others are on their way.
_PIECE = 32 << 20
_PIECES = 3
_T = TypeVar("_T")


@dataclass(frozen=True)
class Layout:
    """What a tensor is beside its bytes."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a dense copy: its own strides where no memory lies between or under two elements."""
        dense = torch.empty_like(tensor, device="meta")
        return cls(tensor.shape, dense.stride(), tensor.dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def over(self, buffer: Tensor) -> Tensor:
        """The bytes of a buffer as such a tensor."""
        return buffer.view(self.dtype).as_strided(self.shape, self.stride)


class HostBuffers:
    """Host memory by size, pinned where a device copies from it; what is given back is used again.

    Pinning costs more than a copy, so that buffers stay until ``close``. Where no memory can be pinned any more, the
    rest is not, and its copies wait for the host: ``refused`` says why.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._lock = Lock()
        self.bytes = 0
        self.refused = ""

    def take(self, nbytes: int) -> Tensor:
        with self._lock:
            if self._free[nbytes]:
                return self._free[nbytes].pop()
            self.bytes += nbytes
        if self._pinned:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._pinned, self.refused = False, str(error).partition("\n")[0]
        return torch.empty(nbytes, dtype=torch.uint8)

    def give(self, buffer: Tensor) -> None:
        with self._lock:
            self._free[buffer.nbytes].append(buffer)

    def close(self) -> None:
        self._free.clear()
        self.bytes = 0


class Arrival:
    """A tensor on its way to the device."""

    def __init__(self, tensor: Tensor, done: torch.cuda.Event | None = None, issued: Future | None = None) -> None:
        self._tensor = tensor
        self._done = done
        self._issued = issued

    def get(self) -> Tensor:
        """The tensor; work that follows on the current stream waits until it is there."""
        if self._issued is not None:
            self._done = self._issued.result()
        if self._done is not None:
            torch.cuda.current_stream(self._tensor.device).wait_event(self._done)
        return self._tensor


class Transfers:
    """Copies to and from one device. Copies of one direction keep their order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams = device.type == "cuda"
        self.buffers = HostBuffers(pinned=self.streams)
        self._up = torch.cuda.Stream(device) if self.streams else None
        self._down = torch.cuda.Stream(device) if self.streams else None
        self._leaving: deque[list[tuple[torch.cuda.Event, Tensor]]] = deque([[]])
        self._worker: ThreadPoolExecutor | None = None

    def up(self, source: Tensor, layout: Layout, after: torch.cuda.Event | None = None) -> Arrival:
        """Begin to copy from a buffer to a new tensor, once ``after`` has happened."""
        target = layout.empty(self.device)
        if self._up is None:
            target.copy_(layout.over(source))
            return Arrival(target)
        # What used the target's memory before is still to run on the current stream.
        self._up.wait_event(self._now())
        if after is not None:
            self._up.wait_event(after)
        return Arrival(target, self._copy(self._up, target, layout.over(source)))

    def down(self, source: Tensor, buffer: Tensor, layout: Layout) -> torch.cuda.Event | None:
        """Begin to copy a tensor to a buffer, once it is computed; the event says when it is there."""
        target = layout.over(buffer)
        if self._down is None:
            target.copy_(source)
            return None
        self._down.wait_event(self._now())
        done = self._copy(self._down, target, source)
        self._leaving[-1].append((done, source))
        return done

    def end_of_batch(self) -> None:
        """Let the device's memory hold the results of no more than a few batches that wait for their way down."""
        self._leaving.append([])
        while len(self._leaving) > _BEHIND:
            for done, _ in self._leaving.popleft():
                done.synchronize()

    def settle(self) -> None:
        """Wait until nothing is left on the device that only waits for its way down."""
        for batch in self._leaving:
            for done, _ in batch:
                done.synchronize()
        self._leaving = deque([[]])

    def staged_up(self, source: Tensor) -> Arrival:
        """Begin to copy a tensor that lies anywhere in host memory, or in a file mapped there, to the device."""
        if source.device.type == self.device.type:
            return Arrival(source.to(self.device))
        layout = Layout.of(source)
        target = layout.empty(self.device)
        dense = source if source.stride() == layout.stride else None
        ready = self._now() if self._up is not None else None

        def task() -> torch.cuda.Event | None:
            # Copied in memory's order: what has holes between its elements loses them first.
            whole = _bytes_of(layout.empty(source.device).copy_(source) if dense is None else dense)
            return self._pieces_up(whole, _bytes_of(target), ready)

        return Arrival(target, issued=self.work(task))

    def _pieces_up(self, source: Tensor, target: Tensor, ready: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """In the worker: bytes through a few small pinned buffers, of which one is filled while others travel."""
        if self._up is None or ready is None:
            target.copy_(source)
            return None
        # What used the target's memory before may still run.
        self._up.wait_event(ready)
        travelling: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        for start in range(0, source.numel(), _PIECE):
            buffer = self._reused(travelling) if len(travelling) == _PIECES else self.buffers.take(_PIECE)
            piece = source[start : start + _PIECE]
            filled = buffer[: piece.numel()].copy_(piece)
            travelling.append((self._copy(self._up, target[start : start + _PIECE], filled), buffer))
        done = travelling[-1][0] if travelling else None
        # Nobody waits for the worker; and neither buffers nor the target may go before the copies are done.
        while travelling:
            self.buffers.give(self._reused(travelling))
        return done

    @staticmethod
    def _reused(travelling: deque[tuple[torch.cuda.Event, Tensor]]) -> Tensor:
        """The buffer that has been on its way longest, once it is read."""
        done, buffer = travelling.popleft()
        done.synchronize()
        return buffer

    def deliver(self, read: Callable[[], Tensor], target: Tensor, layout: Layout) -> Future:
        """Let the worker fill a buffer by ``read`` and copy it to ``target``; its result is when that is done."""
        ready = self._now() if self._up is not None else None

        def task() -> torch.cuda.Event | None:
            buffer = read()
            if self._up is None or ready is None:
                target.copy_(layout.over(buffer))
                done = None
            else:
                # What used the target's memory before may still run.
                self._up.wait_event(ready)
                done = self._copy(self._up, target, layout.over(buffer))
                # Nobody waits for the worker; and the buffer must not change before it was read.
                done.synchronize()
            self.buffers.give(buffer)
            return done

        return self.work(task)

    def work(self, task: Callable[[], _T]) -> Future[_T]:
        """Let the worker thread do something; it does one thing after the other."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="mxfx-transfers")
        return self._worker.submit(task)

    def close(self) -> None:
        """Wait for what is on its way, and let go of the buffers."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        self.settle()
        self.buffers.close()

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return done


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor, in the order of memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
