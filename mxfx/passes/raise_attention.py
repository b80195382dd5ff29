"""``raise-attention``: softmax attention as one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.ops import aten

from mxfx.graph.fake import sizes_text
from mxfx.graph.masks import boolean_behind, mask_of, without_defaults
from mxfx.graph.node import kind
from mxfx.graph.program import NOMINAL_MODEL, Program
from mxfx.graph.regions.ops import Refusal
from mxfx.graph.regions.spelled import Spelled, Term, spelled
from mxfx.ops.catalogue import spec
from mxfx.rewrite import Close, Context, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import ATTENTION_RAISED, NORMS_RAISED, RAISED, ROPES_RAISED, Fact, Selected


@register
@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Turn each scaled dot-product attention into one ``mxfx.attention`` node with unrepeated key-value heads.

    Models that use transformers' attention interface arrive raised, because ``trace`` registers one; this pass counts
    them. A model with attention of its own is rewritten, be it a call of SDPA or products around a softmax:

    Before::

        %kr = reshape(expand(unsqueeze(%k, 2), …))       # repeated heads, where the model repeats them
        %s  = matmul(%q, transpose(%kr, -1, -2)) * s + %alibi + %mask
        %y  = matmul(softmax(%s, -1), %vr)

    After::

        %y  = mxfx.attention(%q, %k, %v, %attention_mask, s, causal, None, None, None, None, %alibi)

    Between the products stand, in any order, scales, soft caps, masks and what else is added to the scores (a bias);
    batch and heads may be one axis there (``baddbmm``). An attention with any other op in it is reported and stays:
    its linears are quantized as others, its keys and values carry no format.
    """

    name: ClassVar[str] = "raise-attention"
    provides: ClassVar[frozenset[Fact]] = frozenset({ATTENTION_RAISED, RAISED})
    requires: ClassVar[frozenset[Fact]] = frozenset({NORMS_RAISED, ROPES_RAISED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    required: ClassVar[bool] = True

    def run(self, rw: Rewriter, ctx: Context) -> None:
        for node in rw.program.nodes():
            if kind(node) == "attention":
                rw.match(node, note="traced through the attention interface")
                continue
            found = spelled(node)
            if isinstance(found, Refusal):
                rw.skip(node, f"attention of the model's own, which stays as it is: {found.reason}")
            elif found is not None and rw.match(node, note=_how(node)):
                _put_together(rw, node, found)


def _how(end: fx.Node) -> str:
    called = end.target is aten.scaled_dot_product_attention.default
    return "from scaled_dot_product_attention" if called else "from products around a softmax"


def _put_together(rw: Rewriter, end: fx.Node, found: Spelled) -> None:
    """One ``attention`` in the place of products around a softmax."""
    k = rw.call(aten.transpose.int, found.k, -2, -1, like=end) if found.turned else found.k
    role = "model" if found.v.meta["val"].dtype == NOMINAL_MODEL else "compute"
    q, k = (_of_dtype(rw, x, role, end) for x in (found.q, k))
    given = {"q": q, "k": k, "v": found.v, "mask": None, "scale": found.scale, "causal": found.causal}
    given |= {"window": None, "chunk": None, "softcap": found.softcap, "sinks": None, "bias": None}
    masks, biases = list(found.allowed), []
    for term in found.terms:
        bias = term.value
        if mask_of(bias) is None:
            biases.append(_bias(rw, term, q, role, end))
        else:
            masks.append(bias)
    masks += [rw.call(aten.logical_not.default, hidden, like=end) for hidden in found.hidden]
    if len(masks) == 1 and masks[0].meta["val"].dim() == 4:
        given |= mask_of(masks[0]) or {}
    elif masks:
        given["mask"] = _joined(rw, masks, end)
    for bias in biases:
        given["bias"] = bias if given["bias"] is None else rw.call(aten.add.Tensor, given["bias"], bias, like=end)
    new = rw.call(torch.ops.mxfx.attention.default, *without_defaults(given), like=end)
    for split in list(end.users):
        # Where batch and heads were one axis, what reads the result takes them apart first.
        if split.target is aten.reshape.default and sizes_text(split.meta["val"]) == sizes_text(new.meta["val"]):
            rw.replace(split, new)
    if end.meta["val"].dim() == 4:
        rw.replace(end, new)
    elif any(user.users for user in end.users):
        rw.replace(end, rw.call(aten.flatten.using_ints, new, 0, 1, like=end))


def _of_dtype(rw: Rewriter, x: fx.Node, role: str, end: fx.Node) -> fx.Node:
    """``x`` in the dtype of values, without the cast that a model puts before its product to compute it wider."""
    wanted = torch.ops.mxfx.cast.default
    source = (spec(x).node_of("input") if x.target is wanted else None) or x
    dtypes = {"model": NOMINAL_MODEL, "compute": torch.float32}
    for one in (x, source):
        if one.meta["val"].dtype == dtypes[role]:
            return one
    return rw.call(wanted, x, role, like=end)


def _bias(rw: Rewriter, term: Term, q: fx.Node, role: str, end: fx.Node) -> fx.Node:
    """A term of the scores as ``(batch | 1, heads | 1, queries | 1, keys)``, in the dtype of ``q``."""
    value = _of_dtype(rw, term.value, role, end)
    shape = value.meta["val"].shape
    if term.merged and shape[0] != 1:
        batch = rw.call(aten.sym_size.int, q, 0, like=end)
        rows = 1 if isinstance(shape[1], int) else rw.call(aten.sym_size.int, value, 1, like=end)
        value = rw.call(aten.reshape.default, value, [batch, q.meta["val"].shape[1], rows, -1], like=end)
    while value.meta["val"].dim() < 4:
        value = rw.call(aten.unsqueeze.default, value, 0, like=end)
    return value if term.factor == 1 else rw.call(aten.mul.Tensor, value, term.factor, like=end)


def _joined(rw: Rewriter, masks: list[fx.Node], end: fx.Node) -> fx.Node:
    """True where every mask is; each as it broadcasts to four axes."""
    found: fx.Node | None = None
    for mask in masks:
        one = boolean_behind(mask)
        while one.meta["val"].dim() < 4:
            one = rw.call(aten.unsqueeze.default, one, 0, like=end)
        found = one if found is None else rw.call(aten.logical_and.default, found, one, like=end)
    assert found is not None
    return found


@ATTENTION_RAISED.means
def attention_raised(program: Program, selected: Selected) -> str | None:
    for node in program.graph.nodes:
        if isinstance(spelled(node), Spelled):
            return f"{node.name} still ends an attention of the model's own"
    return None


@RAISED.means
def raised(program: Program, selected: Selected) -> str | None:
    parts = (NORMS_RAISED, ROPES_RAISED, ATTENTION_RAISED)
    return next((reason for fact in parts if (reason := fact.check(program, selected)) is not None), None)
