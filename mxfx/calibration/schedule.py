"""In which passes over the batches the stages of a stream run, and what of their values waits between two passes.

A norm costs less to compute again than to keep; so does ``silu(gate) * up``, several times as wide as what it is made
of, where it would travel to the host and back. Such values do not wait: one pass measures them, and the stage that
reads them runs in another, behind the stages that give them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from mxfx.calibration.activations import Placement
from mxfx.calibration.expert_statistics import choice_of
from mxfx.calibration.stages import Stage, find_boundaries
from mxfx.ops.catalogue import spec

#: Operations that a device does while a byte travels to where values wait: 700 TFLOP/s and a link of 50 GB/s; for a CPU
#: 100 GFLOP/s and files of 1 GB/s.
WHILE_A_BYTE_TRAVELS = {"cuda": 14_000.0, "cpu": 100.0}
#: For a GPU a file of 2 GB/s is that much further away.
_FILES = 25.0
#: Not elementwise, but cheap beside a product: other shapes and dtypes, norms and what they are spelled out as.
_CHEAP = frozenset(
    {"reshape", "to", "mean", "amax", "sum", "layer_norm", "native_layer_norm", "rms_norm", "split", "chunk"}
)


@dataclass(frozen=True)
class Pass:
    """Stages that run one after the other over each batch, before the next batch.

    ``steps`` end with the one whose outputs wait for later passes; where ``keeps`` is false, none do, and the pass is
    for nobody but who watches. ``ahead`` only compute what is watched: they run again in a later pass.
    """

    steps: tuple[Stage, ...]
    ahead: tuple[Stage, ...]
    keeps: bool

    @property
    def outputs(self) -> list[fx.Node]:
        """What waits behind it."""
        return self.steps[-1].outputs if self.keeps else []

    @property
    def over(self) -> list[fx.Node]:
        """What need not wait any longer."""
        return [node for step in self.steps for node in step.last_use] if self.keeps else []

    def joined(self, watched: bool) -> Stage:
        """Its stages as one."""
        return joined((*self.steps, *self.ahead) if watched else self.steps)


class Schedule:
    """The passes of a stream that comes to one stage after the other.

    ``done`` counts the stages that were come to; ``pending`` are steps behind which nothing waits, so that they run
    again. ``placement`` says where values wait: on the device only what costs no product is computed again.
    """

    def __init__(self, stages: Sequence[Stage], placement: Placement, device: torch.device) -> None:
        self.done = 0
        self.pending: tuple[Stage, ...] = ()
        worth = 0.0 if placement == "device" else WHILE_A_BYTE_TRAVELS.get(device.type, WHILE_A_BYTE_TRAVELS["cpu"])
        worth *= _FILES if placement == "disk" and device.type == "cuda" else 1.0
        parts = [_parts(stage) for stage in stages]
        pieces = [piece for found in parts for piece in found]
        find_boundaries(pieces)
        again = iter(_again(pieces, worth))
        self._steps: list[Stage] = []
        self._again: list[bool] = []
        #: By stage: where its steps begin.
        self._first = []
        for stage, found in zip(stages, parts, strict=True):
            self._first.append(len(self._steps))
            flags = [next(again) for _ in found]
            split = len(found) == 1 or flags[-1]
            self._steps += found if split else [stage]
            self._again += flags if split else [False]
        self._first.append(len(self._steps))
        find_boundaries(self._steps)
        self._end = self._first[max((i + 1 for i, stage in enumerate(stages) if stage.measured), default=0)]
        self._at = 0

    @property
    def next(self) -> Stage | None:
        """The step that has not run yet, as far as anything behind it is measured."""
        return self._steps[self._at] if self._at < self._end else None

    def until(self, index: int) -> Iterator[Pass]:
        """The passes that bring the stream from where it stands to the stage of that number."""
        target = self._first[index]
        while self._at < target:
            steps = list(self.pending)
            keeps = False
            while self._at < target and not keeps:
                steps.append(self._steps[self._at])
                keeps = not self._again[self._at]
                self._at += 1
            ahead = self._steps[self._at : target] if all(self._again[self._at : target]) else []
            self._at += len(ahead)
            self.pending = (*(() if keeps else steps), *ahead)
            if self._at == target:
                self.done = index
            yield Pass(tuple(steps), tuple(ahead), keeps)


def joined(steps: Sequence[Stage]) -> Stage:
    """Steps as one stage: of its inputs none is computed in it."""
    nodes = [node for step in steps for node in step.nodes]
    inside = set(nodes)
    inputs = {node for step in steps for node in step.inputs if node not in inside}
    return Stage(steps[-1].layer, nodes, inputs=sorted(inputs))


def _parts(stage: Stage) -> list[Stage]:
    """A stage, and apart from it what only later stages read and what it could be computed from waits anyway."""
    if stage.layer is None:
        return [stage]
    inside, tail = set(stage.nodes), {node for node in stage.nodes if _cheap(node) and spec(node).product is None}
    while True:
        rest = inside - tail
        outside = {node for node in rest if any(user not in inside for user in node.users)}
        kept = {
            node
            for node in tail
            if not any(user in rest for user in node.users)
            and all(source not in rest or source in outside for source in node.all_input_nodes)
        }
        if kept == tail:
            break
        tail = kept
    if not tail or not rest:
        return [stage]
    return [
        Stage(stage.layer, [node for node in stage.nodes if node not in tail], stage.measured),
        Stage(stage.layer, [node for node in stage.nodes if node in tail]),
    ]


def _again(steps: Sequence[Stage], worth: float) -> list[bool]:
    """Which steps run again instead of their outputs waiting: those that only the next one reads, and cost little."""
    last: dict[fx.Node, int] = {node: i for i, step in enumerate(steps) for node in step.inputs}
    found = []
    for index, step in enumerate(steps):
        following = steps[index + 1] if index + 1 < len(steps) else None
        found.append(
            following is not None
            and step.layer is not None
            and bool(step.outputs)
            and all(last[node] == index + 1 and isinstance(node.meta.get("val"), Tensor) for node in step.outputs)
            # Experts are measured in several passes.
            and all(choice_of(node) is None for stage in (step, following) for node in _products(stage))
            and all(_cheap(node) for node in step.nodes)
            and _operations(step) <= worth * sum(map(_bytes, step.outputs))
            # What it reads waits longer instead.
            and sum(map(_bytes, step.last_use)) < sum(map(_bytes, step.outputs))
        )
    return found


def _products(step: Stage) -> list[fx.Node]:
    return [node for node in step.nodes if spec(node).product is not None]


def _operations(step: Stage) -> float:
    """Of the products of a step, for each token."""
    weights = (spec(node).node_of(spec(node).product.right) for node in _products(step))
    return sum(2.0 * weight.meta["val"].numel() for weight in weights if weight is not None)


def _bytes(node: fx.Node) -> int:
    """Of a value, for each token: sizes that follow the tokens are symbols."""
    val = node.meta["val"]
    if not isinstance(val, Tensor):
        return 0
    return val.dtype.itemsize * prod(size for size in val.shape if isinstance(size, int))


def _cheap(node: fx.Node) -> bool:
    """Whether a node is a product with a weight, or costs little beside one."""
    if spec(node).product is not None:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.namespace == "mxfx_kernels" or torch.Tag.pointwise in node.target.tags:
        return True
    name = node.target.overloadpacket.__name__
    views = any(value.alias_info is not None for value in node.target._schema.returns)
    return node.target.namespace == "aten" and (views or name in _CHEAP)
