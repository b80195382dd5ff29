"""What a level says of a fault."""

from __future__ import annotations

from torch import Tensor, fx

from mxfx.graph.node import op_name, path_of
from mxfx.ground.errors import CheckError


class VerifyError(CheckError, ValueError):
    """A program that is not sound; the message names node, module path, what is wrong and what to do."""


def fault(node: fx.Node, problem: str, advice: str) -> VerifyError:
    where = f"{node.name} = {op_name(node)} in {path_of(node) or 'the top level'}"
    return VerifyError(f"{where}: {problem}; {advice}")


def described(val: object) -> str:
    if isinstance(val, list | tuple):
        return f"({', '.join(map(described, val))})"
    if not isinstance(val, Tensor):
        return f"{type(val).__name__} {val}"
    return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
