"""``transform-kv``: keys and values in a basis in which their cache loses least."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from mxfx.algorithms.block_transform import BlockTransform, best_order, narrow, wush
from mxfx.algorithms.hadamard import fitting_order, hadamard_matrix, order_words, orders_near
from mxfx.calibration.fisher import gradient_moments, warn_of_unreached
from mxfx.calibration.moments import block_moments
from mxfx.graph.node import info, kind, operands, path_of
from mxfx.graph.program import Program
from mxfx.graph.regions import Refusal, ValueRegion, value_region
from mxfx.ops.catalogue import spec
from mxfx.passes.rotate_value import rotate_values, turned_alone
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import free_name, why_shared
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    KV_QUANTIZED,
    KV_TRANSFORMED,
    LOWERED,
    RAISED,
    WEIGHTS_ROUNDED,
    Fact,
    Selected,
)

_NAMES = {"k": "keys", "v": "values"}


@register
@dataclass(frozen=True)
class TransformKv(Pass):
    """Keys and values in another basis per key-value head, so that a quantized cache loses less.

    Before::

        %o = mxfx.attention(%q, %k, %v, …)

    After::

        %kt = mxfx.block_transform(%k, @T); %qt = mxfx.block_transform(%q, @T⁻ᵀ)      # behind RoPE
        %o  = mxfx.attention(%qt, %kt, %v, …)         # values: Tᵥ in v_proj's rows, Tᵥ⁻ᵀ in o_proj's columns

    ``hadamard`` takes T = H; ``wush`` (arXiv 2512.00956) balances keys against the queries of their group, and values
    against the columns of the output projection that read them. ``block`` is the order of T within a head, 0 all of it;
    where it does not divide the head dimension, one near it as in ``transform-inputs``, which the record says. Keys and
    values are chosen by ``keys`` and ``values``; a value region with other readers is skipped. ``samples`` limits the
    calibration samples that moments are taken over. With ``against = "gradients"`` both are balanced against the
    gradients of the loss at them, as in ``transform-inputs``.

    kind: a Hadamard matrix, or the data-aware transform in closed form.
    against: what keys and values are balanced against: queries and weights, or the gradients of the loss (wush only).
    block: order of the transform within a head, or one near it that divides the head; 0 for the whole head.
    keys: transform keys, and queries against them.
    values: transform values.
    damping: added to second moments, as a fraction of their mean diagonal.
    max_condition: condition number above which a block gets a Hadamard matrix.
    samples: calibration samples to measure; not given: all.
    """

    name: ClassVar[str] = "transform-kv"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    provides: ClassVar[frozenset[Fact]] = frozenset({KV_TRANSFORMED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    kind: Literal["hadamard", "wush"] = "hadamard"
    against: Literal["weights", "gradients"] = "weights"
    block: int = 32
    keys: bool = True
    values: bool = True
    damping: float = 1e-4
    max_condition: float = 1e3
    samples: int | None = None
    select: Selector = ALL

    def __post_init__(self) -> None:
        if self.against != "weights" and self.kind == "hadamard":
            raise ValueError("'against' is what data-aware transforms balance keys against: 'hadamard' balances none")

    def foresee(self, rw: Rewriter) -> int | None:
        chosen = self._chosen(rw)
        for attention, wanted in chosen.items():
            orders = {name: self._orders(_operand(attention, name).meta["val"].shape[-1]) for name in wanted}
            rw.match(attention, note=" and ".join(self._words(attention, name, *orders[name]) for name in wanted))
        return len(chosen)

    def run(self, rw: Rewriter, ctx: Context) -> None:
        chosen = self._chosen(rw)
        moments, gradients = self._moments(rw, chosen, ctx)
        for attention, wanted in chosen.items():
            if "k" in wanted:
                self._keys(rw, attention, moments, gradients)
            if "v" in wanted:
                self._values(rw, attention, moments, gradients)

    def _chosen(self, rw: Rewriter) -> dict[fx.Node, str]:
        """Attention → which of its keys and values to transform: each by its own width."""
        found: dict[fx.Node, str] = {}
        for attention in filter(self.select, rw.program.nodes("attention")):
            for name in ("k" if self.keys else "") + ("v" if self.values else ""):
                width = _operand(attention, name).meta["val"].shape[-1]
                if not self._orders(width):
                    order = self.block or width
                    rw.skip(attention, f"no Hadamard matrix of order {order} fits the head dimension {width} of {name}")
                else:
                    found[attention] = found.get(attention, "") + name
        return found

    def _moments(
        self, rw: Rewriter, chosen: dict[fx.Node, str], ctx: Context
    ) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor]]:
        """Of keys, values and queries, which keys are balanced against; of the gradients at keys and values."""
        if self.kind == "hadamard":
            return {}, {}
        # Queries are what keys are balanced against.
        nodes = [_operand(a, name) for a, wanted in chosen.items() for name in wanted.replace("k", "qk")]
        blocks = {n: lcm(*self._orders(n.meta["val"].shape[-1])) for n in nodes}
        tokens = ctx.tokens()[: self.samples]
        moments = block_moments(rw.program, blocks, ctx, tokens)
        if self.against == "weights":
            return moments, {}
        cached = [_operand(a, name) for a, wanted in chosen.items() for name in wanted]
        gradients = gradient_moments(rw.program, {n: blocks[n] for n in cached}, ctx, tokens)
        warn_of_unreached(rw, cached, gradients, "balanced against queries and weights")
        return moments, gradients

    def _keys(
        self, rw: Rewriter, attention: fx.Node, moments: dict[fx.Node, Tensor], gradients: dict[fx.Node, Tensor]
    ) -> None:
        q, k = _operand(attention, "q"), _operand(attention, "k")
        heads, width = k.meta["val"].shape[1], k.meta["val"].shape[-1]
        if self.kind == "hadamard":
            (block,) = self._orders(width)
            if not rw.match(attention, note=self._words(attention, "k", block)):
                return
            for side, source in (("q", q), ("k", k)):
                new = rw.call(torch.ops.mxfx.hadamard.default, source, block, like=attention)
                spec(attention).set(rw, side, new)
            return
        against = gradients[k] if k in gradients else moments[q].unflatten(0, (heads, -1)).mean(1)
        solved = self._solve(rw, attention, "k", moments[k], against)
        if solved is None:
            return
        found = solved.stored_as(rw.program.dtype)
        block = found.matrix.shape[-1]
        shape = (heads, width // block, block, block)
        matrices = (found.inverse.mT.reshape(shape), found.matrix.reshape(shape))
        for side, source, matrix in zip("qk", (q, k), matrices, strict=True):
            # Only one of two inverse matrices fits the model's dtype: that of the keys, which are quantized.
            weight = rw.add_weight(
                free_name(rw, f"transforms.{path_of(attention)}.{side}"), matrix, attention, constant=side == "q"
            )
            new = rw.call(torch.ops.mxfx.block_transform.default, source, weight, like=attention)
            spec(attention).set(rw, side, new)

    def _values(
        self, rw: Rewriter, attention: fx.Node, moments: dict[fx.Node, Tensor], gradients: dict[fx.Node, Tensor]
    ) -> None:
        region = value_region(attention)
        reason = (
            region.reason
            if isinstance(region, Refusal)
            else why_shared(rw, region.value) or why_shared(rw, region.output)
        )
        if reason is not None:
            rw.skip(attention, f"values: {reason}")
            return
        assert isinstance(region, ValueRegion)
        heads, width = region.rows.shape
        if self.kind == "hadamard":
            (block,) = self._orders(width)
            if rw.match(attention, note=self._words(attention, "v", block)):
                matrix = hadamard_matrix(block, torch.float64).expand(heads, width // block, block, block)
                rotate_values(rw, region, (matrix, matrix.mT))
            return
        v = _operand(attention, "v")
        against = gradients[v] if v in gradients else _output_moments(rw.program, region, lcm(*self._orders(width)))
        found = self._solve(rw, attention, "v", moments[v], against)
        if found is not None:
            block = found.matrix.shape[-1]
            shape = (heads, width // block, block, block)
            rotate_values(rw, region, (found.matrix.reshape(shape), found.inverse.reshape(shape)))

    def _words(self, attention: fx.Node, name: str, *orders: int) -> str:
        width = _operand(attention, name).meta["val"].shape[-1]
        return f"{_NAMES[name]}, {self.kind} {order_words(width, self.block, *orders)}"

    def _orders(self, width: int) -> tuple[int, ...]:
        if self.kind == "wush":
            return orders_near(width, self.block)
        order = fitting_order(width, self.block)
        return () if order is None else (order,)

    def _solve(
        self, rw: Rewriter, attention: fx.Node, name: str, first: Tensor, second: Tensor
    ) -> BlockTransform | None:
        """The transform of keys (``k``) or values (``v``); None where the bisect limit is reached."""
        width = _operand(attention, name).meta["val"].shape[-1]
        both = (first.flatten(0, 1), second.flatten(0, 1))
        block = best_order(*both, self._orders(width), width, self.block, self.damping)
        if not rw.match(attention, note=self._words(attention, name, block)):
            return None
        of_first, of_second = (narrow(moment, block) for moment in both)
        found = wush(of_first, of_second, self.damping, self.max_condition)
        rw.record.details[f"{path_of(attention)} {_NAMES[name]}"] = {
            "worst_condition": float(found.condition.max()),
            "fallen_back_blocks": int(found.fell_back.sum()),
        }
        return found


def _operand(attention: fx.Node, name: str) -> fx.Node:
    node = operands(attention)[name]
    assert isinstance(node, fx.Node)
    return node


def _output_moments(program: Program, region: ValueRegion, block: int) -> Tensor:
    """Mean of ``w_Bᵀ w_B`` over rows of the output projection, summed over the heads of a group.

    Float64 ``(kv_heads, head_dim / block, block, block)``.
    """
    heads, width = region.columns.shape
    weight = program.weights[program.weight_of(region.output)].double()
    columns = weight[:, region.columns.flatten()].reshape(-1, heads, width // block, block).permute(1, 2, 0, 3)
    moment = columns.mT @ columns / weight.shape[0]
    return moment.unflatten(0, (-1, region.group)).mean(1).cpu()


@KV_TRANSFORMED.means
def kv_transformed(program: Program, selected: Selected) -> str | None:
    for attention in filter(selected, program.nodes("attention")):
        q, k = (_is_ours(_operand(attention, name)) for name in ("q", "k"))
        if q != k:
            return f"the {'queries' if q else 'keys'} of {path_of(attention)} are transformed alone"
    return turned_alone(program, selected, TransformKv.name)


def _is_ours(node: fx.Node) -> bool:
    return kind(node) in ("hadamard", "block_transform") and TransformKv.name in info(node).passes
