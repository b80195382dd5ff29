"""Distillation layer by layer, for models that no device holds: each decoder layer against the float one.

A layer reads what the quantized layers before it gave, and its output is held against what the float layers made of the
same tokens, so that it also repairs what those before it lost. The device holds one layer of one model or the other, a
few batches of hidden states and the optimizer of that layer; all other states wait on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from mxfx.calibration.distillation import Distillation, History, Plan
from mxfx.calibration.staged import attribute, run_stage
from mxfx.calibration.stages import Stage, cut
from mxfx.calibration.training import invertible, looked_up
from mxfx.graph.dependence import cone, made_of, reads
from mxfx.graph.transfers import HostBuffers, Layout
from mxfx.ground import ranks
from mxfx.rewrite import Context

_LOOKUPS = (looked_up, torch.ops.aten.embedding.default)


@dataclass(frozen=True)
class _Layer:
    """A decoder layer of a built module: it reads ``carried`` and what layers share, and gives ``result``.

    ``shared`` is the part of it that computes what later layers read beside that, its outputs (a mask).
    """

    stage: Stage
    carried: fx.Node
    result: fx.Node
    shared: Stage


class LayeredModel:
    """A built module, cut into what stands before the decoder layers, and the layers; its weights stay on the CPU.

    Raises ``ValueError`` for a graph in which more than one value that tokens decide goes from layer to layer. All else
    that layers read is computed once for each size of a batch.
    """

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        self._module = module
        self._device = device
        stages = cut(module.graph)
        first = next(index for index, stage in enumerate(stages) if stage.layer is not None)
        self._before = stages[:first]
        inner = [stage for stage in stages if stage.layer is not None]
        states = _hidden_states(module.graph)
        tokens = made_of(module.graph, (n for n in module.graph.nodes if n.target == "input_ids"))
        self.layers = [_layer(index, inner, states, tokens) for index in range(len(inner))]
        self._shared: dict[int, dict[fx.Node, object]] = {}

    def start(self, ids: Tensor) -> Tensor:
        """The hidden states ``(batch, seq, hidden)`` that the first layer reads."""
        values = self._prologue(ids)
        hidden = values.pop(self.layers[0].carried)
        self._shared.setdefault(len(ids), values)
        return hidden

    def share(self, index: int, hidden: Tensor) -> None:
        """Compute what layer ``index`` gives to all later ones beside hidden states, for batches of this size."""
        layer = self.layers[index]
        with torch.no_grad():
            found = self._run(layer, layer.shared, hidden, layer.shared.outputs)
        self._shared[len(hidden)].update(zip(layer.shared.outputs, found, strict=True))

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """What layer ``index`` makes of ``hidden``, on the device; its weights are there (``move``)."""
        layer = self.layers[index]
        return self._run(layer, layer.stage, hidden, [layer.result])[0]

    def _run(self, layer: _Layer, stage: Stage, hidden: Tensor, wanted: list[fx.Node]) -> tuple:
        shared = self._shared[len(hidden)]
        env = {node: hidden if node is layer.carried else shared[node] for node in stage.inputs}
        return run_stage(self._module, stage, env, wanted)

    def weights(self, index: int) -> set[str]:
        """Names of the tensors that a layer reads."""
        return {str(node.target) for node in self.layers[index].stage.weights}

    def move(self, index: int, device: torch.device) -> None:
        """Put a layer's tensors on a device; parameters stay the same objects."""
        for name in self.weights(index):
            tensor = attribute(self._module, name)
            tensor.data = tensor.data.to(device)
            tensor.grad = None

    def _prologue(self, ids: Tensor) -> dict[fx.Node, object]:
        env: dict[fx.Node, object] = {
            node: ids.to(self._device) if node.target == "input_ids" else None
            for node in self._module.graph.nodes
            if node.op == "placeholder"
        }
        with torch.no_grad():
            for stage in self._before:
                names = [str(node.target) for node in stage.weights]
                for name in names:
                    tensor = attribute(self._module, name)
                    tensor.data = tensor.data.to(self._device)
                given = {node: env[node] for node in stage.inputs}
                env.update(zip(stage.outputs, run_stage(self._module, stage, given, stage.outputs), strict=True))
        return env

    def release(self) -> None:
        """Put the weights that stand before the layers back on the CPU."""
        for stage in self._before:
            for node in stage.weights:
                tensor = attribute(self._module, str(node.target))
                tensor.data = tensor.data.to("cpu")


