"""What can be known of a pipeline and a model without weights."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mxfx.calibration.datasets import check_source, collected_ids
from mxfx.calibration.estimate import footprint
from mxfx.calibration.sources import SELF, check_openings, split_by_share
from mxfx.config import Pipeline, check_order
from mxfx.config.phases import of_phase
from mxfx.driver.matched import attention_lines, matched_lines, site_lines
from mxfx.driver.pretrained import load_checked, load_meta_model
from mxfx.graph.node import info, kind, layer_of
from mxfx.graph.phases import entries
from mxfx.graph.program import Program
from mxfx.graph.prove import Proof, prove
from mxfx.graph.trace import bind, trace
from mxfx.ground.errors import MxfxError
from mxfx.ops.catalogue import weights_of
from mxfx.passes import (
    Annotate,
    Distill,
    Gptq,
    Lower,
    PackWeights,
    QuantizeKvCache,
    RotationSearch,
    TransformInputs,
)
from mxfx.passes.insert_kv_cache import InsertKvCache, without_cache
from mxfx.passes.multiply_in_fp8 import MultiplyInFp8
from mxfx.pipeline.idle import unmet
from mxfx.pipeline.manager import PassError, PassManager
from mxfx.report.linears import linear_lines, planned_linears
from mxfx.report.memory import memory, multiplying
from mxfx.rewrite import Context, Pass, PassRecord, Rewriter, apply
from mxfx.rewrite.facts import WEIGHTS_ROUNDED
from mxfx.rewrite.lowering import lowered_copy
from mxfx.rewrite.own_masks import UNREAD
from mxfx.rewrite.roles import roles_remembered
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.cache import cache_bytes, cache_specs

_GB = 1e9
_COUNTED = ("linear", "expert_linear", "attention", "rms_norm", "layer_norm", "rope", "embedding")


@dataclass(frozen=True)
class Checked:
    """What ``check`` found out without weights: the annotated meta program, and how long the trace took."""

    pipeline: Pipeline
    program: Program
    annotated: Program
    trace_seconds: float
    proof: Proof | None = None
    records: tuple[PassRecord, ...] = ()
    phases: tuple[str, ...] = ()
    """The phase of each record."""

    def lines(self) -> Iterator[str]:
        """The model, its graph, and what the passes will hold and do."""
        program = self.annotated
        count, layers = len(program.graph.nodes), program.layers
        weights = sum(t.numel() for t in program.weights.values())
        calls = Counter(kind(node) for node in program.graph.nodes)
        yield f"model: {program.source.name} ({program.source.architecture}), {layers} layers, {weights:,} weights"
        yield (
            f"graph: {count} nodes, {count / max(layers, 1):.1f} per layer, traced in {self.trace_seconds:.1f} s; "
            + ", ".join(
                f"{calls[name]} {name}"
                for name in _COUNTED
                if calls[name] or name not in ("expert_linear", "layer_norm")
            )
        )
        if self.proof is not None:
            lengths = " and ".join(map(str, self.proof.lengths))
            yield f"numbers: the program is the model to {self.proof.error:.1e} on rows of {lengths} tokens"
            yield from self.proof.notes
        yield from attention_lines(self.records)
        if "raised" in program.facts and (line := _no_cache(program)):
            yield line
        yield from self._by_phase()
        yield "memory: " + "; ".join(self._held(weights))
        yield f"on the device, once emitted: {memory(program)}"
        yield from self._linears()
        if work := [f"{name} {flop / 1e12:,.1f} TFLOP ({tokens:,} tokens)" for name, tokens, flop in self._work()]:
            yield f"work, in products with weights: {', '.join(work)}"
        planned = any(WEIGHTS_ROUNDED in pass_.provided() for pass_ in self.pipeline.passes)
        bits = {phase: bits_per_weight(one, planned=planned) for phase, one in entries(program).items()}
        told = (f"{phase} {of:.2f}" if phase else f"{of:.2f}" for phase, of in bits.items())
        yield f"bits per weight after rounding: {', '.join(told)}"

    def _by_phase(self) -> Iterator[str]:
        """What rules and passes match; what phases have in common once."""
        found: dict[str, list[str]] = {}
        for phase, program in entries(self.annotated).items():
            records = [record for record, of in zip(self.records, self.phases, strict=True) if of in ("", phase)]
            passes = of_phase(self.pipeline, phase).passes
            with roles_remembered(program.graph):
                found[phase] = [*matched_lines(program, records), *site_lines(program, passes, records)]
            for index, pass_ in enumerate(passes, start=1):
                left = unmet(pass_, program, passes[index:], ran=False)
                found[phase] += [f"warning: {pass_.name}: {line}" for line in left]
        shared = [line for line in next(iter(found.values())) if all(line in lines for lines in found.values())]
        yield from shared
        for phase, lines in found.items():
            yield from (f"{phase}: {line}" for line in lines if line not in shared)

    def cache_line(self, context: int, batch: int) -> str:
        """What the cache of ``batch`` texts of ``context`` tokens takes, beside one in the model's dtype."""
        plain = _raised(self.annotated)
        programs = {"": plain}
        if quantizers := [pass_ for pass_ in self.pipeline.passes if isinstance(pass_, QuantizeKvCache)]:
            programs = entries(self.annotated)
            for pass_ in quantizers:
                programs = {phase: apply(pass_, one).program for phase, one in programs.items()}
        handoff = self.pipeline.phases.handoff
        specs = {
            phase: cache_specs(apply(InsertKvCache(), one, Context(phase=phase, peer=peer, handoff=handoff)).program)
            for phase, one in programs.items()
            for peer in [next((other for name, other in programs.items() if name != phase), None)]
        }
        held = specs.get("decode", next(iter(specs.values())))
        if not held:
            return _no_cache(plain)
        numbers = cache_specs(apply(InsertKvCache(), plain).program)
        sizes = (cache_bytes(of, batch, context, plain.dtype) / _GB for of in (held, numbers))
        size, whole = sizes
        dtype = str(plain.dtype).removeprefix("torch.")
        line = f"cache: {size:.3f} GB for {batch} × {context:,} tokens; in {dtype} {whole:.3f} GB"
        if specs.get("prefill", held) != held:
            line += f"; a prefill takes {cache_bytes(specs['prefill'], batch, context, plain.dtype) / _GB:.3f} GB more"
        return line

    def _work(self) -> Iterator[tuple[str, int, float]]:
        """Of the passes that read most: tokens that they read, one as often as it is read, and their work in FLOP."""
        calibration = self.pipeline.calibration
        for pass_ in self.pipeline.passes:
            if isinstance(pass_, Gptq):
                # Statistics of a layer, then the rewritten layer.
                samples, length, forwards = pass_.samples or calibration.samples, pass_.length or calibration.length, 2
            elif isinstance(pass_, Distill):
                # The float model, the tuned one, and its gradients for twice as much.
                samples, length, forwards = pass_.steps * pass_.batch_size, calibration.length, 4
            else:
                continue
            yield pass_.name, samples * length, float(forwards * samples * multiplying(self.annotated, length))

    def _linears(self) -> Iterator[str]:
        """How linears will run where they are emitted; what phases have in common once."""
        names = {spec.name for spec in self.pipeline.specs}
        lower = next((pass_ for pass_ in self.pipeline.passes if isinstance(pass_, Lower)), None)
        if lower is None or "raised" not in self.annotated.facts:
            return
        fp8 = next((pass_ for pass_ in self.pipeline.passes if isinstance(pass_, MultiplyInFp8)), MultiplyInFp8())
        how = (lower.device or "cpu", fp8.sums)
        found = {
            phase: list(linear_lines(planned_linears(one, *how, packs=PackWeights.name in names)))
            for phase, one in entries(self.annotated).items()
        }
        of: dict[str, list[str]] = {}
        for phase, lines in found.items():
            for line in lines:
                of.setdefault(line, []).append(phase)
        yield from (line if len(phases) == len(found) else f"{phases[0]}: {line}" for line, phases in of.items())

    def _streamed(self) -> str:
        """What gptq's calibration takes, weights waiting on the host; see ``mxfx.calibration.estimate``."""
        calibration, gptq = self.pipeline.calibration, next(p for p in self.pipeline.passes if isinstance(p, Gptq))
        program = _raised(entries(self.annotated).get(gptq.phase or "decode", self.annotated))
        found = footprint(
            lowered_copy(program, torch.device("cuda")),
            [n.name for n in program.products() if "weight" in info(n).formats and "weight" in weights_of(n)],
            (gptq.samples or calibration.samples, gptq.length or calibration.length),
            device=torch.device("cuda"),
            stored={},
            batch_size=gptq.batch_size,
            reference=gptq.asymmetric > 0,
        )
        elsewhere, waiting, here = (n / _GB for n in (found.device("cpu"), found.waiting, found.device("device")))
        return (
            f"gptq holds {elsewhere:.2f} GB on a GPU where {waiting:.2f} GB of activations wait on the host or on "
            f"disk, or {here:.2f} GB with them"
        )

    def _held(self, weights: int) -> Iterator[str]:
        program = self.annotated
        names = {spec.name for spec in self.pipeline.specs}
        model_gb = weights * program.dtype.itemsize / 1e9
        yield f"{model_gb:.2f} GB of weights in {str(program.dtype).removeprefix('torch.')}"
        if "gptq" in names:
            yield self._streamed()
        if any(getattr(p, "guided", False) or getattr(p, "against", "") == "gradients" for p in self.pipeline.passes):
            yield f"gradients of the loss hold all {model_gb:.2f} GB of weights, and a batch's way back, on the device"
        for pass_ in (p for p in self.pipeline.passes if isinstance(p, TransformInputs)):
            rewriters = (Rewriter(_raised(one), pass_.name) for one in entries(program).values())
            if moments := max(map(pass_.moment_bytes, rewriters)):
                yield (
                    f"{pass_.name} sums {moments / _GB:.2f} GB of second moments on the device, or parts of them where "
                    "that is more than weights leave"
                )
        for distill in (p for p in self.pipeline.passes if isinstance(p, Distill)):
            of_all, of_layer = (
                (2 * read * program.dtype.itemsize + distill.bytes_of(tuned)) / _GB
                for read, tuned in ((weights, _planned(program)), _largest_layer(program))
            )
            held = f"{of_all:.2f} GB, or {of_layer:.2f} GB with scope = 'layer',"
            held = f"{of_layer:.2f} GB" if distill.scope == "layer" else held
            yield f"distill holds {held} beside activations and logits"


