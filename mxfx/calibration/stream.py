"""Run calibration tokens through a program once, layer by layer, while a pass rewrites the layers.

The lowered graph is cut into stages (``mxfx.calibration.stages``). Only one stage's weights are on the device at a
time; between stages the values that cross the cut wait in an ``ActivationStore``. A stage runs when something behind
it is asked for, with the weights that the rewriter's store holds then: so every layer sees its predecessors as
rewritten, and a run that resumes from stored weights replays exactly what it did before. What is cheaper to compute
again than to keep does not wait (``mxfx.calibration.schedule``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, fx

from mxfx.calibration.activations import Placement
from mxfx.calibration.estimate import Footprint, footprint, place
from mxfx.calibration.expert_statistics import ExpertStatistics, choice_of, measure_experts
from mxfx.calibration.keys import Keys, environment, token_key
from mxfx.calibration.runner import DeviceWeights, Runner
from mxfx.calibration.stages import Stage, input_of
from mxfx.calibration.statistics import CrossMoment, Gram, Statistics
from mxfx.graph.node import layer_of, path_of
from mxfx.graph.program import Program
from mxfx.graph.weights import WeightStore
from mxfx.ground import ranks
from mxfx.ops.catalogue import spec
from mxfx.rewrite import Context, Rewriter
from mxfx.rewrite.lowering import lowered_copy


@dataclass(frozen=True)
class StreamOptions:
    """How a stream runs.

    ``batch_size`` samples go through a stage at once. ``dtype`` is the precision of the run; None means float32 on CPU
    and the model's own elsewhere. ``activations`` says where values wait between stages. ``reference`` runs a second
    stream with the weights and without the quantizers that the program had at first, for cross moments. ``importance``
    weights the rows of moments as ``fisher.token_importance`` gives it; where it has none, all rows count alike.
    """

    batch_size: int = 8
    dtype: torch.dtype | None = None
    activations: Placement | None = None
    reference: bool = False
    fewest: int = 0
    importance: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")

    def result_key(self) -> dict[str, object]:
        """The options that decide results; where activations wait does not."""
        return {
            "batch_size": self.batch_size,
            "dtype": str(self.dtype),
            "reference": self.reference,
            "weighted": self.importance is not None,
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

    ``targets`` are its linears in execution order; ``weights`` gives theirs on the device. ``footprint`` is what the
    stream is expected to take, and ``placement`` where its values wait. Iterate ``groups`` to measure and rewrite the
    linears; a pass that sets the layer's weights without measuring just goes on to the next layer.
    """

    index: int | None
    targets: tuple[fx.Node, ...]
    weights: DeviceWeights = field(repr=False)
    footprint: Footprint
    placement: Placement
    _groups: Callable[[], Iterator[Group | ExpertGroup]] = field(repr=False)

    @property
    def about(self) -> dict[str, object]:
        """For a pass's record: where values wait, and what the device is expected to hold at most."""
        return {"activations": self.placement, "expected_bytes": self.footprint.device(self.placement)}

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
        mine = ranks.share(len(tokens))
        self._importance = {name: of_all[mine] for name, of_all in (options.importance or {}).items()}
        self._data = {
            "tokens": token_key(tokens),
            "options": options.result_key() | {"dtype": str(dtype), "view": getattr(view, "__name__", repr(view))},
            "environment": environment(ctx.device),
        }
        batches = tokens[mine].split(options.batch_size)
        run = _lower(view(rw.program.copy()), dtype, ctx)
        self.footprint = footprint(
            run,
            self._targets,
            (len(tokens[mine]), tokens.shape[1]),
            device=ctx.device,
            stored={name: rw.weights.behind(name).dtype for name in rw.weights},
            batch_size=options.batch_size,
            reference=options.reference,
        )
        self.placement = options.activations or place(self.footprint, ctx.device)

        def runner(program: Program, of: Callable[[str], WeightStore]) -> Runner:
            return Runner(
                program,
                tuple(self._targets),
                batches,
                ctx.device,
                self.placement,
                lambda name: of(name)[name],
                lambda name: of(name).behind(name),
            )

        # Matrices that lowering itself added come from the lowered program.
        self._main = runner(run, lambda name: rw.weights if name in rw.weights else run.weights)
        self._reference: Runner | None = None
        if options.reference:
            plain = _lower(without_quantizers(start), dtype, ctx)
            self._reference = runner(plain, lambda name: plain.weights)
        self._used: dict[str, Callable[[], str]] = {}
        self._closed = False

    def close(self) -> None:
        self._closed = True
        for runner in filter(None, (self._main, self._reference)):
            runner.close()
            if runner.unpinned:
                self._rw.warn(f"copies wait for the host: it pins no more memory for them ({runner.unpinned})")

    def layers(self) -> Iterator[LayerRun]:
        stages = [index for index, stage in enumerate(self._main.stages) if stage.measured]
        for layer, indices in groupby(stages, key=lambda index: self._main.stages[index].layer):
            mine = list(indices)
            names = [node.name for i in mine for group in self._main.stages[i].measured.values() for node in group]
            targets = tuple(self._targets[name] for name in names)
            about = (self._main.weights, self.footprint, self.placement)
            yield LayerRun(layer, targets, *about, lambda mine=mine: self._groups(mine))  # type: ignore[misc]

    def _groups(self, stages: list[int]) -> Iterator[Group | ExpertGroup]:
        for index in stages:
            if self._closed:
                raise RuntimeError("the stream is closed: measure a layer while stream_layers stands at it")
            moments = self._run_to(index)
            self._note_weights(self._main.stages[index])
            # Groups of plain linears are measured all at once, then handed out one by one.
            groups = self._measure(index, moments)
            for runner in filter(None, (self._main, self._reference)):
                runner.settle()
            yield from groups
            yield from self._measure_experts(index)

    def _run_to(self, index: int) -> _Moments:
        """Run every stage before ``index`` that has not run yet, with the weights of this moment.

        What the last of them gives and ``index`` measures is summed while it is there.
        """
        if self._reference is not None:
            self._reference.advance(index)
        given: set[fx.Node] = set()
        for stage in self._main.stages[self._main.done : index]:
            self._note_weights(stage)
            given = set(stage.outputs)
        moments = self._moments(index, [source for source in self._plain(index) if source in given])
        self._main.advance(index, moments.sources, moments.add if moments.sources else None)
        return moments

    def _plain(self, index: int) -> dict[fx.Node, list[fx.Node]]:
        """What a stage measures of linears with one matrix: their input, and they."""
        found = self._main.stages[index].measured.items()
        return {source: plain for source, all_ in found if (plain := [n for n in all_ if choice_of(n) is None])}

    def _moments(self, index: int, sources: list[fx.Node]) -> _Moments:
        plain = self._plain(index)
        importance = {s: self._importance[plain[s][0].name] for s in sources if plain[s][0].name in self._importance}
        if self._reference is None or not sources:
            return _Moments(sources, importance)
        twins = self._reference.sources({source: plain[source] for source in sources})
        return _Moments(sources, importance, twins, self._reference.values(index, list(twins.values())))

    def _note_weights(self, stage: Stage) -> None:
        """Remember which weights a stage runs with: what its results are keyed by."""
        names = {str(node.target) for node in stage.weights}
        self._used |= {name: self._rw.weights.hash_later(name) for name in names if name in self._rw.weights}

    def _measure(self, index: int, seen: _Moments) -> list[Group]:
        """Groups of plain linears, from moments that were summed on the way and those that are still to be."""
        measured = self._plain(index)
        rest = self._moments(index, [source for source in measured if source not in seen.sources])
        for values in self._main.values(index, rest.sources) if rest.sources else ():
            rest.add(values)
        grams, crosses = seen.grams | rest.grams, seen.crosses | rest.crosses
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
        moments = None if cross is None else ranks.summed(cross.value())
        rows = sum(ranks.collected(gram.rows))
        statistics = Statistics(self._key([source]), rows, self._data, ranks.summed(gram.value()), moments, self._keys)
        return Group(source, targets, statistics)

    def _key(self, sources: Sequence[fx.Node | None]) -> str:
        """The key of what ``sources`` computed, with the weights that the stages before them ran with."""
        used = self._used
        ends = [self._sources[source.name] for source in sources if source is not None]
        return self._start_keys.key(
            ends, lambda name: used[name]() if name in used else self._start_hash(name), self._data
        )


