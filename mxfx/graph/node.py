"""What mxfx knows of a node beside its operands: where it came from and which formats its edges carry.

The record hangs at ``node.meta["mxfx"]``; it is immutable, so copying a graph never shares mutable state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch.fx import Node

from mxfx.formats import Format
from mxfx.ops.catalogue import spec

META_KEY = "mxfx"
#: Note of a product that a pass cut out of a wider one: the module path of that one, which still names it.
PART_OF = "part-of"


@dataclass(frozen=True)
class Annotation:
    """A format on one operand and who put it there (``annotate, rule 2 (pipeline.toml:14)``)."""

    format: Format
    by: str


@dataclass(frozen=True)
class NodeInfo:
    """Provenance and annotations of one node.

    ``path`` is the module path in the Hugging Face model (``model.layers.0.mlp.up_proj``); ``passes`` names
    the passes that created or changed the node; ``notes`` are what a pass leaves for later passes and reports.
    """

    path: str = ""
    passes: tuple[str, ...] = ()
    formats: Mapping[str, Annotation] = field(default_factory=lambda: MappingProxyType({}))
    notes: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def with_format(self, operand: str, annotation: Annotation) -> NodeInfo:
        return replace(self, formats=MappingProxyType({**self.formats, operand: annotation}))

    def with_note(self, key: str, value: object) -> NodeInfo:
        return replace(self, notes=MappingProxyType({**self.notes, key: value}))


_EMPTY = NodeInfo()
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def info(node: Node) -> NodeInfo:
    """The node's record; an empty one if the node has none."""
    return node.meta.get(META_KEY, _EMPTY)


def set_info(node: Node, record: NodeInfo) -> None:
    node.meta[META_KEY] = record


def path_of(node: Node) -> str:
    """Module path that the node came from, ``""`` for inputs and model-level glue."""
    return info(node).path


def paths_of(node: Node) -> tuple[str, ...]:
    """Every module path by which a node may be called: its own, and that of the product that it is a part of."""
    record = info(node)
    return (record.path, str(record.notes[PART_OF])) if PART_OF in record.notes else (record.path,)


def layer_index(path: str) -> int | None:
    """Index of the decoder layer that a module path lies in: its first integer component."""
    found = _LAYER.search(path)
    return int(found.group(1)) if found else None


def layer_of(node: Node) -> int | None:
    return layer_index(path_of(node))


def op_name(node: Node) -> str:
    """``aten.linear.default``, ``mxfx.rope.default`` … for calls; the FX opcode for other nodes."""
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))


def kind(node: Node) -> str:
    """The concept that a node stands for: ``linear``, ``embedding``, ``attention``, ``rope``, … or ``""``."""
    return spec(node).concept


def operands(node: Node) -> dict[str, object]:
    """All operands of a call to an op by the names of its schema, defaults filled in.

    (FX drops trailing operands that equal their defaults.) Raises ``ValueError`` for a node that calls no op.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        raise ValueError(f"{node.name} calls {node.target}, which is no op with a schema")
    return spec(node).arguments()
