"""What SIGINT (ctrl-C) and SIGTERM do to a command: it ends at once, with one line, and leaves no half-written file.

A signal raises ``Stopped`` in the main thread, and what is open there is closed on the way out. That alone would not
do: a call into C that takes minutes comes first, a library's ``except:`` or a ``__del__`` may take the exception, and
Python waits for the work of its threads. A thread that the signal wakes therefore ends the process after ``GRACE``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mxfx.ground.files import remove_unfinished

#: Seconds that the main thread has to end by itself.
GRACE = 2.0
_LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated (SIGTERM)"}
_SHOW_CURSOR = "\x1b[?25h"

#: The signal that came.
_came: list[signal.Signals] = []
_said = threading.Event()
_lost = threading.Event()
#: What ends the process without grace, where others wait for it: signal → exit code.
_at_once: dict[int, Callable[[], int]] = {}


class Stopped(SystemExit):
    """Raised where a signal found the main thread. Its code is 128 and the signal's number, as shells have it."""


def came() -> bool:
    """Whether a signal asked this process to end."""
    return bool(_came)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Signals end what runs in here; SIGINT does not where it was ignored before, as in a shell's background job.

    In a thread that is not the main one this does nothing: signals do not come there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = _listen()
    found = {number: signal.getsignal(number) for number in _LINES}
    hook = sys.unraisablehook
    for number, before in found.items():
        if before is not signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = lambda given: _lost.set() if isinstance(given.exc_value, Stopped) else hook(given)
    try:
        yield
    finally:
        if came():
            # Whatever was made of the exception on its way.
            say()
            raise Stopped(128 + _came[0])
        sys.unraisablehook = hook
        for number, before in found.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(-1)
        told.close()


def end_at_once(number: signal.Signals, last: Callable[[], int]) -> None:
    """Let a signal end the process wherever its main thread waits, for good: ``last`` says why and gives the code."""
    _at_once[number] = last
    signal.signal(number, lambda *_: None)
    _listen()


def say() -> None:
    """Write the one line, unless it was written."""
    if _said.is_set():
        return
    _said.set()
    terminal = sys.stderr.isatty()
    with contextlib.suppress(OSError, ValueError):
        # Behind the terminal's ^C, and under a bar that hid its cursor.
        sys.stderr.write(f"{_SHOW_CURSOR}\n" * terminal + _LINES[_came[0]] + "\n")
        sys.stderr.flush()


def _stop(number: int, _: Any) -> None:
    for one in _LINES:
        signal.signal(one, lambda *_: None)
    _came.append(signal.Signals(number))
    raise Stopped(128 + number)


def _listen() -> socket.socket:
    """Wake a thread with every signal that Python handles."""
    ours, told = socket.socketpair()
    told.setblocking(False)
    os.register_at_fork(after_in_child=_leave)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(ours, told), name="mxfx-signals", daemon=True).start()
    return told


def _leave() -> None:
    """A forked child wakes nobody: a pool that terminates its workers would end this process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(ours: socket.socket, told: socket.socket) -> None:
    while numbers := ours.recv(64):
        for number in numbers:
            if number in _at_once:
                os._exit(_at_once[number]())
            if number in _LINES:
                _lost.wait(GRACE)
                if not _came:
                    # The main thread has not come back to Python.
                    _came.append(signal.Signals(number))
                say()
                remove_unfinished()
                os._exit(128 + number)
