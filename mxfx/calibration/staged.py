"""A built module, run stage by stage: what stands before the decoder layers, each of them, what stands behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from mxfx.calibration.stages import Stage, cut

_BACKEND = "inductor"


class Staged:
    """A built module as a function of ``input_ids``, int64 ``(batch, seq)``; gives ``(batch, seq, vocabulary)``.

    recompute: each decoder layer runs a second time when its gradient is asked for (arXiv 1604.06174): memory of one
        layer and one value a layer, for a third more work.
    compiled: decoder layers go through ``torch.compile``, which makes a few kernels of many small ones. Layers of the
        same graph share one compilation. What they compute is rounded in fewer places.
    """

    def __init__(self, module: fx.GraphModule, *, recompute: bool = False, compiled: bool = False) -> None:
        self._module = module
        self._recompute = recompute
        self._stages = cut(module.graph)
        self._result = next(node for node in module.graph.nodes if node.op == "output").args[0]
        self._calls = {stage.layer: self._call(stage) for stage in self._stages if stage.layer is not None}
        if compiled:
            self._calls = dict(zip(self._calls, self._compiled(), strict=True))

    def __call__(self, ids: Tensor) -> Tensor:
        return self._run(self._stages, self._start(ids))[self._result]

    @property
    def has_states(self) -> bool:
        """Whether all that stands behind the decoder layers reads one value."""
        last = self._stages[-1]
        return last.layer is None and len(last.inputs) == 1 and self._result in last.nodes

    def states(self, ids: Tensor) -> Tensor:
        """What the decoder layers give to the rest, ``(batch, seq, hidden)``; see ``has_states``."""
        return self._run(self._stages[:-1], self._start(ids))[self._stages[-1].inputs[0]]

    def logits(self, states: Tensor) -> Tensor:
        """What the module gives, from its ``states``."""
        last = self._stages[-1]
        return self._run([last], {last.inputs[0]: states})[self._result]

    def _start(self, ids: Tensor) -> dict[fx.Node, Any]:
        inputs = [node for node in self._module.graph.nodes if node.op == "placeholder"]
        return {node: ids if node.target == "input_ids" else None for node in inputs}

    def _run(self, stages: Iterable[Stage], env: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        for stage in stages:
            given = [env[node] for node in stage.inputs]
            if stage.layer is None:
                found = run_stage(self._module, stage, dict(zip(stage.inputs, given, strict=True)), self._wanted(stage))
            elif self._recompute:
                found = checkpoint(self._calls[stage.layer], *given, use_reentrant=False, preserve_rng_state=False)
            else:
                found = self._calls[stage.layer](*given)
            env.update(zip(self._wanted(stage), found, strict=True))
            if stage is not self._stages[-1]:
                for node in stage.last_use:
                    env.pop(node, None)
        return env

    def _wanted(self, stage: Stage) -> list[fx.Node]:
        return [*stage.outputs, *([self._result] if self._result in stage.nodes else [])]

    def _call(self, stage: Stage) -> Callable[..., tuple]:
        def run(*values: Any) -> tuple:
            env = dict(zip(stage.inputs, values, strict=True))
            return run_stage(self._module, stage, env, self._wanted(stage))

        return run

    def _compiled(self) -> Iterable[Callable[..., tuple]]:
        known: dict[tuple, Callable[..., tuple]] = {}
        for stage in self._stages:
            if stage.layer is None:
                continue
            alone = graph_of(stage, self._wanted(stage))
            key = (alone.code, *(str(node.target) for node in alone.graph.nodes))
            if key not in known:
                known[key] = torch.compile(alone, backend=_BACKEND, dynamic=False, fullgraph=True)
            names = [str(node.target) for node in stage.weights]
            yield lambda *values, run=known[key], names=names: run(
                *values, *(attribute(self._module, name) for name in names)
            )


def graph_of(stage: Stage, wanted: Sequence[fx.Node]) -> fx.GraphModule:
    """A stage as a module of its own: of its inputs and its weights, in order; gives the ``wanted`` nodes.

    Nodes are named by their places, so that stages that do the same are the same text.
    """
    graph = fx.Graph()
    env = {node: graph.placeholder(f"given_{i}") for i, node in enumerate([*stage.inputs, *stage.weights])}
    for index, node in enumerate(stage.nodes):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        env[node] = graph.create_node("call_function", node.target, args, kwargs, name=f"value_{index}")
    graph.output(tuple(env[node] for node in wanted))
    return fx.GraphModule(nn.Module(), graph)


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
