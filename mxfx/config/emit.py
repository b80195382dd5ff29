"""The last stage of every pipeline: what makes a program run on a device. Added visibly, as the raise passes are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

#: Transforms first: each of the others takes a transform in with its quantizer.
FUSIONS = ("fuse-hadamard-quant", "fuse-norm-quant", "fuse-activation-quant", "fuse-rope-quant")

#: The passes that serve every device. What they leave is saved, and emitted for the device where it is opened.
PORTABLE = frozenset({"insert-kv-cache", "select-logits", "pack-weights"})

#: Every pass that the stage may hold. A new one stands here and in ``emit_stage``.
EMIT_PASSES = frozenset(
    {
        *PORTABLE,
        "unpack-weights",
        *FUSIONS,
        "lower",
        "multiply-in-fp8",
        "fuse-quant-linear",
        "fuse-residual-norm",
        "fuse-heads",
        "fold-constants",
    }
)


@dataclass(frozen=True)
class EmitConfig:
    """What the emitted graph is made for.

    device: whose kernels are chosen, ``cpu`` or ``cuda``; the run's device if not given. Kernels also run elsewhere, by
        their definitions.
    packed: rounded weights are held as packed codes and scales instead of as numbers in the model's dtype; the logits
        are the same.
    sums: how FP8 tensor cores add, ``exact`` or ``fast``: an option of ``multiply-in-fp8``.
    """

    device: Literal["cpu", "cuda"] | None = None
    packed: bool = True
    sums: Literal["exact", "fast"] = "exact"


def emit_stage(settings: EmitConfig, device: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Names and options of the passes of the stage, in order; ``device`` is the type of the run's device."""
    target = settings.device or ("cuda" if device == "cuda" else "cpu")
    stage: list[tuple[str, Mapping[str, Any]]] = [("insert-kv-cache", {}), ("select-logits", {})]
    if settings.packed:
        stage.append(("pack-weights", {}))
        if target == "cpu":
            # Saved packed; without a kernel a CPU multiplies faster than it decodes.
            stage.append(("unpack-weights", {"unserved": True}))
        else:
            # A kernel reads the whole matrix of a transform, a few kilobytes, in each of its programs.
            stage.append(("unpack-weights", {"select": "type: mx_decode"}))
    stage += [(name, {}) for name in FUSIONS]
    stage.append(("lower", {"device": target}))
    if target == "cuda":
        stage.append(("multiply-in-fp8", {} if settings.sums == "exact" else {"sums": settings.sums}))
        stage += [(name, {}) for name in ("fuse-quant-linear", "fuse-residual-norm", "fuse-heads")]
    return [*stage, ("fold-constants", {})]


def emit_start(names: Sequence[str]) -> int:
    """Where the emit stage begins among the names of a pipeline's passes: their number if there is none."""
    start = len(names)
    while start and names[start - 1] in EMIT_PASSES:
        start -= 1
    return start
