"""Run calibration tokens through a program once, layer by layer, while a pass rewrites the layers.

The lowered graph is cut into stages (``mxfx.calibration.stages``). Only one stage's weights are on the device at a
time; between stages the values that cross the cut wait in an ``ActivationStore``. A stage runs when something behind
it is asked for, with the weights that the rewriter's store holds then: so every layer sees its predecessors as
rewritten, nothing runs twice, and a run that resumes from stored weights replays exactly what it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, fx

from mxfx.calibration.activations import ActivationStore, Placement
from mxfx.calibration.expert_statistics import ExpertStatistics, choice_of, measure_experts
from mxfx.calibration.keys import Keys, environment, token_key
from mxfx.calibration.stages import Stage, cut, input_of
from mxfx.calibration.statistics import CrossMoment, Gram, Statistics
from mxfx.graph.node import layer_of, path_of
from mxfx.graph.program import Program, compute_dtype
from mxfx.ops.catalogue import spec
from mxfx.rewrite import Context, Rewriter
from mxfx.rewrite.lowering import lowered_copy


@dataclass(frozen=True)
class StreamOptions:
    """How a stream runs.

    ``batch_size`` samples go through a stage at once. ``dtype`` is the precision of the run; None means float32 on CPU
    and the model's own elsewhere. ``activations`` says where values wait between stages. ``reference`` runs a second
    stream with the weights and without the quantizers that the program had at first, for cross moments.
    """

    batch_size: int = 8
    dtype: torch.dtype | None = None
    activations: Placement = "device"
    reference: bool = False
    fewest: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")

    def result_key(self) -> dict[str, object]:
        """The options that decide results; where activations wait does not."""
        return {
            "batch_size": self.batch_size,
            "dtype": str(self.dtype),
            "reference": self.reference,
        }


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor, and the statistics of that tensor."""

    source: fx.Node
    linears: tuple[fx.Node, ...]
    statistics: Statistics


@dataclass(frozen=True)
class ExpertGroup:
    """Stacked linears that read one tensor by one choice of experts, and the statistics of a range of the experts.

    ``sources`` are the tensor and the choice. The groups of one stack follow each other until they have all experts.
    """

    sources: tuple[fx.Node, fx.Node]
    linears: tuple[fx.Node, ...]
    statistics: ExpertStatistics


@dataclass(frozen=True)
class LayerRun:
    """A decoder layer (``index`` None: before or behind the layers) that the stream has come to.

    ``targets`` are its linears in execution order. Iterate ``groups`` to measure and rewrite them; a pass that sets
    the layer's weights without measuring just goes on to the next layer.
    """

    index: int | None
    targets: tuple[fx.Node, ...]
    _groups: Callable[[], Iterator[Group | ExpertGroup]] = field(repr=False)

    def groups(self) -> Iterator[Group | ExpertGroup]:
        """Each group in turn; what the caller rewrote before asking for the next one is in its statistics."""
        return self._groups()


def stream_layers(
    rw: Rewriter,
    ctx: Context,
    targets: Sequence[fx.Node],
    tokens: Tensor,
    options: StreamOptions | None = None,
    view: Callable[[Program], Program] = lambda program: program,
) -> Iterator[LayerRun]:
    """Yield the layers that hold ``targets`` (linears of ``rw.program``) while ``tokens`` run through the program.

    ``tokens`` are int64 ``(samples, length)``. ``view`` may derive the program that runs (with or without activation
    quantizers) from a copy of ``rw.program``; weights are always read from ``rw``, and linears keep their names.

    Raises ``ValueError`` for targets that are no linears of the program, or tokens of another shape.
    """
    stream = _Stream(rw, ctx, targets, tokens, options or StreamOptions(), view)
    try:
        yield from stream.layers()
    finally:
        stream.close()


def without_quantizers(program: Program) -> Program:
    """A copy in which no activation is rounded."""
    copy = program.copy()
    for node in copy.nodes("fake_quantize"):
        source = node.args[0]
        if isinstance(source, fx.Node) and source.op != "get_attr":
            node.replace_all_uses_with(source)
            copy.graph.erase_node(node)
    return copy


