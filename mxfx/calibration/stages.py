"""Cutting a lowered graph into stages: prologue, the parts of each decoder layer, epilogue."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import fx

from mxfx.graph.node import layer_of, path_of
from mxfx.ops.catalogue import spec


@dataclass
class Stage:
    """A run of nodes between two cuts.

    ``layer`` is the decoder layer (None in prologue and epilogue). ``measured`` maps each node that is the input of
    targets to those targets: the linears whose weights may change before the stage runs. ``inputs`` are values of
    earlier stages, ``outputs`` those that later stages read, ``last_use`` the inputs that nobody reads afterwards.
    """

    layer: int | None
    nodes: list[fx.Node] = field(default_factory=list)
    measured: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    last_use: list[fx.Node] = field(default_factory=list)

    @property
    def weights(self) -> list[fx.Node]:
        """The ``get_attr`` nodes that the stage reads."""
        read = {source for node in self.nodes for source in node.all_input_nodes if source.op == "get_attr"}
        return sorted(read)


def cut(graph: fx.Graph, targets: Collection[str] = ()) -> list[Stage]:
    """Stages of ``graph`` in execution order; together they hold every node that computes.

    A stage ends with a decoder layer, and before each group of ``targets`` (names of linears) that
    reads a value of the same layer: q/k/v, then o, then gate/up, then down. A target's input is then always there
    before the target's stage runs.
    """
    position: dict[fx.Node, tuple[int, int]] = {}
    epilogue = 1 + max((layer + 1 for node in graph.nodes if (layer := layer_of(node)) is not None), default=0)
    stages: dict[tuple[int, int], Stage] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "placeholder", "output"):
            continue
        sources = [source for source in node.all_input_nodes if source in position]
        segment = max((_segment(node, sources, position, epilogue), *(position[s][0] for s in sources)))
        local = [position[s][1] for s in sources if position[s][0] == segment]
        is_target = node.name in targets
        # Its input lies in this segment: the target opens a new stage behind it.
        step = 1 if is_target and position.get(input_of(node), (-1,))[0] == segment else 0
        position[node] = (segment, max(local, default=0) + step)
        layer = segment - 1 if 0 < segment < epilogue else None
        stage = stages.setdefault(position[node], Stage(layer))
        stage.nodes.append(node)
        if is_target:
            stage.measured.setdefault(input_of(node), []).append(node)
    ordered = [stages[key] for key in sorted(stages)]
    find_boundaries(ordered)
    return ordered


def input_of(node: fx.Node) -> fx.Node:
    """What a product with a weight multiplies by it. Raises ``ValueError`` for a node that is none."""
    product = spec(node).product
    source = None if product is None else spec(node).node_of(product.left)
    if source is None:
        raise ValueError(f"{node.name} ({path_of(node)}) is no product with a weight")
    return source


def _segment(node: fx.Node, sources: list[fx.Node], position: dict[fx.Node, tuple[int, int]], epilogue: int) -> int:
    """0 before the layers, 1 + index of the layer, or ``epilogue``; glue without a path stays with its inputs."""
    layer = layer_of(node)
    if layer is not None:
        return layer + 1
    latest = max((position[source][0] for source in sources), default=0)
    return epilogue if latest > 0 and path_of(node) else latest


def find_boundaries(stages: list[Stage]) -> None:
    """Fill in ``inputs``, ``outputs`` and ``last_use`` of stages that follow each other."""
    home = {node: index for index, stage in enumerate(stages) for node in stage.nodes}
    last = {
        node: index for index, stage in enumerate(stages) for reader in stage.nodes for node in reader.all_input_nodes
    }
    for index, stage in enumerate(stages):
        read = {s for node in stage.nodes for s in node.all_input_nodes if s.op != "get_attr"}
        stage.inputs = sorted(s for s in read if home.get(s, -1) < index)
        stage.last_use = [s for s in stage.inputs if last[s] == index and s.op != "placeholder"]
        stage.outputs = [node for node in stage.nodes if last.get(node, index) > index]
