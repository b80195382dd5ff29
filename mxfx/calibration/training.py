"""A program as a module that gradients pass through: quantizers are straight-through, chosen weights are parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import mxfx.ops.kernels  # noqa: F401  (registers the kernels that have derivatives)
from mxfx.calibration.stages import Stage, cut
from mxfx.formats import Format
from mxfx.graph.module import build
from mxfx.graph.node import operands
from mxfx.graph.program import Program, compute_dtype
from mxfx.rewrite import Rewriter
from mxfx.rewrite.lowering import lower_calls

#: Rows of logits that are in float32 at one time.
_ROWS = 2048

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


def checkpointed(module: fx.GraphModule) -> Callable[[Tensor], Tensor]:
    """The module as a function of ``input_ids`` that keeps, for the gradient, only what crosses from layer to layer.

    Each decoder layer runs a second time when its gradient is asked for (arXiv 1604.06174): memory of one layer and one
    value a layer, for a third more work.
    """
    stages = cut(module.graph, frozenset(), within_layer=False)
    result = next(node for node in module.graph.nodes if node.op == "output").args[0]
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]

    def call(ids: Tensor) -> Tensor:
        env: dict[fx.Node, Any] = {node: ids if node.target == "input_ids" else None for node in inputs}
        for stage in stages:
            wanted = [*stage.outputs, *([result] if result in stage.nodes else [])]

            def run(*values: Any, stage: Stage = stage, wanted: list[fx.Node] = wanted) -> tuple:
                return run_stage(module, stage, dict(zip(stage.inputs, values, strict=True)), wanted)

            given = [env[node] for node in stage.inputs]
            if stage.layer is None:
                found = run(*given)
            else:
                found = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
            env.update(zip(wanted, found, strict=True))
            for node in stage.last_use:
                env.pop(node, None)
        return env[result]

    return call


def run_stage(module: fx.GraphModule, stage: Stage, env: dict[fx.Node, Any], wanted: Sequence[fx.Node]) -> tuple:
    """The values of ``wanted`` nodes of a stage of the module's graph; ``env`` holds the stage's inputs."""
    env.update({node: attribute(module, str(node.target)) for node in stage.weights})
    for node in stage.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        env[node] = node.target(*args, **kwargs)
    return tuple(env[node] for node in wanted)


def attribute(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


class _Divergence(torch.autograd.Function):
    """Mean KL(expected ‖ actual) of next-token distributions, a few rows of logits in float32 at a time."""

    @staticmethod
    def forward(ctx: Any, actual: Tensor, expected: Tensor) -> Tensor:
        rows = actual.numel() // actual.shape[-1]
        total = actual.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(actual)
        parts = (t.flatten(0, -2).split(_ROWS) for t in (actual, expected, gradient))
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


class GradientStep:
    """Gradients of a loss of token ids ``(batch, seq)``, anew at each call, in ``parameters``' ``grad``.

    On CUDA the first call records one graph of kernels and every call replays it: the host takes longer to launch
    thousands of small kernels than the device to run them. So all batches have one shape there.
    """

    def __init__(
        self, loss: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter], device: torch.device
    ) -> None:
        self._loss = loss
        self._parameters = parameters
        self._device = device
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self, ids: Tensor) -> None:
        if self._device.type != "cuda":
            self._clear()
            self._loss(ids.to(self._device)).backward()
            return
        if self._recorded is None:
            self._recorded = self._record(ids.to(self._device, copy=True))
        graph, place = self._recorded
        place.copy_(ids)
        graph.replay()

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _record(self, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph, and where it reads its ids. Warms up on a stream of its own, as recording demands."""
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._clear()
                self._loss(ids).backward()
        current.wait_stream(aside)
        # Gradients must be born inside the graph, where each replay writes them again.
        self._clear()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss(ids).backward()
        return graph, ids
