"""A program as a module that gradients pass through: quantizers are straight-through, chosen weights are parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

import mxfx.ops.kernels  # noqa: F401  (registers the kernels that have derivatives)
from mxfx.formats import Format
from mxfx.graph.module import build
from mxfx.graph.node import operands
from mxfx.graph.program import Program, compute_dtype
from mxfx.ground.recording import record
from mxfx.ops.kernels.divergence import logit_rows
from mxfx.ops.kernels.limits import has_triton
from mxfx.rewrite import Rewriter
from mxfx.rewrite.lowering import lower_calls

#: Rows of logits that are in float32 at one time: on a CPU so few that memory is used again instead of given out anew.
_ROWS = {"cuda": 2048, "cpu": 64}

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"

_fake_quantize = torch.ops.mxfx.fake_quantize.default


def straight_through(x: Tensor, format: str, axis: int = -1) -> Tensor:
    """``mxfx::fake_quantize`` with the gradient of the identity (arXiv 1308.3432). ``lower`` keeps this call."""
    return torch.ops.mxfx_kernels.fake_quantize(x, format, axis)


def rounded_weight(weight: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """A parameter of training precision on its grid, in the dtype that the model runs in; straight-through."""
    return straight_through(weight, format).to(dtype)


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter of training precision in the dtype that it is stored in; the gradient passes the rounding."""
    return weight.to(dtype)


def looked_up(weight: Tensor, ids: Tensor) -> Tensor:
    """``embedding(weight, ids)`` whose gradient a recorded graph of kernels can compute: it only adds rows."""
    return weight.index_select(0, ids.flatten()).unflatten(0, ids.shape)


def trainable(
    program: Program,
    weights: Mapping[str, Format],
    device: torch.device,
    *,
    free: Collection[str] = (),
    home: torch.device | None = None,
) -> tuple[fx.GraphModule, dict[str, nn.Parameter]]:
    """The program as it is emitted for ``device``, but differentiable, and its float32 parameters by weight name.

    Each weight in ``weights`` is rounded onto its format in every forward pass; its parameter is what stands behind the
    rounding. Weights in ``free`` (canonical names) are parameters without a grid. All other weights are constants.
    Activations are of the dtype that the model runs in. The module lies on ``home``, without one on ``device``.
    """
    home = home or device
    # Gradients underflow in float16.
    copy = program.twin(torch.float32) if program.dtype == torch.float16 else program.copy()
    rw = Rewriter(copy, "trainable")
    tuned = {*weights, *free}
    for node in list(copy.graph.nodes):
        if node.target is _fake_quantize:
            bound = operands(node)
            call = rw.call(
                straight_through, bound["x"], bound["format"], bound["axis"], like=node, val=node.meta["val"]
            )
            rw.replace(node, call)
        elif node.op == "get_attr" and copy.weights.canonical(str(node.target)) in tuned:
            _insert_dtype(rw, node, weights)
    for node in copy.nodes("embedding"):
        bound = operands(node)
        rw.replace(node, rw.call(looked_up, bound["weight"], bound["indices"], like=node, val=node.meta["val"]))
    lower_calls(rw, device)
    copy.graph.eliminate_dead_code()
    copy.facts = copy.facts | {"lowered"}
    module = build(copy).to(home)
    return module, {name: _parameter(module, copy, name, home) for name in [*weights, *sorted(free)]}


def _insert_dtype(rw: Rewriter, node: fx.Node, weights: Mapping[str, Format]) -> None:
    """Between a tuned weight and its readers: its grid if it has one, and the dtype that it runs in."""
    program = rw.program
    name = program.weights.canonical(str(node.target))
    readers = list(node.users)
    dtype = compute_dtype(program.dtype) if name in program.weights.constants else program.dtype
    what = (rounded_weight, node, str(weights[name]), dtype) if name in weights else (in_dtype, node, dtype)
    # Of the layer that reads it, so that a layer has all of its own work in it.
    call = rw.call(*what, like=readers[0], after=node, val=node.meta["val"])
    for reader in readers:
        reader.replace_input_with(node, call)