class _Moments:
    """Second moments of ``sources``, and their cross moments with ``twins`` in a reference run, batch by batch; tokens
    count by the ``importance`` of a source.
    """

    def __init__(
        self,
        sources: list[fx.Node],
        importance: Mapping[fx.Node, Tensor],
        twins: Mapping[fx.Node, fx.Node] | None = None,
        references: Iterator[dict[fx.Node, Tensor]] | None = None,
    ) -> None:
        self.sources = sources
        self.grams: dict[fx.Node, Gram] = {}
        self.crosses: dict[fx.Node, CrossMoment] = {}
        self._importance = importance
        self._rows: dict[fx.Node, int] = {}
        self._twins = twins or {}
        self._references = references

    def add(self, values: dict[fx.Node, Tensor]) -> None:
        other = next(self._references) if self._references is not None else {}
        for source in self.sources:
            x, root = values[source], None
            columns = x.shape[-1]
            if source in self._importance:
                start = self._rows.get(source, 0)
                self._rows[source] = start + x.numel() // columns
                share = self._importance[source].flatten()[start : self._rows[source]]
                root = share.sqrt().to(x.device, x.dtype).view(*x.shape[:-1], 1)
                x = x * root
            self.grams.setdefault(source, Gram(columns, x.device)).add(x)
            if self._references is not None:
                cross = self.crosses.setdefault(source, CrossMoment(columns, x.device))
                y = other[self._twins[source]]
                cross.add(x, y if root is None else y * root)


def _lower(program: Program, dtype: torch.dtype, ctx: Context) -> Program:
    program.dtype = dtype
    return lowered_copy(program, ctx.device)


def _check(program: Program, targets: Sequence[fx.Node], tokens: Tensor) -> None:
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise ValueError(
            f"calibration tokens must be int64 (samples, length), got {tokens.dtype} {tuple(tokens.shape)}"
        )
    if len(tokens) < ranks.world():
        raise ValueError(
            f"{len(tokens)} calibration samples are too few for {ranks.world()} processes: expected one each"
        )
    known = set(program.graph.nodes)
    for node in targets:
        if node not in known or spec(node).product is None:
            raise ValueError(
                f"{node.name} ({path_of(node) or layer_of(node)}) is no linear of the program that streams"
            )