class _Stream:
    def __init__(
        self,
        rw: Rewriter,
        ctx: Context,
        targets: Sequence[fx.Node],
        tokens: Tensor,
        options: StreamOptions,
        view: Callable[[Program], Program],
    ) -> None:
        _check(rw.program, targets, tokens)
        self._rw = rw
        self._options = options
        self._device = ctx.device
        self._targets = {node.name: node for node in targets}
        start = rw.program.copy()
        sources = {source.name for node in targets for source in (input_of(node), choice_of(node)) if source}
        #: Of the program as it is now, by the name of the tensor that is measured.
        self._sources = {node.name: node for node in start.graph.nodes if node.name in sources}
        self._start_hash = start.weights.hash
        self._start_keys, self._keys = Keys(), Keys()
        dtype = options.dtype or (torch.float32 if ctx.device.type == "cpu" else rw.program.dtype)
        self._data = {
            "tokens": token_key(tokens),
            "options": options.result_key() | {"dtype": str(dtype), "view": getattr(view, "__name__", repr(view))},
            "environment": environment(ctx.device),
        }
        batches = tokens.split(options.batch_size)
        run = _lower(view(rw.program.copy()), dtype, ctx)
        self._main = _Runner(
            run, tuple(self._targets), batches, ctx.device, options, lambda name: _current(rw, run, name)
        )
        self._reference: _Runner | None = None
        if options.reference:
            plain = _lower(without_quantizers(start), dtype, ctx)
            self._reference = _Runner(
                plain, tuple(self._targets), batches, ctx.device, options, lambda name: plain.weights[name]
            )
        self._used: dict[str, str] = {}
        self._closed = False

    def close(self) -> None:
        self._closed = True
        self._main.close()
        if self._reference is not None:
            self._reference.close()

    def layers(self) -> Iterator[LayerRun]:
        stages = [index for index, stage in enumerate(self._main.stages) if stage.measured]
        for layer, indices in groupby(stages, key=lambda index: self._main.stages[index].layer):
            mine = list(indices)
            names = [node.name for i in mine for group in self._main.stages[i].measured.values() for node in group]
            yield LayerRun(layer, tuple(self._targets[name] for name in names), lambda mine=mine: self._groups(mine))  # type: ignore[misc]

    def _groups(self, stages: list[int]) -> Iterator[Group | ExpertGroup]:
        for index in stages:
            if self._closed:
                raise RuntimeError("the stream is closed: measure a layer while stream_layers stands at it")
            self._run_to(index)
            self._note_weights(self._main.stages[index])
            # Groups of plain linears are measured all at once, then handed out one by one.
            yield from self._measure(index)
            yield from self._measure_experts(index)

    def _run_to(self, index: int) -> None:
        """Run every stage before ``index`` that has not run yet, with the weights of this moment."""
        while self._main.done < index:
            self._note_weights(self._main.stages[self._main.done])
            self._main.run_next()
        while self._reference is not None and self._reference.done < index:
            self._reference.run_next()

    def _note_weights(self, stage: Stage) -> None:
        """Remember which weights a stage runs with: what its results are keyed by."""
        names = {str(node.target) for node in stage.weights}
        self._used |= {name: self._rw.weights.hash(name) for name in names if name in self._rw.weights}

    def _measure(self, index: int) -> list[Group]:
        found = self._main.stages[index].measured.items()
        measured = {source: plain for source, all_ in found if (plain := [n for n in all_ if choice_of(n) is None])}
        sources = list(measured)
        if not sources:
            return []
        grams: dict[fx.Node, Gram] = {}
        crosses: dict[fx.Node, CrossMoment] = {}
        twins = self._reference.sources(measured) if self._reference is not None else {}
        references = self._reference.values(index, list(twins.values())) if self._reference is not None else None
        for values in self._main.values(index, sources):
            other = next(references) if references is not None else {}
            for source in sources:
                x = values[source]
                columns = x.shape[-1]
                grams.setdefault(source, Gram(columns, x.device)).add(x)
                if source in twins:
                    cross = crosses.setdefault(source, CrossMoment(columns, x.device))
                    cross.add(x, other[twins[source]])
        return [self._group(linears, grams[source], crosses.get(source)) for source, linears in measured.items()]

    def _measure_experts(self, index: int) -> Iterator[ExpertGroup]:
        """Stacked linears of a stage by what they read, and all experts of one before those of the next."""
        stacks: dict[tuple[fx.Node, fx.Node], list[fx.Node]] = {}
        for source, linears in self._main.stages[index].measured.items():
            for node in linears:
                if (choice := choice_of(node)) is not None:
                    stacks.setdefault((source, choice), []).append(node)
        for (source, choice), linears in stacks.items():
            targets = tuple(self._targets[node.name] for node in linears)
            sources = [input_of(targets[0]), choice_of(targets[0])]
            twins = None if self._reference is None else self._reference.expert_sources(linears[0].name)
            experts = self._rw.weights[self._rw.program.weight_of(targets[0])].shape[0]
            for part in measure_experts(
                lambda nodes: self._main.values(index, nodes),
                None if self._reference is None else lambda nodes: self._reference.values(index, nodes),
                (source, choice),
                twins,
                experts,
                self._options.fewest,
            ):
                key = self._key(sources)
                yield ExpertGroup((sources[0], sources[1]), targets, part.locked(key, self._data, self._keys))

    def _group(self, linears: list[fx.Node], gram: Gram, cross: CrossMoment | None) -> Group:
        targets = tuple(self._targets[node.name] for node in linears)
        source = input_of(targets[0])
        moments = None if cross is None else cross.value()
        statistics = Statistics(self._key([source]), gram.rows, self._data, gram.value(), moments, self._keys)
        return Group(source, targets, statistics)

    def _key(self, sources: Sequence[fx.Node | None]) -> str:
        """The key of what ``sources`` computed, with the weights that the stages before them ran with."""
        used = self._used
        ends = [self._sources[source.name] for source in sources if source is not None]
        return self._start_keys.key(ends, lambda name: used.get(name) or self._start_hash(name), self._data)


