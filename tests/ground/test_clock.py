"""Where time goes: parts of parts are not counted twice, and all parts are the whole."""

from __future__ import annotations

import time

import pytest

from mxfx.ground import clock
from mxfx.ground.clock import Clock, part


class _Hands:
    """Clocks that move when they are told to: wall time twice as fast as the processor's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: 2 * self.now)
        monkeypatch.setattr(clock.time, "process_time", lambda: self.now)


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> _Hands:
    return _Hands(monkeypatch)


def test_a_part_stops_the_clock_of_the_one_around_it(hands: _Hands) -> None:
    with Clock().running() as found:
        hands.now += 100  # in no part
        with part("outer"):
            hands.now += 1
            with part("inner"):
                hands.now += 10
                with part("outer"):
                    hands.now += 3
            hands.now += 2
        with part("inner"):
            hands.now += 5
    assert {name: spent.processor_seconds for name, spent in found.parts.items()} == {"outer": 6, "inner": 15}
    assert {name: spent.seconds for name, spent in found.parts.items()} == {"outer": 12, "inner": 30}


def test_a_part_that_fails_is_counted_and_left(hands: _Hands) -> None:
    with Clock().running() as found, part("outer"):
        with pytest.raises(KeyError), part("inner"):
            hands.now += 4
            raise KeyError
        hands.now += 1
    assert found.parts["inner"].processor_seconds == 4 and found.parts["outer"].processor_seconds == 1


def test_without_a_clock_that_runs_nothing_is_counted() -> None:
    with Clock().running() as found:
        pass
    with part("after"):
        time.sleep(0)
    assert found.parts == {}
