"""Dataflow patterns: small trees of ops that are matched against the graph from a root node upwards.

A pattern never looks at names or classes of modules. A failed match says how far it came and why it stopped, so
that a pass can report its best partial match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import fx


@dataclass(frozen=True)
class Op:
    """A call to ``target`` whose leading positional operands match ``args``; ``swap`` tries both orders of two."""

    target: torch._ops.OpOverload
    args: tuple[object, ...]
    swap: bool = False


@dataclass(frozen=True)
class Var:
    """Any operand, bound to ``name``; every occurrence must be the same operand. ``where`` may refuse one."""

    name: str
    where: Callable[[object], bool] = field(default=lambda operand: True)


@dataclass(frozen=True)
class Found:
    """Bindings of a match, and the nodes that it covers."""

    bound: Mapping[str, object]
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class Failed:
    """Where a match stopped: the deeper, the nearer it was."""

    depth: int
    reason: str


def is_weight(operand: object) -> bool:
    return isinstance(operand, fx.Node) and operand.op == "get_attr"


def is_number(operand: object) -> bool:
    return isinstance(operand, int | float)


def is_node(operand: object) -> bool:
    return isinstance(operand, fx.Node)


def match(pattern: object, root: object) -> Found | Failed:
    """Match ``pattern`` with ``root`` as its last op; the deepest failure is returned if no way fits."""
    deepest = Failed(-1, "no operand was tried")
    for outcome in _match(pattern, root, {}, 0):
        if isinstance(outcome, Found):
            return outcome
        if outcome.depth > deepest.depth:
            deepest = outcome
    return deepest


def _match(pattern: object, operand: object, bound: Mapping[str, object], depth: int) -> Iterator[Found | Failed]:
    if isinstance(pattern, Var):
        yield _bind(pattern, operand, bound, depth)
    elif isinstance(pattern, Op):
        yield from _match_op(pattern, operand, bound, depth)
    elif isinstance(pattern, list) and isinstance(operand, list | tuple) and len(pattern) == len(operand):
        yield from _match_all(tuple(pattern), tuple(operand), bound, depth)
    elif pattern == operand:
        yield Found(bound, frozenset())
    else:
        yield Failed(depth, f"expected {pattern!r}, found {operand!r}")


def _bind(var: Var, operand: object, bound: Mapping[str, object], depth: int) -> Found | Failed:
    if var.name in bound:
        same = bound[var.name] is operand or bound[var.name] == operand
        return (
            Found(bound, frozenset())
            if same
            else Failed(depth, f"{var.name} is {bound[var.name]} here and {operand} there")
        )
    if not var.where(operand):
        return Failed(depth, f"{operand!r} cannot be {var.name}")
    return Found({**bound, var.name: operand}, frozenset())


def _match_op(pattern: Op, operand: object, bound: Mapping[str, object], depth: int) -> Iterator[Found | Failed]:
    if not isinstance(operand, fx.Node) or operand.target is not pattern.target:
        what = f"{operand.target} at {operand.name}" if isinstance(operand, fx.Node) else repr(operand)
        yield Failed(depth, f"expected {pattern.target}, found {what}")
        return
    if len(operand.args) < len(pattern.args):
        yield Failed(depth, f"{operand.name} has {len(operand.args)} operands, expected {len(pattern.args)}")
        return
    given = tuple(operand.args[: len(pattern.args)])
    for order in permutations(given) if pattern.swap else (given,):
        for outcome in _match_all(pattern.args, order, bound, depth + 1):
            yield Found(outcome.bound, outcome.nodes | {operand}) if isinstance(outcome, Found) else outcome


def _match_all(
    patterns: tuple[object, ...], operands: tuple[object, ...], bound: Mapping[str, object], depth: int
) -> Iterator[Found | Failed]:
    if not patterns:
        yield Found(bound, frozenset())
        return
    for head in _match(patterns[0], operands[0], bound, depth):
        if isinstance(head, Failed):
            yield head
            continue
        for rest in _match_all(patterns[1:], operands[1:], head.bound, depth + 1):
            yield Found(rest.bound, head.nodes | rest.nodes) if isinstance(rest, Found) else rest
