"""Lowering: from the dialect to ATen and kernels, in the precision that the model runs in.

The pass ``lower`` does this to a pipeline's program; whatever runs a program to measure it (statistics, training,
searches) lowers a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from mxfx.algorithms.hadamard import DENSE_ORDER, hadamard_matrix, kronecker_signs, kronecker_transform
from mxfx.graph.fake import has_dtype_of_its_own, runner_of
from mxfx.graph.node import kind, op_name, operands, path_of
from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL, Program, compute_dtype
from mxfx.ops import (
    arange,
    at_slots,
    attend,
    attention_bias,
    cache_bias,
    cached_attend,
    expert_linear,
    find_op,
    first_slots,
    keep_first_quantize,
    mixer,
    places,
    position_mask,
    positions,
    real_tokens,
    select_tokens,
)
from mxfx.ops.cache import why_defined
from mxfx.ops.fused import FUSED
from mxfx.ops.providers import Choice, Provider, choose
from mxfx.rewrite.facts import LOWERED, FactError, Selected
from mxfx.rewrite.inline import Inliner
from mxfx.rewrite.rewriter import Rewriter, clean

aten = torch.ops.aten

#: Ops that stay calls of their definitions, which take the device from an operand.
_AS_THEY_ARE = {
    op.__name__: op
    for op in (
        *(arange, at_slots, first_slots, keep_first_quantize, mixer),
        *(places, position_mask, positions, real_tokens, select_tokens),
    )
}

#: Ops that lowering itself spells out: no kernel stands for them.
_STRUCTURE = frozenset({"cast", "attention", "expert_linear", "cached_attention", *_AS_THEY_ARE})


def lower_calls(rw: Rewriter, device: torch.device) -> None:
    """Replace every dialect op of ``rw.program``: by a provider's kernel where one serves, else by its definition."""
    _concretize(rw)
    _split_unserved(rw, device)
    inliner = Inliner(rw)
    biases: dict[tuple, fx.Node] = {}
    for node in rw.program.nodes():
        op = find_op(node.target)
        if op is None:
            continue
        rw.match(node)
        choice = choose(op.name, node, device)
        provider = choice.provider
        if op.name not in _STRUCTURE:
            _account(rw, node, op.name, choice)
        if op.name == "cast":
            _lower_cast(rw, node)
        elif op.name in _AS_THEY_ARE:
            rw.replace(node, rw.call(_AS_THEY_ARE[op.name], *node.args, like=node, val=node.meta["val"]))
        elif op.name == "attention":
            _lower_attention(rw, node, biases)
        elif op.name == "expert_linear":
            rw.retarget(node, expert_linear)
        elif op.name == "cached_attention":
            _lower_cached_attention(rw, node, biases, device)
        elif provider is not None:
            rw.replace(node, rw.call(provider.target, *node.args, like=node, val=node.meta["val"]))
        elif op.name == "hadamard":
            _lower_hadamard(rw, node, inliner)
        else:
            inliner.inline(node, op.definition)


def _account(rw: Rewriter, node: fx.Node, op: str, choice: Choice) -> None:
    """Note which provider computes a node, or why its definition does: ``record.details["providers"]``."""
    providers = rw.record.details.setdefault("providers", [])
    assert isinstance(providers, list)
    providers.append(
        {
            "node": node.name,
            "path": path_of(node),
            "op": op,
            "provider": choice.provider.name if choice.provider is not None else None,
            "reason": "; ".join(choice.reasons),
        }
    )


def lowered_copy(program: Program, device: torch.device) -> Program:
    """A copy of ``program`` that can be built and run on ``device``. Raises ``FactError`` for a lowered program."""
    if LOWERED in program.facts:
        raise FactError("the program is lowered already: its dialect ops are gone")
    rw = Rewriter(program.copy(), "lower")
    lower_calls(rw, device)
    clean(rw.program)
    rw.program.facts = program.facts | {str(LOWERED)}
    return rw.program


def _concretize(rw: Rewriter) -> None:
    """Give every fake value the dtype that it will have: roles end here."""
    compute = compute_dtype(rw.program.dtype)
    real = {NOMINAL_MODEL: rw.program.dtype, NOMINAL_COMPUTE: compute}
    if compute != NOMINAL_COMPUTE:
        real[torch.complex64] = torch.complex128
    for node in rw.graph.nodes:
        if "val" not in node.meta:
            continue
        node.meta["val"] = tree_map_only(torch.Tensor, lambda val: _cast(val, real), node.meta["val"])
        if compute != NOMINAL_COMPUTE and has_dtype_of_its_own(node):
            _settle_dtype(rw, node, compute)


def _settle_dtype(rw: Rewriter, node: fx.Node, compute: torch.dtype) -> None:
    found, stated = runner_of(rw.fake_mode).run(node), node.meta["val"]
    if not isinstance(found, torch.Tensor) or found.dtype == stated.dtype:
        return
    with stated.fake_mode:
        node.meta["val"] = stated.to(found.dtype)
    if found.dtype == NOMINAL_COMPUTE:
        rw.replace(node, rw.call(aten.to.dtype, node, compute, like=node, after=node, val=stated))


def _cast(val: torch.Tensor, real: Mapping[torch.dtype, torch.dtype]) -> torch.Tensor:
    if val.dtype not in real:
        return val
    return runner_of(val.fake_mode).converted(val, real[val.dtype])


