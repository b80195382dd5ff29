"""Runs the stages of a lowered program over batches of tokens: one pass over all of them, then the next
(``mxfx.calibration.schedule``).

What a stage reads comes to the device a batch ahead, its weights a stage ahead, and what it gives leaves beside the
work of the next batch (``mxfx.graph.transfers``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from mxfx.calibration.activations import ActivationStore, Placement, arrived
from mxfx.calibration.expert_statistics import choice_of
from mxfx.calibration.schedule import Pass, Schedule, joined
from mxfx.calibration.stages import Stage, cut, input_of
from mxfx.graph.program import Program, compute_dtype
from mxfx.graph.transfers import Arrival, Transfers

#: Sees values of nodes of one batch after the other.
Watch = Callable[[dict[fx.Node, Tensor]], None]


class DeviceWeights:
    """Weights of the stages at hand, on the device: as they are stored, and in the dtype that they run in.

    ``weight`` gives the stored tensor of a name, ``behind`` its identity, whether its bytes are there or not.
    """

    def __init__(
        self,
        program: Program,
        weight: Callable[[str], Tensor],
        behind: Callable[[str], Tensor],
        transfers: Transfers,
    ) -> None:
        self._program = program
        self._weight = weight
        self._behind = behind
        self._transfers = transfers
        self._coming: dict[str, tuple[Tensor, Arrival]] = {}
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def prefetch(self, names: Iterable[str]) -> None:
        """Let weights come to the device, but for those that are there as they run: for what was just stored, the
        caller would wait until its bytes have left the device, to bring them back.
        """
        for name in names:
            if self._as_kept(name) is None:
                self._arrival(name)

    def stored(self, name: str) -> Tensor:
        """A weight as it is stored, on the device."""
        return self._arrival(name).get()

    def master(self, name: str) -> Tensor:
        """A weight in float32 or better, for the arithmetic of a pass."""
        tensor = self.stored(name)
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def running(self, name: str) -> Tensor:
        """A weight in the dtype that it runs in."""
        kept = self._as_kept(name)
        return self._as_run(name, self.stored(name)) if kept is None else kept

    def keep(self, name: str, tensor: Tensor) -> None:
        """Let ``tensor`` stand for what was just stored under ``name``: it is on the device already."""
        self._coming.pop(name, None)
        self._kept[name] = (self._behind(name), self._as_run(name, tensor))

    def forget(self, but: Iterable[str] = ()) -> None:
        """Let go of all weights but those."""
        kept = set(but)
        self._coming = {name: found for name, found in self._coming.items() if name in kept}
        self._kept = {name: found for name, found in self._kept.items() if name in kept}

    def _as_kept(self, name: str) -> Tensor | None:
        kept = self._kept.get(name)
        return kept[1] if kept is not None and kept[0] is self._behind(name) else None

    def _arrival(self, name: str) -> Arrival:
        known = self._coming.get(name)
        if known is None or known[0] is not self._behind(name):
            tensor = self._weight(name)
            known = self._coming[name] = (tensor, self._transfers.staged_up(tensor))
        return known[1]

    def _as_run(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        constant = self._program.weights.canonical(name) in self._program.weights.constants
        return tensor.to(compute_dtype(self._program.dtype) if constant else self._program.dtype)


class Runner:
    """The stages of one lowered program, and the values that wait between them.

    ``targets`` are names of linears that stages are cut at; ``weight`` and ``behind`` as for ``DeviceWeights``.
    """

    def __init__(
        self,
        program: Program,
        targets: tuple[str, ...],
        batches: Sequence[Tensor],
        device: torch.device,
        placement: Placement,
        weight: Callable[[str], Tensor],
        behind: Callable[[str], Tensor],
    ) -> None:
        self.stages = cut(program.graph, frozenset(targets))
        self._schedule = Schedule(self.stages, placement, device)
        self._batches = len(batches)
        self._transfers = Transfers(device)
        self.weights = DeviceWeights(program, weight, behind, self._transfers)
        self._store = ActivationStore(placement, self._transfers)
        inputs = [node.name for node in program.graph.nodes if node.op == "placeholder"]
        for number, ids in enumerate(batches):
            self._store.put(number, dict.fromkeys(inputs) | {"input_ids": ids})

    @property
    def done(self) -> int:
        """The stage that the stream stands before: all before it ran, with what waits or can be computed again."""
        return self._schedule.done

    @property
    def unpinned(self) -> str:
        """Why some of the host's buffers are not pinned; empty where all are, or none need be."""
        return self._transfers.buffers.refused

    def close(self) -> None:
        self.weights.forget()
        self._transfers.close()
        self._store.close()

    def settle(self) -> None:
        """Wait until values that wait elsewhere have left the device: for work that needs its memory."""
        self._transfers.settle()

    def sources(self, measured: dict[fx.Node, list[fx.Node]]) -> dict[fx.Node, fx.Node]:
        """Which node of this program corresponds to each measured node of another, by the linears that read it."""
        mine = {n.name: source for stage in self.stages for source, readers in stage.measured.items() for n in readers}
        return {source: mine[readers[0].name] for source, readers in measured.items()}

    def expert_sources(self, name: str) -> tuple[fx.Node, fx.Node]:
        """The tensor and the choice of experts that the stacked linear of that name reads in this program."""
        found = (n for stage in self.stages for readers in stage.measured.values() for n in readers if n.name == name)
        node = next(found)
        choice = choice_of(node)
        assert choice is not None
        return input_of(node), choice

    @torch.no_grad()
    def advance(self, index: int, watched: Sequence[fx.Node] = (), watch: Watch | None = None) -> None:
        """Run the stages before ``index``; keep what later ones read, drop what nobody reads any more.

        ``watch`` sees the ``watched`` among what the stage right before ``index`` gives, while it is there.
        """
        for one in self._schedule.until(index):
            seen = watch if self._schedule.done == index else None
            if seen is not None or one.keeps:
                self._run(one, watched, seen)
            following = self._schedule.next
            self.weights.forget(but=_names(*self._schedule.pending, *([following] if following else [])))

    def _run(self, one: Pass, watched: Sequence[fx.Node], watch: Watch | None) -> None:
        stage = one.joined(watch is not None)
        weights = self._load(stage)
        if (following := self._schedule.next) is not None:
            self.weights.prefetch(_names(following))
        for batch, given in self._given(stage.inputs):
            env = execute_stage(stage, given, weights, [*one.outputs, *(watched if watch is not None else ())])
            if watch is not None:
                watch({node: env[node] for node in watched})  # type: ignore[misc]
            self._store.put(batch, {node.name: env[node] for node in one.outputs})
            for node in one.over:
                self._store.drop(batch, node.name)

    @torch.no_grad()
    def values(self, index: int, nodes: list[fx.Node]) -> Iterator[dict[fx.Node, Tensor]]:
        """Values of ``nodes`` per batch, with stage ``index`` next: stored ones, or computed inside that stage."""
        steps = [*self._schedule.pending, self.stages[index]]
        while steps and not set(nodes) & set(steps[-1].nodes):
            steps.pop()
        stage = joined(steps) if steps else Stage(None)
        inside = [node for node in nodes if node in set(stage.nodes)]
        stored = [node for node in nodes if node not in inside]
        weights = self._load(stage) if inside else {}
        needed = [*stored, *([node for node in stage.inputs if node not in stored] if inside else [])]
        for _, given in self._given(needed):
            found = {node: given[node] for node in stored}
            yield found | (execute_stage(stage, given, weights, inside) if inside else {})  # type: ignore[misc]

    def _given(self, nodes: Sequence[fx.Node]) -> Iterator[tuple[int, dict[fx.Node, object]]]:
        """The waiting values of some nodes batch by batch; the dictionary is the caller's to empty."""
        names = [node.name for node in nodes]
        coming = self._store.fetch(0, names)
        for batch in range(self._batches):
            there = arrived(coming)
            coming = self._store.fetch(batch + 1, names) if batch + 1 < self._batches else {}
            given = {node: there[node.name] for node in nodes}
            del there
            yield batch, given

    def _load(self, stage: Stage) -> dict[fx.Node, Tensor]:
        self.weights.prefetch(_names(stage))
        return {node: self.weights.running(str(node.target)) for node in stage.weights}


def _names(*stages: Stage) -> list[str]:
    return [str(node.target) for stage in stages for node in stage.weights]


def execute_stage(
    stage: Stage, env: dict[fx.Node, object], weights: Mapping[fx.Node, Tensor], keep: Sequence[fx.Node]
) -> dict[fx.Node, object]:
    """The values of ``keep`` (among others) of a stage whose inputs are in ``env``, which is emptied on the way."""
    env.update(weights)
    last = {source: node for node in stage.nodes for source in node.all_input_nodes}
    for node in stage.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        env[node] = node.target(*args, **kwargs)
        del args, kwargs
        for source in node.all_input_nodes:
            if last[source] is node and source not in keep:
                env.pop(source, None)
    return env
