"""``fuse-norm``: the gain and bias of each norm into the linears that read it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor, fx

from mxfx.graph.node import info, kind, op_name, operands, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import multiplies, spec, weights_of
from mxfx.rewrite import ALL, Close, NodePass, Numerics, Rewriter, Selector, register
from mxfx.rewrite.basis import bias_of, free_name, untie
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    KV_QUANTIZED,
    LOWERED,
    NORMS_FUSED,
    NORMS_RAISED,
    WEIGHTS_ROUNDED,
    Fact,
    Selected,
)
from mxfx.rewrite.operands import readers_of

_NORMS = ("rms_norm", "layer_norm")
#: Views; those that keep the last axis keep its channels.
_VIEWS = ("aten.reshape.default", "aten.unsqueeze.default", "aten.squeeze.dim")


@register
@dataclass(frozen=True)
class FuseNorm(NodePass):
    """Fold gain and bias of each norm into the linears that read it; tied embeddings are untied first.

    Before::

        %y = linear(rms_norm(%x, @g, eps), @W)

    After::

        %y = linear(rms_norm(%x, None, eps), @W * g)

    The bias of a LayerNorm goes the same way: ``linear(layer_norm(%x, @g, @b, eps), @W, @c)`` becomes
    ``linear(layer_norm(%x, None, None, eps), @W * g, @W b + c)``; a linear without a bias gains one. Gains with an
    offset (Gemma's ``1 + g``) fold as they act. A norm that anything but a linear reads (q/k norms, norms before a
    residual sum) keeps its gain. Source: arXiv 2401.15024, §3.1 (RMSNorm commutes with rotations).

    keep_tied: leave a norm alone whose linear shares its weight under another name.
    """

    name: ClassVar[str] = "fuse-norm"
    kinds: ClassVar[tuple[str, ...]] = _NORMS
    requires: ClassVar[frozenset[Fact]] = frozenset({NORMS_RAISED})
    provides: ClassVar[frozenset[Fact]] = frozenset({NORMS_FUSED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    keep_tied: bool = False
    select: Selector = ALL

    def refuse(self, rw: Rewriter, node: fx.Node) -> str | None:
        reason = _refusal(rw.program, node)
        return _tied(rw.program, node) if reason is None and self.keep_tied else reason

    def is_done(self, node: fx.Node) -> bool:
        return not _vectors(node)

    def note(self, node: fx.Node) -> str:
        linears = [linear for linear, _ in _readers(node)]
        biased = "bias" in _vectors(node)
        new = [path_of(linear) for linear in linears if biased and spec(linear).get("bias") is None]
        return f"into {', '.join(map(path_of, linears))}" + (f"; a bias is new in {', '.join(new)}" if new else "")

    def rewrite(self, rw: Rewriter, node: fx.Node) -> None:
        _fuse(rw, node)


def _vectors(norm: fx.Node) -> list[str]:
    """The operands, of gain and bias, that a norm has."""
    return [name for name in ("weight", "bias") if spec(norm).has(name) and spec(norm).get(name) is not None]


def _refusal(program: Program, norm: fx.Node) -> str | None:
    vectors = _vectors(norm)
    if not vectors:
        return "it has no gain" + (" and no bias" if kind(norm) == "layer_norm" else "")
    for vector in vectors:
        if vector not in weights_of(norm):
            return f"its {vector} is computed, not stored"
    for reader, source in _readers(norm):
        place = path_of(reader) or reader.name
        if not multiplies(reader, source):
            return f"{op_name(reader)} at {path_of(reader) or 'top level'} reads it, which is no linear"
        for operand in ("weight", "bias") if "bias" in vectors else ("weight",):
            if not spec(reader).has(operand):
                return f"{op_name(reader)} at {place}, which reads it, takes no {operand}"
            given, stored = spec(reader).get(operand), _stored(reader, operand)
            if given is not None and stored is None:
                return f"the {operand} of {place}, which reads it, is computed"
            if stored is not None and not program.weights.tied_to(stored):
                others = [n for n in _through_casts(readers_of(program, stored)) if n is not reader]
                if others:
                    return f"{stored}, which {place} reads, is read by {path_of(others[0]) or others[0].name} too"
    return None


def _readers(source: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Who reads a tensor, and as which node: through views that keep its last axis, and through casts."""
    found = []
    for user in source.users:
        val, seen = user.meta.get("val"), source.meta["val"]
        view = op_name(user) in _VIEWS and isinstance(val, Tensor) and val.shape[-1] == seen.shape[-1]
        found += _readers(user) if view or kind(user) == "cast" else [(user, source)]
    return found


