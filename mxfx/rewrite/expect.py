"""``expect = "4 * layers"``: how many places a rule must match, in integer arithmetic over its layers."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LIMIT = 200
_GRAMMAR = "whole numbers, layers, + - * // % and parentheses"


def evaluate(expression: str, *, layers: int) -> int:
    """The value of ``expression`` for a model with ``layers`` decoder layers.

    Raises ``ValueError`` if it is anything but integer arithmetic over ``layers``, or negative.
    """
    value = _evaluate(_parse(expression), layers, expression)
    if value < 0:
        raise ValueError(f"expect = {expression!r} is {value} for {layers} layers; a count cannot be negative")
    return value


def check(expression: str) -> None:
    """Raise ``ValueError`` unless ``expression`` is integer arithmetic over ``layers``; its value does not
    matter.
    """
    for node in ast.walk(_parse(expression)):
        if not _allowed(node):
            raise _refusal(expression, node)


def _parse(expression: str) -> ast.expr:
    if len(expression) > _LIMIT:
        raise ValueError(f"expect has {len(expression)} characters; at most {_LIMIT} are read")
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"expect = {expression!r} is no arithmetic; it may use {_GRAMMAR}") from error


def _allowed(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            return type(value) is int
        case ast.Name(id=name):
            return name == "layers"
        case ast.operator():
            return type(node) in _BINARY
        case ast.UnaryOp(op=op):
            return isinstance(op, ast.USub)
        case ast.BinOp() | ast.USub() | ast.Load():
            return True
    return False


def _evaluate(node: ast.expr, layers: int, expression: str) -> int:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
        case ast.Name(id="layers"):
            return layers
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, layers, expression)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _apply(
                type(op),
                _evaluate(left, layers, expression),
                _evaluate(right, layers, expression),
                expression,
            )
    raise _refusal(expression, node)


def _apply(op: type[ast.operator], left: int, right: int, expression: str) -> int:
    try:
        return _BINARY[op](left, right)
    except ZeroDivisionError as error:
        raise ValueError(f"expect = {expression!r} divides by zero") from error


def _refusal(expression: str, node: ast.AST) -> ValueError:
    found = ast.unparse(node) or type(node).__name__
    return ValueError(f"expect = {expression!r} contains {found!r}; it may use {_GRAMMAR}")