def _parameter(module: fx.GraphModule, program: Program, name: str, device: torch.device) -> nn.Parameter:
    """Put a parameter of its own, float32 or better, behind every name that a weight has in the module."""
    wide = torch.promote_types(program.dtype, torch.float32)
    parameter = nn.Parameter(program.weights[name].detach().to(device, wide, copy=True))
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for alias in {program.weights.canonical(name), *program.weights.tied_to(name)} & read:
        path, _, leaf = alias.rpartition(".")
        setattr(module.get_submodule(path), leaf, parameter)
    return parameter


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Only kernels that give the same bits each time; a block for the whole process.

    Raises ``ValueError`` for a GPU where cuBLAS was not told to.
    """
    if device.type == "cuda" and os.environ.get(_CUBLAS) not in (":4096:8", ":16:8"):
        raise ValueError(f"deterministic: cuBLAS gives the same bits only where the run starts with {_CUBLAS}=:4096:8")
    before, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills


class _Divergence(torch.autograd.Function):
    """Mean KL(expected ‖ actual) of next-token distributions, a few rows of logits in float32 at a time."""

    @staticmethod
    def forward(ctx: Any, actual: Tensor, expected: Tensor) -> Tensor:
        rows = actual.numel() // actual.shape[-1]
        if actual.is_cuda and has_triton() and actual.is_contiguous() and expected.is_contiguous():
            from mxfx.ops.kernels.divergence_triton import divergence_triton

            found, gradient = divergence_triton(actual.flatten(0, -2), expected.flatten(0, -2))
            ctx.save_for_backward(gradient.view_as(actual))
            return found.mean()
        by_row = logit_rows(actual.flatten(0, -2), expected.flatten(0, -2), gradient=True)
        if by_row is not None:
            ctx.save_for_backward(by_row.gradient.view_as(actual))
            return by_row.kl.mean()
        total = actual.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(actual)
        most = _ROWS.get(actual.device.type, _ROWS["cpu"])
        parts = (t.flatten(0, -2).split(most) for t in (actual, expected, gradient))
        for a, e, g in zip(*parts, strict=True):
            log_a, log_e = a.float().log_softmax(-1), e.float().log_softmax(-1)
            share = log_e.exp()
            total += (share * (log_e - log_a)).sum()
            g.copy_(log_a.exp_().sub_(share).div_(rows))
        ctx.save_for_backward(gradient)
        return total / rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


def divergence(actual: Tensor, expected: Tensor) -> Tensor:
    """Mean over positions of KL(softmax(expected) ‖ softmax(actual)) in nats; logits ``(…, vocabulary)``, 0-dim result.

    The gradient flows to ``actual`` alone.
    """
    result: Tensor = _Divergence.apply(actual, expected)
    return result


def invertible(matrices: Sequence[Tensor]) -> bool:
    """Whether the condition number of every block of matrices ``(…, block, block)`` is below 1e4."""
    return all(bool((torch.linalg.cond(m.detach().float()) < 1e4).all()) for m in matrices)


def failure(loss: Callable[..., Tensor], given: tuple[Tensor, ...], parameters: Mapping[str, nn.Parameter]) -> str:
    """Why the loss and its gradient cannot be computed; empty where they can."""
    try:
        loss(*given).backward()
    except Exception as error:
        # A compiler raises whatever it runs into.
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        for parameter in parameters.values():
            parameter.grad = None
    return ""


class GradientStep:
    """Gradients of a loss of tensors ``(batch, …)``, anew at each call, in ``parameters``' ``grad``.

    On CUDA the first call records one graph of kernels and every call replays it: the host takes longer to launch
    thousands of small kernels than the device to run them. So all batches have one shape there.
    """

    def __init__(self, loss: Callable[..., Tensor], parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._loss = loss
        self._parameters = parameters
        self._device = device
        self._recorded: tuple[torch.cuda.CUDAGraph, list[Tensor]] | None = None

    def __call__(self, *given: Tensor) -> None:
        if self._device.type != "cuda":
            self._clear()
            self._loss(*(tensor.to(self._device) for tensor in given)).backward()
            return
        if self._recorded is None:
            self._recorded = self._record([tensor.to(self._device, copy=True) for tensor in given])
        graph, places = self._recorded
        for place, tensor in zip(places, given, strict=True):
            assert place.shape == tensor.shape  # a smaller one would be broadcast
            place.copy_(tensor)
        graph.replay()

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _record(self, given: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        """The graph, and where it reads what it is given."""

        def run() -> None:
            self._clear()
            self._loss(*given).backward()

        def ready() -> None:
            # Gradients must be born inside the graph, where each replay writes them again.
            self._clear()
            torch.cuda.empty_cache()

        return record(run, self._device, ready)[0], given
