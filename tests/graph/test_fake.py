"""Fake results: each distinct call of a trace runs once, whichever pass asks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.rewrite import Rewriter
from tests.programs import traced

_RAN: list[tuple[int, ...]] = []


def counted(x: Tensor) -> Tensor:
    _RAN.append(x.stride())
    return x.clone()


def called(program: Program, name: str, target: Callable, *operands: object) -> fx.Node:
    """The call that a pass of that name makes on the first linear of a copy, or on what is made of it."""
    rw = Rewriter(program.copy(), name)
    at = next(rw.program.nodes("linear"))
    return rw.call(target, rw.call(torch.ops.aten.transpose.int, at, *operands, like=at) if operands else at, like=at)


def test_a_call_that_another_pass_made_is_known_unless_strides_or_the_trace_differ() -> None:
    _RAN.clear()
    program = traced("llama-tiny")
    first, again = (called(program, name, counted).meta["val"] for name in ("one", "two"))
    assert again is first and len(_RAN) == 1
    assert called(program, "three", counted, 1, 2).meta["val"].stride() != first.stride() and len(_RAN) == 2
    # A batch and a length of another trace have the same names.
    assert called(trace(tiny("llama-tiny", layers=1)), "four", counted).meta["val"].fake_mode is not first.fake_mode
    assert len(_RAN) == 3


def test_a_closure_runs_each_time() -> None:
    """What it closed over is in no key."""
    made = [called(traced("llama-tiny"), "one", lambda x, times=times: x.repeat(1, 1, times)) for times in (1, 2)]
    assert [node.meta["val"].shape[-1] for node in made] == [64, 128]


def test_numbers_that_two_tensors_of_one_shape_hold_are_two() -> None:
    program = traced("llama-tiny")
    rw = Rewriter(program.copy(), "one")
    at = next(rw.program.nodes("linear"))
    sums = [rw.call(torch.ops.aten.sum.default, at, like=at) for _ in range(2)]
    # Nobody returns them, which whoever traces with these symbols next would be told of.
    with rw.fake_mode.shape_env.ignore_fresh_unbacked_symbols():
        first, second = (rw.call(torch.ops.aten.item.default, one, like=at).meta["val"] for one in sums)
    assert str(first) != str(second)
