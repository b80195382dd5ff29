"""``fuse-norm``: the gain of each RMSNorm into the linears that read it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor, fx

from mxfx.graph.node import info, kind, op_name, operands, path_of
from mxfx.graph.program import Program
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import change_input, untie, why_shared
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    KV_QUANTIZED,
    NORMS_FUSED,
    NORMS_RAISED,
    WEIGHTS_ROUNDED,
    Fact,
    Selected,
)


@register
@dataclass(frozen=True)
class FuseNorm(Pass):
    """Fold the gain of each RMSNorm into the linears that read it; tied embeddings are untied first.

    Before::

        %y = linear(rms_norm(%x, @g, eps), @W)

    After::

        %y = linear(rms_norm(%x, None, eps), @W * g)

    Gains with an offset (Gemma's ``1 + g``) fold as they act. A norm that anything but a linear reads (q/k norms,
    norms before a residual sum) keeps its gain. Source: arXiv 2401.15024, §3.1 (RMSNorm commutes with rotations).

    Options:
        keep_tied: a norm whose linear shares its weight with an embedding keeps its gain, so that one tensor stays one.
        select: which norms.
    """

    name: ClassVar[str] = "fuse-norm"
    requires: ClassVar[frozenset[Fact]] = frozenset({NORMS_RAISED})
    provides: ClassVar[frozenset[Fact]] = frozenset({NORMS_FUSED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, KV_QUANTIZED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    keep_tied: bool = False
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for norm in rw.program.nodes("rms_norm"):
            if not self.select(path_of(norm)):
                continue
            reason = _refusal(norm)
            if reason is None and self.keep_tied:
                reason = _tied(rw.program, norm)
            if reason is not None:
                rw.skip(norm, reason)
            elif rw.match(norm, note=f"into {', '.join(path_of(u) for u in norm.users)}"):
                _fuse(rw, norm)


def _refusal(norm: fx.Node) -> str | None:
    if norm.args[1] is None:
        return "it has no gain"
    strangers = [u for u in norm.users if kind(u) != "linear" or u.args[0] is not norm]
    if strangers:
        return f"{op_name(strangers[0])} at {path_of(strangers[0]) or 'top level'} reads it, which is no linear"
    return None


def _tied(program: Program, norm: fx.Node) -> str | None:
    """Which linear behind the norm shares its weight under another name; None if none does."""
    for linear in norm.users:
        name = program.weight_of(linear)
        others = program.weights.tied_to(name)
        if others:
            return f"{name} is tied to {others[0]}"
    return None


def _fuse(rw: Rewriter, norm: fx.Node) -> None:
    gain = _gain(rw.program, norm)
    for linear in list(norm.users):
        untie(rw, linear)
        shared = why_shared(rw, linear)
        if shared is not None:
            raise ValueError(f"fuse-norm: cannot fold {path_of(norm)} into {path_of(linear)}: {shared}")
        change_input(rw, linear, lambda w: w * gain)
    norm.update_arg(1, None)
    norm.args = norm.args[:3]
    record = info(norm)
    bare = {o: a for o, a in record.formats.items() if o != "weight"}
    rw.set_info(norm, replace(record, formats=MappingProxyType(bare)))


def _gain(program: Program, norm: fx.Node) -> Tensor:
    """What the norm multiplies by, float64 ``(hidden,)``."""
    gain = program.weights[program.weight_of(norm)].double()
    return gain + float(operands(norm)["offset"])  # type: ignore[arg-type]


@NORMS_FUSED.means
def norms_fused(program: Program, selected: Selected) -> str | None:
    """Of the whole program: a rotation of the residual axis meets every norm."""
    for norm in program.nodes("rms_norm"):
        if _refusal(norm) is None and _tied(program, norm) is None:
            return f"{norm.name} ({path_of(norm)}) still has a gain"
    return None