def _raised(program: Program) -> Program:
    return program if "raised" in program.facts else PassManager().run(program, Pipeline([]).completed()).program


def _no_cache(program: Program) -> str:
    """Why text is written without a cache; empty where it is written with one."""
    reason = without_cache(program)
    if reason is None:
        return ""
    return f"cache of keys and values: {'told once weights are read' if UNREAD in reason else 'none'}; {reason}"


def check(
    pipeline: Pipeline, *, trust_remote_code: bool = False, numbers: bool = False, traced: Program | None = None
) -> Checked:
    """Options and facts, and the rules against the graph traced on the meta device, or ``traced`` already.

    ``numbers`` loads the weights and compares the program with the model, beyond every window that it names.

    Raises ``ConfigError``, which cites the line, ``DatasetError``, ``ModelError``, ``TraceError``, and ``PassError``
    for a rule that fits nothing.
    """
    passes = pipeline.passes
    name = pipeline.model_source()
    check_order(pipeline)
    check_data(pipeline)
    started = time.perf_counter()
    settings = pipeline.model
    of_hub = {"revision": settings.revision, "trust_remote_code": trust_remote_code}
    program = traced or trace(load_meta_model(name, settings.dtype, **of_hub), name=str(name))
    seconds = time.perf_counter() - started
    last = max((i for i, p in enumerate(passes) if isinstance(p, Annotate)), default=-1)
    head = pipeline.replace(specs=pipeline.specs[: last + 1])
    result = PassManager().run(program, head) if last >= 0 else None
    annotated = program if result is None else result.program
    refuse_hopeless(pipeline, annotated, last + 1)
    proof = None
    if numbers:
        loaded = load_checked(name, settings.dtype, **of_hub)
        proof = prove(bind(program, loaded.model), loaded.model, limit=sys.maxsize)
    steps = () if result is None else result.steps
    records, phases = tuple(step.record for step in steps), tuple(step.phase for step in steps)
    return Checked(pipeline, program, annotated, seconds, proof, records, phases)


