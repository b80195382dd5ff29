"""What a pass promises about the numbers that the program computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exact:
    """Bit-equal logits before and after."""


@dataclass(frozen=True)
class Close:
    """Equal as real functions: on the float64 twin, ``‖Δ‖_F / ‖y‖_F`` of the probe logits stays below ``tol``."""

    tol: float = 1e-9


@dataclass(frozen=True)
class Local:
    """Each rewritten region agrees with its original on recorded inputs to ``tol`` (‖Δ‖_F / ‖y‖_F)."""

    tol: float = 1e-2


@dataclass(frozen=True)
class Lossy:
    """Changes the numbers on purpose: recorded in the error ledger, held to a budget where one is set."""


Numerics = Exact | Close | Local | Lossy
