"""How many bits the weights of a program take, and which of those that it multiplies by carry a format."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from mxfx.formats import Format, parse
from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec, weights_of
from mxfx.rewrite.operands import is_rounded, readers_of, weight_format
from mxfx.rewrite.roles import role_of


def bits_per_weight(program: Program, *, planned: bool = False) -> float:
    """Mean bits of a weight: everything counts, embeddings and their untied copies, norms, transforms, shared scales.

    A tensor counts in its format once it lies on that grid (``planned``: once it is annotated), else in the program's
    dtype; constants such as rotary frequencies count in float32.
    """
    bits, count = weight_bits(program, planned=planned)
    return bits / max(count, 1)


def weight_bits(program: Program, *, planned: bool = False) -> tuple[float, int]:
    """Bits and elements of all weights, as ``bits_per_weight`` counts them."""
    bits = 0.0
    count = 0
    for name, tensor in program.weights.items():
        bits_a_code = packed_bits(program, name)
        if bits_a_code is None:
            count += tensor.numel()
            bits += tensor.numel() * _bits(program, name, planned)
        else:
            count += round(tensor.nbytes * 8 / bits_a_code) if bits_a_code else 0
            bits += tensor.nbytes * 8
    return bits, count


def packed_bits(program: Program, name: str) -> int | None:
    """Bits of a code, if a tensor holds the packed codes of a weight; 0 if it holds their scales; else None."""
    for reader in readers_of(program, name):
        call = spec(reader)
        if not call.has("scales"):
            continue
        roles = {
            operand
            for operand, source in weights_of(reader).items()
            if program.weights.canonical(str(source.target)) == name
        }
        if "weight" in roles:
            return parse(str(call.get("format"))).bits
        if "scales" in roles:
            return 0
    return None


def _bits(program: Program, name: str, planned: bool) -> float:
    for reader in readers_of(program, name):
        fmt = weight_format(reader, name, program)
        stored = fmt is not None and any(
            planned or is_rounded(reader, operand) for operand in weights_of(reader) if operand in info(reader).formats
        )
        if fmt is not None and stored:
            return _stored_bits(fmt, program.weights[name].shape[-1])
    if name in program.weights.constants:
        return 32
    return 8.0 * program.dtype.itemsize


def _stored_bits(fmt: Format, width: int) -> float:
    """Bits of an entry of rows of ``width``, whose last block may be short and has a scale too."""
    if fmt.block is None or not width:
        return fmt.bits_per_element
    return fmt.bits + fmt.scale.bits * -(-width // fmt.block) / width


@dataclass(frozen=True)
class Multiplied:
    """A weight that a product multiplies by: its role, elements, and the format that is to hold it, None for float."""

    node: fx.Node
    role: str
    elements: int
    format: Format | None


def multiplied(program: Program) -> list[Multiplied]:
    """Every product with a weight. A weight that is computed counts with what it is computed from."""
    found = []
    for node in program.products():
        weight = spec(node).node_of("weight")
        val = None if weight is None else weight.meta.get("val")
        annotation = info(node).formats.get("weight")
        elements = math.prod(val.shape) if isinstance(val, torch.Tensor) else 0
        found.append(Multiplied(node, role_of(node), elements, None if annotation is None else annotation.format))
    return found


def share_in_format(weights: Iterable[Multiplied]) -> float:
    """The part of the elements that is in a format; 1 where there are none."""
    given = list(weights)
    total = sum(one.elements for one in given)
    return sum(one.elements for one in given if one.format is not None) / total if total else 1.0


def inner(weights: Iterable[Multiplied]) -> list[Multiplied]:
    """Without the head, which is a table of the vocabulary, and without routers, which are small and decide much."""
    return [one for one in weights if one.role not in ("head", "router")]


def left_out(program: Program, least: float = 0.9) -> str | None:
    """In words, what no rule gives a format, where less than ``least`` of the layers' weights has one; else None."""
    weights = inner(multiplied(program))
    share = share_in_format(weights)
    if share >= least or not any(one.format is not None for one in weights):
        return None
    missing: dict[str, list[Multiplied]] = {}
    for one in weights:
        if one.format is None:
            missing.setdefault(one.role or "of no role", []).append(one)
    told = ", ".join(
        f"{len(ones)} {role} (such as {path_of(ones[0].node) or ones[0].node.name})" for role, ones in missing.items()
    )
    return (
        f"only {share:.0%} of the weights that the layers multiply by are to be in a format; no rule takes {told}. "
        "Write rules by role, or say partial = true"
    )
