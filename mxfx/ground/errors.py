"""One family for every error that mxfx raises on purpose, so that whoever calls it can catch one class."""

from __future__ import annotations

from typing import ClassVar


class MxfxError(Exception):
    """What was given is wrong, or a check does not hold. The message says what was given, where, what was expected.

    ``exit_code`` is what the command line ends with: 2 where the user gave something wrong, 1 where a check stopped
    the run (a promise about numbers, the verifier, a budget, ``--strict``).
    """

    exit_code: ClassVar[int] = 2


class CheckError(MxfxError):
    """A run was stopped because something that was checked does not hold."""

    exit_code: ClassVar[int] = 1


def exit_code(error: BaseException) -> int:
    """The exit code of the innermost error of the family that ``error`` was raised from, or its own."""
    code = error.exit_code if isinstance(error, MxfxError) else 2
    cause = error.__cause__
    return exit_code(cause) if isinstance(cause, MxfxError) else code


def reason_of(error: BaseException) -> str:
    """The first line of what a library's exception says; its kind where it says nothing."""
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__
