"""Run a reproducer folder again, and cut it to one layer if it still fails there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx

from mxfx.graph.node import layer_of
from mxfx.graph.program import Program
from mxfx.pipeline.case import Case, CaseError, kind_of
from mxfx.pipeline.instruments import Numbers, Verify
from mxfx.pipeline.manager import PassManager, StopPoint
from mxfx.pipeline.probe import Probe
from mxfx.rewrite import Context
from mxfx.rewrite.rewriter import clean


@dataclass(frozen=True)
class Reproduced:
    """What happened: the failure (None: it ran through), whether it is the recorded one, and the smaller folder."""

    error: Exception | None
    same: bool
    layers: int
    shrunk: Path | None = None

    def __str__(self) -> str:
        said = (
            "ran through: the failure is gone" if self.error is None else f"{type(self.error).__name__}: {self.error}"
        )
        smaller = f"\ncut to {self.layers} layer in {self.shrunk}" if self.shrunk else ""
        return f"{'reproduced' if self.same else 'not reproduced'}: {said}{smaller}"


def fails(case: Case, program: Program, reference: Program | None) -> Exception | None:
    """The exception that running the case's pipeline on ``program`` raises, None if it runs through."""
    tokens = case.tokens
    ctx = Context(seed=case.seed, reference=reference)
    if tokens is not None:
        ctx.tokens = lambda: tokens
        ctx.read = lambda *wanted: tokens
    stop = StopPoint(1, case.limit) if case.limit is not None else None
    probe = Probe(seed=case.seed, ids=case.ids)
    try:
        PassManager([Numbers(), Verify()]).run(program, case.pipeline, ctx, probe=probe, stop_after=stop)
    except Exception as error:
        return error
    return None


def reproduce(folder: str | Path, shrink: bool = False) -> Reproduced:
    """Run what failed again. ``shrink`` looks for one decoder layer on which it still fails, and saves that
    beside it.
    """
    folder = Path(folder)
    case = Case.read(folder)
    error = fails(case, case.program, case.reference)
    same = error is not None and kind_of(error) == case.error
    layers = case.program.layers
    if not (shrink and same and layers > 1):
        return Reproduced(error, same, layers)
    for layer in range(layers):
        program = one_layer(case.program, layer)
        reference = None if case.reference is None else one_layer(case.reference, layer)
        failure = fails(case, program, reference)
        if failure is not None and kind_of(failure) == case.error:
            target = folder / "shrunk"
            replace(case, program=program, reference=reference).save(target, failure)
            return Reproduced(failure, True, 1, target)
    return Reproduced(error, same, layers)


def one_layer(program: Program, layer: int) -> Program:
    """A copy that keeps one decoder layer: what entered the first layer enters it, what left the last leaves it.

    Raises ``CaseError`` if layers are not joined by a single value each.
    """
    result = program.copy()
    first, last = _leaving(result, 0), _leaving(result, program.layers - 1)
    entering = _entering(result, first)
    leaving = _leaving(result, layer)
    if layer > 0:
        above = _leaving(result, layer - 1)
        above.replace_all_uses_with(entering, delete_user_cb=lambda user: layer_of(user) == layer)
    if leaving is not last:
        last.replace_all_uses_with(leaving, delete_user_cb=lambda user: layer_of(user) is None)
    clean(result)
    return result


def _leaving(program: Program, layer: int) -> fx.Node:
    """The one value of a layer that is read outside it."""
    found = [n for n in program.graph.nodes if layer_of(n) == layer and any(layer_of(u) != layer for u in n.users)]
    found = [n for n in found if n.op == "call_function"]
    if len(found) != 1:
        names = ", ".join(n.name for n in found)
        raise CaseError(
            f"it cannot be cut to one layer (leave out --shrink): layer {layer} is left by {len(found)} values "
            f"({names}), not by one"
        )
    return found[0]


def _entering(program: Program, first: fx.Node) -> fx.Node:
    """The residual stream before layer 0: computed outside the layers, read by layer 0, shaped like what leaves it."""
    shape = str(first.meta["val"].shape)
    for node in program.graph.nodes:
        inside = any(layer_of(user) == 0 for user in node.users)
        val = node.meta.get("val")
        if inside and layer_of(node) is None and isinstance(val, torch.Tensor) and str(val.shape) == shape:
            return node
    raise CaseError("it cannot be cut to one layer (leave out --shrink): no value outside the layers enters layer 0")