class _Runner:
    """Runs the stages of one lowered program over all batches, one stage after the other."""

    def __init__(
        self,
        program: Program,
        targets: tuple[str, ...],
        batches: Sequence[Tensor],
        device: torch.device,
        options: StreamOptions,
        weight: Callable[[str], Tensor],
    ) -> None:
        self.stages = cut(program.graph, frozenset(targets))
        self.done = 0
        self._program = program
        self._batches = len(batches)
        self._device = device
        self._weight = weight
        self._store = ActivationStore(options.activations, device)
        inputs = [node.name for node in program.graph.nodes if node.op == "placeholder"]
        for number, ids in enumerate(batches):
            self._store.put(number, dict.fromkeys(inputs) | {"input_ids": ids})

    def close(self) -> None:
        self._store.close()

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
    def run_next(self) -> None:
        """Run the next stage; keep what later stages read, drop what nobody reads any more."""
        stage = self.stages[self.done]
        weights = self._load(stage)
        for batch in range(self._batches):
            env = self._execute(stage, batch, weights, stage.outputs)
            self._store.put(batch, {node.name: env[node] for node in stage.outputs})
            for node in stage.last_use:
                self._store.drop(batch, node.name)
        self.done += 1

    @torch.no_grad()
    def values(self, index: int, nodes: list[fx.Node]) -> Iterator[dict[fx.Node, Tensor]]:
        """Values of ``nodes`` per batch, with stage ``index`` next: stored ones, or computed inside that stage."""
        stage = self.stages[index]
        inside = [node for node in nodes if node in set(stage.nodes)]
        weights = self._load(stage) if inside else {}
        for batch in range(self._batches):
            env = self._execute(stage, batch, weights, inside) if inside else {}
            yield {node: env[node] if node in env else self._store.get(batch, node.name) for node in nodes}  # type: ignore[misc]

    def _execute(
        self, stage: Stage, batch: int, weights: dict[fx.Node, Tensor], keep: list[fx.Node]
    ) -> dict[fx.Node, object]:
        env: dict[fx.Node, object] = {node: self._store.get(batch, node.name) for node in stage.inputs}
        env.update(weights)
        last = {source: node for node in stage.nodes for source in node.all_input_nodes}
        for node in stage.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = node.target(*args, **kwargs)
            for source in node.all_input_nodes:
                if last[source] is node and source not in keep:
                    env.pop(source, None)
        return env

    def _load(self, stage: Stage) -> dict[fx.Node, Tensor]:
        return {node: self._weight_on_device(str(node.target)) for node in stage.weights}

    def _weight_on_device(self, name: str) -> Tensor:
        tensor = self._weight(name)
        if not tensor.is_floating_point():
            return tensor.to(self._device)
        constant = self._program.weights.canonical(name) in self._program.weights.constants
        return tensor.to(self._device, compute_dtype(self._program.dtype) if constant else self._program.dtype)


def _lower(program: Program, dtype: torch.dtype, ctx: Context) -> Program:
    program.dtype = dtype
    return lowered_copy(program, ctx.device)


def _current(rw: Rewriter, run: Program, name: str) -> Tensor:
    """The rewriter's weight of that name; matrices that lowering itself added come from the lowered program."""
    return rw.weights[name] if name in rw.weights else run.weights[name]


def _check(program: Program, targets: Sequence[fx.Node], tokens: Tensor) -> None:
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise ValueError(
            f"calibration tokens must be int64 (samples, length), got {tokens.dtype} {tuple(tokens.shape)}"
        )
    known = set(program.graph.nodes)
    for node in targets:
        if node not in known or spec(node).product is None:
            raise ValueError(
                f"{node.name} ({path_of(node) or layer_of(node)}) is no linear of the program that streams"
            )