def _stored(node: fx.Node, operand: str = "weight") -> str | None:
    """Name of the tensor that a node reads as that operand, as it is or cast; None for none, and for a computed one."""
    source = spec(node).node_of(operand)
    while source is not None and kind(source) == "cast":
        source = spec(source).node_of("x")
    return str(source.target) if source is not None and source.op == "get_attr" else None


def _tied(program: Program, norm: fx.Node) -> str | None:
    """Which linear behind the norm shares its weight under another name; None if none does."""
    for linear, _ in _readers(norm):
        name = str(_stored(linear))
        others = program.weights.tied_to(name)
        if others:
            return f"{name} is tied to {others[0]}"
    return None


def _fuse(rw: Rewriter, norm: fx.Node) -> None:
    gain, bias = _gain(rw.program, norm), _bias(rw.program, norm)
    for linear in dict.fromkeys(linear for linear, _ in _readers(norm)):
        if "weight" in weights_of(linear):
            untie(rw, linear)
        name = str(_stored(linear))
        weight = rw.weights[name].double()
        if bias is not None:
            _add_bias(rw, linear, weight @ bias)
        if gain is not None:
            rw.set_weight(name, weight * gain)
    for operand in _vectors(norm):
        spec(norm).set(rw, operand, None)
    call = spec(norm)
    norm.args = (*(call.get(name) for name in list(call.arguments())[: list(call.arguments()).index("eps") + 1]),)
    record = info(norm)
    bare = {o: a for o, a in record.formats.items() if o != "weight"}
    rw.set_info(norm, replace(record, formats=MappingProxyType(bare)))


def _add_bias(rw: Rewriter, linear: fx.Node, vector: Tensor) -> None:
    """Add ``(..., out)`` to what a linear adds already."""
    name = _stored(linear, "bias")
    if name is not None:
        rw.set_weight(name, rw.weights[name].double() + vector)
        return
    added = rw.add_weight(free_name(rw, f"{path_of(linear) or linear.name}.bias"), vector, linear)
    weight = spec(linear).node_of("weight")
    if weight is not None and kind(weight) == "cast":
        added = rw.call(weight.target, added, spec(weight).get("role"), like=linear)
    spec(linear).set(rw, "bias", added)


def _through_casts(readers: list[fx.Node]) -> list[fx.Node]:
    found = []
    for reader in readers:
        found += _through_casts(list(reader.users)) if kind(reader) == "cast" else [reader]
    return found


def _gain(program: Program, norm: fx.Node) -> Tensor | None:
    """What the norm multiplies by, float64 ``(hidden,)``; None for a norm without a gain."""
    if spec(norm).get("weight") is None:
        return None
    return program.weights[program.weight_of(norm)].double() + float(operands(norm)["offset"])


def _bias(program: Program, norm: fx.Node) -> Tensor | None:
    """What the norm adds, float64 ``(hidden,)``; None for a norm that adds nothing."""
    name = bias_of(norm)
    return None if name is None else program.weights[name].double()


@NORMS_FUSED.means
def norms_fused(program: Program, selected: Selected) -> str | None:
    """Of the whole program: a rotation of the residual axis meets every norm."""
    for norm in program.nodes(*_NORMS):
        if _refusal(program, norm) is None and _tied(program, norm) is None:
            return f"{norm.name} ({path_of(norm)}) still has a gain or a bias"
    return None