def _split_unserved(rw: Rewriter, device: torch.device) -> None:
    """A producer, a transform and a quantizer instead of each fused op that has no provider."""
    dialect = torch.ops.mxfx
    for node in rw.program.nodes(*FUSED):
        choice = choose(kind(node), node, device)
        if choice.provider is not None:
            continue
        _account(rw, node, kind(node), choice)
        given = operands(node)
        made = partial(rw.call, like=node, val=node.meta["val"])
        match kind(node):
            case "norm_quantize":
                parts = [given[name] for name in ("x", "weight", "eps", "offset", "gain_first")]
                value = made(dialect.rms_norm.default, *parts)
            case "silu_mul_quantize":
                value = made(aten.mul.Tensor, made(aten.silu.default, given["gate"]), given["up"])
            case "hadamard_quantize":
                value = made(dialect.hadamard.default, given["x"], given["block"])
            case "rope_quantize":
                value = made(dialect.rope.default, given["x"], given["cos"], given["sin"])
            case _:
                value = given["x"]
        if given.get("matrix") is not None:
            value = made(dialect.block_transform.default, value, given["matrix"])
        rw.replace(node, made(dialect.fake_quantize.default, value, given["format"]))


def _lower_cast(rw: Rewriter, node: fx.Node) -> None:
    source, dtype = node.args[0], node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        rw.replace(node, source)
        return
    rw.replace(node, rw.call(aten.to.dtype, source, dtype, like=node))


def _lower_attention(rw: Rewriter, node: fx.Node, biases: dict[tuple, fx.Node]) -> None:
    """One mask for all layers that share tokens, causality, window and chunk; then plain attention."""
    q, k, v, mask, scale, causal, window, chunk, *rest = operands(node).values()
    key = (mask, causal, window, chunk)
    if key not in biases:
        biases[key] = rw.call(attention_bias, mask, q, k, causal, window, chunk, like=node)
    given = (q, k, v, biases[key], scale, causal, *rest)
    while given[-1] is None and len(given) > 6:
        given = given[:-1]
    rw.replace(node, rw.call(attend, *given, like=node, val=node.meta["val"]))


def _lower_cached_attention(rw: Rewriter, node: fx.Node, biases: dict[tuple, fx.Node], device: torch.device) -> None:
    """One mask for all layers whose caches have as many places; then a call that writes and attends.

    What computes a step of decoding is noted here and chosen at the call; several tokens meet the definition.
    """
    given = operands(node)
    if given["keys"] is not None:
        kept = given["starts"] is not None and not given["first_keys"] is given["first_values"] is None
        q, k, v, mask, bias, sinks = (_value(given[name]) for name in ("q", "k", "v", "mask", "bias", "sinks"))
        reason = why_defined(q, k, v, mask, bias, sinks, given["key_format"], given["value_format"], kept, device)
        kernel = Provider("attend_token", "cached_attention", device.type, cached_attend)
        _account(rw, node, "a step of cached_attention", Choice(kernel) if reason is None else Choice(None, (reason,)))
    key = tuple(given[name] for name in ("mask", "slots", "causal", "window", "chunk"))
    if given["keys"] is not None:
        # Of layers under one window some have a ring, and those that share a cache have none.
        key = (*key, str(_value(given["keys"]).shape[2]))
    if key not in biases:
        operand = [given[name] for name in ("mask", "q", "k", "slots", "keys", "causal", "window", "chunk")]
        biases[key] = rw.call(cache_bias, *operand, like=node)
    args = [biases[key] if name == "mask" else value for name, value in given.items()]
    rw.replace(node, rw.call(cached_attend, *args, like=node, val=node.meta["val"]))


def _value(given: object) -> object:
    return given.meta["val"] if isinstance(given, fx.Node) else given


def _lower_hadamard(rw: Rewriter, node: fx.Node, inliner: Inliner) -> None:
    """Products with one stored matrix an order, or, of a high order, with the ±1 matrices of its two factors."""
    order = int(node.args[1])
    if order <= DENSE_ORDER:
        matrix = _stored(rw, node, f"hadamard.{order}", lambda: hadamard_matrix(order, torch.float64))
        new = rw.call(torch.ops.mxfx.block_transform.default, node.args[0], matrix, like=node)
        definition = find_op(torch.ops.mxfx.block_transform.default).definition
    else:
        sides = [
            _stored(rw, node, f"hadamard.{order}.{name}", lambda i=i: kronecker_signs(order, torch.float64)[i])  # type: ignore[misc]
            for i, name in enumerate(("left", "right"))
        ]
        definition = kronecker_transform
        new = rw.call(kronecker_transform, node.args[0], *sides, like=node, val=node.meta["val"])
    rw.replace(node, new)
    inliner.inline(new, definition)


def _stored(rw: Rewriter, like: fx.Node, name: str, make: Callable[[], torch.Tensor]) -> fx.Node:
    """A constant of compute precision, made once a program."""
    if name not in rw.weights:
        rw.weights.add(name, make(), rw.pass_name, constant=True)
    matrix = rw.weight(name, like)
    with matrix.meta["val"].fake_mode:
        matrix.meta["val"] = matrix.meta["val"].to(compute_dtype(rw.program.dtype))
    return matrix


@LOWERED.means
def lowered(program: Program, selected: Selected) -> str | None:
    for node in program.graph.nodes:
        if node.op == "call_function" and find_op(node.target) is not None:
            return f"{node.name} = {op_name(node)} ({kind(node)}) is not lowered"
    return None
