"""Level 3: no dangling read, no orphan, aliases that lead somewhere, a ledger that agrees with the tensors."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mxfx.graph.program import NOMINAL_COMPUTE, NOMINAL_MODEL, Program, compute_dtype
from mxfx.graph.verify.fault import VerifyError, fault


def weights(program: Program) -> None:
    store = program.weights
    homes = set(store)
    for alias, home in store.aliases.items():
        if home not in homes:
            raise VerifyError(
                f"alias {alias!r} leads to {home!r}, which is no weight; drop the alias or restore the weight"
            )
        if alias in homes:
            raise VerifyError(f"{alias!r} is an alias of {home!r} and a weight of its own; use WeightStore.untie")
    read: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            read.add(_read_weight(program, node))
    # Buffers that the model owns and never reads are in a fresh trace; the first pass drops them.
    own_buffers = store.constants - {change.weight for change in store.ledger}
    orphans = [name for name in store if name not in read and name not in own_buffers]
    if orphans:
        raise VerifyError(
            f"weight {orphans[0]!r} is read by no node ({len(orphans)} such); drop it or let apply() clean up"
        )
    _ties(program)
    _ledger(program)


def _read_weight(program: Program, node: fx.Node) -> str:
    store = program.weights
    if str(node.target) not in store:
        raise fault(
            node, f"no weight {node.target!r} is in the store", "add it with Rewriter.add_weight, or read another"
        )
    home = store.canonical(str(node.target))
    tensor, val = store[home], node.meta["val"]
    if not isinstance(val, Tensor) or tuple(val.shape) != tuple(tensor.shape):
        stated = tuple(getattr(val, "shape", ()))
        raise fault(
            node,
            f"it states the shape {stated}, the weight has {tuple(tensor.shape)}",
            "make a new node after reshaping",
        )
    wanted = _weight_dtype(program, home)
    if val.dtype != wanted:
        raise fault(node, f"it states {val.dtype}, a weight here runs in {wanted}", "create it with Rewriter.weight")
    return home


def _weight_dtype(program: Program, home: str) -> torch.dtype:
    tensor = program.weights[home]
    if not tensor.is_floating_point():
        return tensor.dtype
    constant = home in program.weights.constants
    if "lowered" in program.facts:
        return compute_dtype(program.dtype) if constant else program.dtype
    return NOMINAL_COMPUTE if constant else NOMINAL_MODEL


def _ties(program: Program) -> None:
    """Two weights over one memory are tied, whether the alias table knows it or not."""
    changed = {change.weight for change in program.weights.ledger}
    seen: dict[tuple, str] = {}
    for name, tensor in program.weights.items():
        if tensor.device.type == "meta" or not tensor.numel():
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        other = seen.setdefault(key, name)
        if other != name and not {name, other} & changed:
            raise VerifyError(
                f"{name!r} and {other!r} share memory and are not tied in the alias table; tie or untie them"
            )


def _ledger(program: Program) -> None:
    last = {change.weight: change.after for change in program.weights.ledger}
    homes = set(program.weights)
    for name, stated in last.items():
        if name in homes and stated != "meta" and program.weights.hash(name) != stated:
            raise VerifyError(
                f"weight {name!r} is not what the ledger says; change weights through Rewriter.set_weight only"
            )