def _layer(index: int, inner: list[Stage], states: set[fx.Node], tokens: set[fx.Node]) -> _Layer:
    """``states`` are hidden states, ``tokens`` all that tokens decide."""
    stage = inner[index]
    carried = [node for node in stage.inputs if node in states]
    result = [node for node in stage.outputs if node in states]
    if len(carried) != 1 or len(result) != 1:
        raise ValueError(
            f"scope = 'layer' needs one value between decoder layers; layer {index} reads "
            f"{', '.join(map(str, carried)) or 'none'} and gives {', '.join(map(str, result)) or 'none'}: "
            "take scope = 'model'"
        )
    for source in stage.inputs:
        if source in tokens and source not in carried and any(reads(node, source) for node in stage.nodes):
            raise ValueError(
                f"scope = 'layer' needs one value between decoder layers; layer {index} also reads {source}, which is "
                "made of tokens: take scope = 'model'"
            )
    later = {node for other in inner[index + 1 :] for node in other.inputs}
    shared = Stage(stage.layer, outputs=[node for node in stage.outputs if node in later and node not in states])
    shared.nodes = cone(stage.nodes, shared.outputs)
    read = {source for node in shared.nodes for source in node.all_input_nodes}
    shared.inputs = [node for node in stage.inputs if node in read]
    return _Layer(stage, carried[0], result[0], shared)


def _hidden_states(graph: fx.Graph) -> set[fx.Node]:
    """Nodes of the shape of an embedding ``(batch, seq, hidden)`` that are computed from one."""
    found: set[fx.Node] = set()
    behind: set[fx.Node] = set()
    width = 0
    for node in graph.nodes:
        first = node.op == "call_function" and node.target in _LOOKUPS
        if not first and not any(source in behind for source in node.all_input_nodes):
            continue
        behind.add(node)
        value = node.meta.get("val")
        if first:
            width = value.shape[-1]
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3 and value.shape[-1] == width:
            found.add(node)
    return found


class HiddenStates:
    """Hidden states ``(samples, seq, hidden)`` in host memory, pinned where a device copies from it.

    Copies stand on the device's current stream in the order in which they were asked for: nobody waits for them there.
    """

    def __init__(self, first: Tensor, count: int, device: torch.device) -> None:
        layout = Layout(torch.Size((count, *first.shape[1:])), (first[0].numel(), *first.stride()[1:]), first.dtype)
        self._device = device
        self._states = layout.over(HostBuffers(pinned=device.type == "cuda").take(layout.nbytes))

    def __len__(self) -> int:
        return len(self._states)

    def take(self, chosen: Tensor | slice) -> Tensor:
        """The chosen samples, on the device."""
        if isinstance(chosen, slice) or self._device.type != "cuda":
            return self._states[chosen].to(self._device, non_blocking=True)
        found = torch.empty(len(chosen), *self._states.shape[1:], dtype=self._states.dtype, device=self._device)
        # Gathering them on the host first would take longer than all else of a step.
        for place, row in zip(found, chosen.tolist(), strict=True):
            place.copy_(self._states[row], non_blocking=True)
        return found

    def put(self, start: int, found: Tensor) -> None:
        """Samples from ``start`` on."""
        self._states[start : start + len(found)].copy_(found, non_blocking=True)

    def advance(self, run: Callable[[Tensor], Tensor], batch_size: int) -> None:
        """Every state becomes what ``run`` makes of it; of several ranks each does its share."""
        mine = ranks.share(len(self))
        with torch.no_grad():
            for start in range(mine.start, mine.stop, batch_size):
                self.put(start, run(self.take(slice(start, min(start + batch_size, mine.stop)))))
        if ranks.world() > 1:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            self._states.copy_(ranks.joined(self._states[mine], 0, len(self)))