def check_data(pipeline: Pipeline) -> None:
    """Raise ``DatasetError`` for a data set that no run could read: an unknown name, a file that is not there, and one
    of token ids that holds fewer than are asked for; for openings as long as samples. Texts are not read.
    """
    calibration = pipeline.calibration
    if calibration.dataset is not None:
        counts = split_by_share(calibration.samples, calibration.shares or [1.0] * len(calibration.sources))
        for source, count in zip(calibration.sources, counts, strict=True):
            _check_source(source, count, calibration.length)
            if source == SELF and len(calibration.sources) > 1 and round(calibration.continued * count):
                check_openings(calibration.length)
    for pass_ in pipeline.passes:
        if isinstance(pass_, RotationSearch) and pass_.dataset is not None:
            _check_source(pass_.dataset, *pass_.asked)


def _check_source(source: str, samples: int, length: int) -> None:
    if source.endswith(".pt"):
        collected_ids(Path(source), samples, length)
    elif source != SELF:
        check_source(source)


def refuse_hopeless(pipeline: Pipeline, program: Program, start: int) -> None:
    """Raise ``PassError`` for a pass that is sure to fail on an annotated program, ``start`` on."""
    programs = entries(program).values()
    for index, pass_ in enumerate(pipeline.passes[start:], start):
        errors = [error for one in programs if (error := _hopeless(pass_, one)) is not None]
        # What has nothing to do in one phase may have it in the other.
        if len(errors) == len(programs):
            place = pipeline.location(index, ("name",))
            raise PassError.of(index + 1, pass_, errors[0], str(place) if place.line else None) from errors[0]


def _hopeless(pass_: Pass, program: Program) -> MxfxError | None:
    try:
        pass_.foresee(Rewriter(program, pass_.name))
    except MxfxError as error:
        return error
    return None


def _planned(program: Program, layer: int | None = None) -> int:
    """Weights that are to be rounded, of all layers or one, counted once."""
    products = (node for node in program.products() if "weight" in info(node).formats)
    found = {program.weight_of(node) for node in products if layer is None or layer_of(node) == layer}
    return sum(program.weights[name].numel() for name in found)


def _largest_layer(program: Program) -> tuple[int, int]:
    """Of the decoder layer that has most: its weights, and those of them that are to be rounded."""
    read: dict[int, set[str]] = {}
    for node in program.graph.nodes:
        if (layer := layer_of(node)) is not None:
            names = (str(source.target) for source in node.all_input_nodes if source.op == "get_attr")
            read.setdefault(layer, set()).update(map(program.weights.canonical, names))
    sizes = {layer: sum(program.weights[name].numel() for name in names) for layer, names in read.items()}
    largest = max(sizes, key=sizes.__getitem__, default=-1)
    return sizes.get(largest, 0), _planned(program, largest)
