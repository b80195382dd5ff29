"""Conditions on batch and length that ``torch.export`` cannot prove: tried on sizes, so that none is taken on trust.

``min(2048, seq) <= seq`` holds always, ``seq != 2048`` at all lengths but one, and the exporter refuses a program for
either. Asked to keep them, it writes them into the graph as assertions, which is where they are read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from mxfx.graph.errors import TraceError

_ASSERTION = torch.ops.aten._assert_scalar.default
#: Every length up to here is tried, further ones around powers of two, around the numbers that a condition holds, and
#: around products, sums, differences and quotients of two of them: ``seq // 100 != 7`` breaks from 700 on.
_EACH = 64
#: Numbers of a condition of which pairs are looked at.
_PAIRED = 6
#: Batches that are tried beside those around a condition's numbers.
_BATCHES = (1, 2, 3, 64, 4096)


def longest_that_holds(exported: ExportedProgram, longest: int) -> int:
    """``longest``, or one less if a condition of an exported program forbids that length alone.

    Raises ``TraceError`` for a condition that does not hold for every batch and for every length up to there.
    """
    batch, seq = _sizes(exported)
    for node in exported.graph.nodes:
        if node.target is not _ASSERTION:
            continue
        condition = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else node.args[0]
        expression = condition.node.expr if isinstance(condition, torch.SymBool) else condition
        if expression is True or str(expression) == "True":
            continue
        unknown = {str(s) for s in getattr(expression, "free_symbols", ())} - {str(batch), str(seq)}
        if isinstance(expression, bool) or unknown:
            raise TraceError(f"its forward pass asks for {expression}, and {unknown or 'no size'} decides")
        near = _near(str(expression))
        batches = _batches(near) if batch in expression.free_symbols else _BATCHES[:1]
        for length in _lengths(near, longest):
            if all(_holds(expression, {batch: many, seq: length}) for many in batches):
                continue
            if length < longest:
                raise TraceError(f"its forward pass does not hold for every batch and length: {expression}")
            longest = length - 1
    return longest


def _sizes(exported: ExportedProgram) -> tuple:
    """The symbols of batch and sequence."""
    first = exported.graph_signature.user_inputs[0]
    (ids,) = (node for node in exported.graph.find_nodes(op="placeholder") if node.name == first)
    batch, seq = (size.node.expr for size in ids.meta["val"].shape)
    return batch, seq


def _holds(expression: Any, sizes: dict) -> bool:
    try:
        return bool(expression.subs(sizes))
    except (ArithmeticError, TypeError) as error:
        raise TraceError(f"its forward pass asks for {expression}, which {sizes} do not decide: {error}") from error


def _near(condition: str) -> set[int]:
    """Numbers around which a condition may change its mind."""
    numbers = sorted({int(number) for number in re.findall(r"\d+", condition)})
    # Of many numbers the pairs are too many: each length is tried with each batch.
    pairs = [(a, b) for a in numbers for b in numbers if a <= b and len(numbers) <= _PAIRED]
    met = {number for a, b in pairs for number in (a * b, a + b, b - a, b // max(a, 1))}
    return {point + step for point in {*numbers, *met} for step in (-1, 0, 1)}


def _batches(near: set[int]) -> list[int]:
    return sorted({many for many in {*near, *_BATCHES} if 1 <= many <= _BATCHES[-1]})


def _lengths(near: set[int], longest: int) -> Iterator[int]:
    powers = {point + step for point in {1 << power for power in range(30)} | {longest} for step in (-1, 0, 1)}
    yield from sorted(length for length in near | powers | set(range(2, _EACH)) if 2 <= length <= longest)
