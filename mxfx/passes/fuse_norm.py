"""``fuse-norm``: the gain of each RMSNorm into the linears that read it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor, fx

from mxfx.graph.node import info, kind, op_name, operands, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import multiplies, spec, weights_of
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import untie
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    KV_QUANTIZED,
    NORMS_FUSED,
    NORMS_RAISED,
    WEIGHTS_ROUNDED,
    Fact,
    Selected,
)
from mxfx.rewrite.operands import readers_of

#: Views; those that keep the last axis keep its channels.
_VIEWS = ("aten.reshape.default", "aten.unsqueeze.default", "aten.squeeze.dim")


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

    keep_tied: leave a norm alone whose linear shares its weight under another name.
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
            if not self.select(norm):
                continue
            reason = _refusal(norm)
            if reason is None and self.keep_tied:
                reason = _tied(rw.program, norm)
            if reason is not None:
                rw.skip(norm, reason)
            elif rw.match(norm, note=f"into {', '.join(path_of(reader) for reader, _ in _readers(norm))}"):
                _fuse(rw, norm)


def _refusal(norm: fx.Node) -> str | None:
    if norm.args[1] is None:
        return "it has no gain"
    for reader, source in _readers(norm):
        if not multiplies(reader, source):
            return f"{op_name(reader)} at {path_of(reader) or 'top level'} reads it, which is no linear"
        if _stored(reader) is None:
            return f"the weight of {path_of(reader) or reader.name}, which reads it, is computed"
    return None


def _readers(source: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Who reads a tensor, and as which node: through views that keep its last axis, and through casts."""
    found = []
    for user in source.users:
        val, seen = user.meta.get("val"), source.meta["val"]
        view = op_name(user) in _VIEWS and isinstance(val, Tensor) and val.shape[-1] == seen.shape[-1]
        found += _readers(user) if view or kind(user) == "cast" else [(user, source)]
    return found


def _stored(linear: fx.Node) -> str | None:
    """Name of the weight that a linear multiplies by, as it is or cast; None for one that is computed."""
    weight = spec(linear).node_of("weight")
    while weight is not None and kind(weight) == "cast":
        weight = spec(weight).node_of("x")
    return str(weight.target) if weight is not None and weight.op == "get_attr" else None


def _tied(program: Program, norm: fx.Node) -> str | None:
    """Which linear behind the norm shares its weight under another name; None if none does."""
    for linear, _ in _readers(norm):
        name = str(_stored(linear))
        others = program.weights.tied_to(name)
        if others:
            return f"{name} is tied to {others[0]}"
    return None


def _fuse(rw: Rewriter, norm: fx.Node) -> None:
    gain = _gain(rw.program, norm)
    for linear in dict.fromkeys(linear for linear, _ in _readers(norm)):
        if "weight" in weights_of(linear):
            untie(rw, linear)
        name = str(_stored(linear))
        shared = [reader for reader in _through_casts(readers_of(rw.program, name)) if reader is not linear]
        if shared:
            raise ValueError(
                f"fuse-norm: cannot fold {path_of(norm)} into {path_of(linear)}: {name} is read by "
                f"{path_of(shared[0]) or shared[0].name} too"
            )
        rw.set_weight(name, rw.weights[name].double() * gain)
    norm.update_arg(1, None)
    norm.args = norm.args[:3]
    record = info(norm)
    bare = {o: a for o, a in record.formats.items() if o != "weight"}
    rw.set_info(norm, replace(record, formats=MappingProxyType(bare)))


def _through_casts(readers: list[fx.Node]) -> list[fx.Node]:
    found = []
    for reader in readers:
        found += _through_casts(list(reader.users)) if kind(reader) == "cast" else [reader]
    return found


def _gain(program: Program, norm: fx.Node) -> Tensor:
    """What the norm multiplies by, float64 ``(hidden,)``."""
    gain = program.weights[program.weight_of(norm)].double()
    return gain + float(operands(norm)["offset"])


@NORMS_FUSED.means
def norms_fused(program: Program, selected: Selected) -> str | None:
    """Of the whole program: a rotation of the residual axis meets every norm."""
    for norm in program.nodes("rms_norm"):
        if _refusal(norm) is None and _tied(program, norm) is None:
            return f"{norm.name} ({path_of(norm)}) still has a gain"
    return None
