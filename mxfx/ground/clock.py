"""Where the time of a run goes: each part of it under a name, without what parts inside it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Spent:
    """Wall seconds, and seconds of processor time of all threads of this process."""

    seconds: float = 0.0
    processor_seconds: float = 0.0


@dataclass
class Clock:
    """Times parts of a run by name, in the order in which they first began; parts of one name are summed.

    A part that begins inside another stops the other's clock, so that parts add up to the whole.
    """

    parts: dict[str, Spent] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def running(self) -> Iterator[Clock]:
        """``part`` means this clock until the block ends."""
        token = _RUNNING.set(self)
        try:
            yield self
        finally:
            _RUNNING.reset(token)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._stop()
        self._open.append(name)
        self.parts.setdefault(name, Spent())
        try:
            yield
        finally:
            self._stop()
            self._open.pop()

    def _stop(self) -> None:
        """Give the part that is open what passed since somebody last looked."""
        now = (time.perf_counter(), time.process_time())
        if self._open:
            spent = self.parts[self._open[-1]]
            spent.seconds += now[0] - self._since[0]
            spent.processor_seconds += now[1] - self._since[1]
        self._since = now


_RUNNING: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def part(name: str) -> Iterator[None]:
    """The block under this name on the clock that runs; nothing where none does."""
    clock = _RUNNING.get()
    if clock is None:
        yield
        return
    with clock.part(name):
        yield