def tune_layers(
    student: LayeredModel,
    teacher: LayeredModel,
    parameters: Mapping[str, nn.Parameter],
    canonical: Callable[[str], str],
    plan: Plan,
    tokens: Tensor,
    kept: int,
    ctx: Context,
    file: Callable[[int], Path | None],
    matrices: Collection[str] = (),
) -> Iterator[History]:
    """Tune each layer in turn, ``plan.steps`` steps each; the last ``kept`` of the ``tokens`` only judge states.

    ``parameters`` are the student's, by canonical name. The loss of a token is the squared error of the layer's output
    over the square of the float model's there, so that the few tokens of huge norm do not speak for all. A weight that
    several layers read is tuned in the first of them; no state counts in which one of ``matrices`` has no inverse.
    """
    given, wanted = (_start(model, tokens, plan, kept, ctx) for model in (student, teacher))
    count = len(given) - kept

    def share(model: LayeredModel, index: int, states: HiddenStates) -> None:
        for size in _sizes(len(tokens), plan, kept):
            model.share(index, states.take(slice(size)))

    for index in range(len(student.layers)):
        teacher.move(index, ctx.device)
        share(teacher, index, wanted)
        wanted.advance(lambda states, index=index: teacher.run(index, states), plan.batch_size)  # type: ignore[misc]
        teacher.move(index, torch.device("cpu"))
        student.move(index, ctx.device)
        names = {canonical(name) for name in student.weights(index)}
        tuned = {name: p for name, p in parameters.items() if name in names and p.requires_grad}

        def loss(states: Tensor, expected: Tensor, index: int = index) -> Tensor:
            wide = expected.float()
            error = (student.run(index, states).float() - wide).square().sum(-1)
            return (error / wide.square().sum(-1).clamp_min(1e-12)).mean()

        if tuned:
            turned = [tuned[name] for name in sorted(tuned.keys() & set(matrices))]
            yield _tune(plan, tuned, turned, loss, (given, wanted), count, ctx, index, file(index))
        for parameter in tuned.values():
            # What a later layer reads too must stay what this one was run with.
            parameter.requires_grad_(False)
        share(student, index, given)
        given.advance(lambda states, index=index: student.run(index, states), plan.batch_size)  # type: ignore[misc]
        student.move(index, torch.device("cpu"))


def _tune(
    plan: Plan,
    tuned: Mapping[str, nn.Parameter],
    matrices: Sequence[Tensor],
    loss: Callable[..., Tensor],
    operands: tuple[HiddenStates, ...],
    count: int,
    ctx: Context,
    index: int,
    file: Path | None,
) -> History:
    """Tune one layer on the first ``count`` samples of its operands. The loop and what it recorded end with this."""

    def take(chosen: Tensor | slice) -> tuple[Tensor, ...]:
        return tuple(states.take(chosen) for states in operands)

    def check() -> float:
        if not invertible(matrices):
            return math.inf
        last = len(operands[0])
        parts = [slice(start, min(start + plan.batch_size, last)) for start in range(count, last, plan.batch_size)]
        with torch.no_grad():
            found = [loss(*take(part)) * (part.stop - part.start) for part in parts]
        return float(torch.stack(found).sum()) / (last - count)

    return Distillation(plan, tuned, loss, check, take, count, ctx, purpose=f"distill layer {index}", file=file).run()


def _start(model: LayeredModel, tokens: Tensor, plan: Plan, kept: int, ctx: Context) -> HiddenStates:
    """What the first layer reads of all tokens."""
    for size in _sizes(len(tokens), plan, kept):
        model.start(tokens[:size])
    states: HiddenStates | None = None
    for start in range(0, len(tokens), plan.batch_size):
        found = model.start(tokens[start : start + plan.batch_size])
        states = states or HiddenStates(found, len(tokens), ctx.device)
        states.put(start, found)
    model.release()
    assert states is not None
    return states


def _sizes(of: int, plan: Plan, kept: int) -> list[int]:
    """Each size of batch that a layer will see of so many samples."""
    size = plan.batch_size
    sizes = {size, of % size, kept % size, min(size, of - kept), min(size, kept)}
    sizes.add(plan.part(of - kept))
    mine = torch.arange(of)[ranks.share(of)]
    sizes |= {len(part) for part in mine.split(size)}
    return sorted(sizes - {0})
