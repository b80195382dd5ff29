"""From a lowered program to a ``GraphModule`` that runs."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

import torch
from torch import fx, nn

from mxfx.graph.program import Program, compute_dtype, copy_graph


def build(
    program: Program, shared: Mapping[str, torch.Tensor] | None = None, *, consume: bool = False
) -> fx.GraphModule:
    """The ``GraphModule`` of a lowered program, weights cast to the program's dtype; those named in ``shared``, by the
    names of the store, are tensors of another module. ``consume``: the graph goes over to it, since nobody reads the
    program afterwards; else it has a copy.

    Call it as ``gm(input_ids, position_ids=None, attention_mask=None)``; it returns logits
    ``(batch, seq, vocabulary)``.
    Raises ``ValueError`` if the program is not lowered.
    """
    if "lowered" not in program.facts:
        raise ValueError("only a lowered program can be built; run the pass 'lower' first")
    root: dict[str, nn.Parameter | torch.Tensor] = {}
    cast: dict[str, nn.Parameter | torch.Tensor] = dict(shared or {})
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        home = program.weights.canonical(str(node.target))
        if home not in cast:
            cast[home] = _runtime_tensor(program, home)
        root[str(node.target)] = cast[home]
    graph = program.graph if consume else copy_graph(program.graph)
    module = fx.GraphModule(root, graph, class_name=program.source.architecture)
    for parent in module.modules():
        # Found before `__getattr__` is asked: a step of decoding looks up thousands.
        vars(parent).update(parent.named_children())
    return module.eval()


def build_phases(program: Program, *, consume: bool = False) -> tuple[fx.GraphModule, fx.GraphModule | None]:
    """The modules of a lowered program and of its decode program, if it has one; a weight of both is held once."""
    if program.phases is None:
        return build(program, consume=consume), None
    first = build(program)
    decode = program.phases.decode
    held = {name for name in decode.weights if name in program.weights and program.weights.canonical(name) == name}
    read = {program.weights.canonical(str(n.target)): str(n.target) for n in first.graph.nodes if n.op == "get_attr"}
    shared = {
        name: attrgetter(read[name])(first)
        for name in held & read.keys()
        if decode.weights[name] is program.weights[name]
    }
    return first, build(decode, shared)


def _own(program: Program, name: str) -> torch.Tensor:
    """A weight whose changes in place nobody else sees, and that sees nobody else's.

    A tensor that no pass made is the user's model's; it is copied when one of the two is written, if torch can tell.
    """
    tensor = program.weights[name]
    if tensor.device.type == "meta" or name in {change.weight for change in program.weights.ledger}:
        return tensor
    try:
        return tensor._lazy_clone()
    except RuntimeError:
        # Memory that torch did not allocate itself, such as a mapped file's.
        return tensor.clone()


def _runtime_tensor(program: Program, name: str) -> nn.Parameter | torch.Tensor:
    tensor = _own(program, name)
    if not tensor.is_floating_point():
        return tensor
    if name in program.weights.constants:
        return tensor.to(compute_dtype(program.dtype))
    return nn.Parameter(tensor.to(program.dtype), requires_grad=False)
