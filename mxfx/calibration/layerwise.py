"""Distillation layer by layer, for models that no device holds: each decoder layer against the float one.

Both read what the quantized layers before them gave, so a layer also learns to repair what those lost. The device holds
one layer of each model, a batch of hidden states and the optimizer of that layer; all other states wait on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from mxfx.calibration.distillation import Distillation, History, Plan
from mxfx.calibration.staged import attribute, run_stage
from mxfx.calibration.stages import Stage, cut
from mxfx.calibration.training import looked_up
from mxfx.ground import ranks
from mxfx.rewrite import Context

_LOOKUPS = (looked_up, torch.ops.aten.embedding.default)


@dataclass(frozen=True)
class _Layer:
    """A decoder layer of a built module: it reads ``carried`` and what layers share, and gives ``result``.

    ``extra`` is what it computes for later layers from sizes and places alone (a mask).
    """

    stage: Stage
    carried: fx.Node
    result: fx.Node
    extra: list[fx.Node]


class LayeredModel:
    """A built module, cut into what stands before the decoder layers, and the layers; its weights stay on the CPU.

    Raises ``ValueError`` for a graph in which more than one value goes from layer to layer.
    """

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        self._module = module
        self._device = device
        stages = cut(module.graph)
        first = next(index for index, stage in enumerate(stages) if stage.layer is not None)
        self._before = stages[:first]
        inner = [stage for stage in stages if stage.layer is not None]
        states = _hidden_states(module.graph)
        self.layers = [_layer(index, inner, states) for index in range(len(inner))]
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
        if layer.extra:
            with torch.no_grad():
                found = self._run(layer, hidden, layer.extra)
            self._shared[len(hidden)].update(zip(layer.extra, found, strict=True))

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """What layer ``index`` makes of ``hidden``, on the device; its weights are there (``move``)."""
        layer = self.layers[index]
        return self._run(layer, hidden, [layer.result])[0]

    def _run(self, layer: _Layer, hidden: Tensor, wanted: list[fx.Node]) -> tuple:
        shared = self._shared[len(hidden)]
        env = {node: hidden if node is layer.carried else shared[node] for node in layer.stage.inputs}
        return run_stage(self._module, layer.stage, env, wanted)

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


def _layer(index: int, inner: list[Stage], states: set[fx.Node]) -> _Layer:
    stage = inner[index]
    carried = [node for node in stage.inputs if node in states]
    result = [node for node in stage.outputs if node in states]
    if len(carried) != 1 or len(result) != 1:
        raise ValueError(
            f"scope = 'layer' needs one value between decoder layers; layer {index} reads "
            f"{', '.join(map(str, carried)) or 'none'} and gives {', '.join(map(str, result)) or 'none'}: "
            "take scope = 'model'"
        )
    return _Layer(stage, carried[0], result[0], [node for node in stage.outputs if node not in states])


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
) -> Iterator[History]:
    """Tune each layer in turn, ``plan.steps`` steps each; the last ``kept`` of the ``tokens`` only judge states.

    ``parameters`` are the student's, by canonical name. The loss of a token is the squared error of the layer's output
    over the square of the float layer's, so that the few tokens of huge norm do not speak for all.
    """
    hidden = _start(student, teacher, tokens, plan, kept)
    student.release()
    teacher.release()
    for index in range(len(student.layers)):
        for model in (student, teacher):
            model.move(index, ctx.device)
            for part in _sizes(hidden, plan, kept):
                model.share(index, part.to(ctx.device))
        names = {canonical(name) for name in student.weights(index)}
        tuned = {name: p for name, p in parameters.items() if name in names}

        def loss(states: Tensor, index: int = index) -> Tensor:
            with torch.no_grad():
                wanted = teacher.run(index, states).float()
            error = (student.run(index, states).float() - wanted).square().sum(-1)
            return (error / wanted.square().sum(-1).clamp_min(1e-12)).mean()

        def check(loss: Callable[[Tensor], Tensor] = loss, states: Tensor = hidden) -> float:
            with torch.no_grad():
                parts = [loss(part.to(ctx.device)) * len(part) for part in states[-kept:].split(plan.batch_size)]
            return float(torch.stack(parts).sum()) / kept

        if tuned:
            loop = Distillation(
                plan,
                tuned,
                loss,
                check,
                lambda chosen, states=hidden: (states[chosen],),  # type: ignore[misc]
                len(hidden) - kept,
                ctx,
                purpose=f"distill layer {index}",
                file=file(index),
            )
            yield loop.run()
        with torch.no_grad():
            mine = hidden[ranks.share(len(hidden))].split(plan.batch_size)
            found = torch.cat([student.run(index, part.to(ctx.device)).cpu() for part in mine])
            hidden = ranks.joined(found, 0, len(hidden))
        for model in (student, teacher):
            model.move(index, torch.device("cpu"))


def _start(student: LayeredModel, teacher: LayeredModel, tokens: Tensor, plan: Plan, kept: int) -> Tensor:
    """Hidden states of all tokens before the first layer, ``(samples, seq, hidden)`` on the CPU."""
    for model in (student, teacher):
        for part in _sizes(tokens, plan, kept):
            model.start(part)
    return torch.cat([student.start(batch).cpu() for batch in tokens.split(plan.batch_size)])


def _sizes(of: Tensor, plan: Plan, kept: int) -> list[Tensor]:
    """The first samples, once for each size of batch that a layer will see."""
    size = plan.batch_size
    sizes = {size, len(of) % size, kept % size, min(size, len(of) - kept), min(size, kept)}
    batch = torch.arange(min(size, len(of) - kept))
    sizes |= {len(part) for part in batch[ranks.share(len(batch))].tensor_split(plan.accumulate)}
    mine = torch.arange(len(of))[ranks.share(len(of))]
    sizes |= {len(part) for part in mine.split(size)}
    return [of[:count] for count in sorted(sizes - {0})]
