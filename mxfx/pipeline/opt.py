"""``mxfx opt``: passes over a program, printed IR out, as ``mlir-opt`` does it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mxfx.config.phases import unrolled
from mxfx.config.pipeline import Pipeline, load
from mxfx.config.text import from_text
from mxfx.graph.diff import diff
from mxfx.graph.program import Program
from mxfx.graph.text import SEPARATOR, Printout, parse, parse_fragment, to_text
from mxfx.graph.tiny import FAMILIES, tiny
from mxfx.graph.trace import trace
from mxfx.graph.verify import verify
from mxfx.graph.weights import tensor_hash
from mxfx.ground.errors import MxfxError
from mxfx.ground.files import read_text
from mxfx.ground.nearest import did_you_mean
from mxfx.pipeline.instruments import Numbers, Timing, Verify
from mxfx.pipeline.manager import Instrument, PassManager, Step, StopPoint
from mxfx.pipeline.probe import vocabulary
from mxfx.rewrite import Context, Match, apply


class SourceError(MxfxError, ValueError):
    """What ``mxfx opt`` was given is no printed graph, no model folder and no built-in model."""


class PrintError(MxfxError, ValueError):
    """IR was to be printed at a pass, or a match of it, that the pipeline does not have."""


def opt(
    source: str | Path | Program,
    passes: str | Path | Pipeline = "",
    *,
    print_ir_before: Collection[str] = (),
    print_ir_after: Collection[str] = (),
    print_ir_after_change: bool = False,
    print_ir_per_match: bool = False,
    verify_each: bool = False,
    check_numerics: bool = False,
    timing: bool = False,
    stop_after: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    ctx: Context | None = None,
) -> str:
    """Run ``passes`` over ``source`` and return what is to be printed.

    ``source`` is a program, a built-in tiny model (``llama-tiny``), a model folder, or a file that ``opt`` printed
    before.
    ``passes`` is the one-line form, a pipeline, or the path of a TOML file; the pipeline is what is written, nothing is
    added. ``print_ir_before`` and ``print_ir_after`` name passes (``"all"`` for every one) around which the whole
    graph is printed; ``print_ir_after_change`` prints the regions that each pass edited, ``print_ir_per_match`` those
    that each single match of it edited, for which every pass runs once more for each of its matches. Without any of
    these the result is the final program, which ``opt`` reads again. ``stop_after`` is ``n`` or ``n.m``: pass ``n``,
    match ``m`` of it.
    ``weights`` are the tensors behind a printed graph; ``dtype`` is for models that are built or loaded. ``timing``
    adds comment lines with the seconds of each pass.

    Raises ``SourceError`` for a source that is none of these, ``ValueError`` for a malformed ``stop_after``,
    ``PrintError`` for a name or a stop point that is not in the pipeline, and what the passes and checks raise.
    """
    program = load_source(source, weights=weights, dtype=dtype)
    pipeline = read_passes(passes)
    _check_names(pipeline, [*print_ir_before, *print_ir_after])
    printer = PrintIR(frozenset(print_ir_before), frozenset(print_ir_after), print_ir_after_change, print_ir_per_match)
    clock = Timing()
    checks: list[Instrument] = [Numbers()] if check_numerics else []
    checks += [Verify()] if verify_each else []
    manager = PassManager([printer, *checks, clock])
    stop = StopPoint.parse(stop_after) if stop_after else None
    if stop is not None and stop.number > (count := len(unrolled(pipeline)[0].specs)):
        raise PrintError(f"--stop-after {stop}: the pipeline has {count} passes")
    result = manager.run(program, pipeline, ctx, stop_after=stop)
    if stop is not None and (stop.match or 0) > (count := len(result.records[-1].matches)):
        raise PrintError(f"--stop-after {stop}: pass {stop.number} {result.records[-1].name!r} has {count} matches")
    if not verify_each:
        verify(result.program)
    if not printer.active:
        printer.lines.append(to_text(result.program))
    if timing:
        printer.lines += [f"// {line}\n" for line in clock.table().splitlines()]
    return "".join(printer.lines)


def opt_fragments(text: str, passes: str | Path | Pipeline, seed: int = 0) -> str:
    """Run ``passes`` over each fragment of ``text`` (``// -----`` between two) and return what became of them.

    Of each: a comment for every pass, with what it matched and why it skipped the rest; how much (‖Δ‖/‖w‖) each weight
    changed and a hash of what it is now, to four decimals; then the graph; or a comment with the error that a pass
    ended with. The fragment and the result are verified, but for inputs and result. Passes that calibrate do so on
    random ids where the fragment begins with ``input_ids`` and reads an embedding.

    Raises ``TextError`` for a fragment that is none, ``ConfigError`` for the passes.
    """
    pipeline = read_passes(passes)
    return f"{SEPARATOR}\n".join(_fragment(case, pipeline, seed) for case in _cases(text))


def _cases(text: str) -> list[str]:
    """The parts of a text between separators, each behind as many empty lines as stand before it: places stay."""
    cases, start = [], 0
    lines = text.splitlines()
    for end in [*(i for i, line in enumerate(lines) if line.rstrip() == SEPARATOR), len(lines)]:
        cases.append("\n" * start + "\n".join(lines[start:end]))
        start = end + 1
    return cases


def _fragment(text: str, pipeline: Pipeline, seed: int) -> str:
    program = parse_fragment(text, seed)
    verify(program, fragment=True)
    try:
        result = PassManager().run(program, pipeline, random_ids(program, seed))
    except MxfxError as error:
        return f"// error: {str(error).splitlines()[0]}\n"
    verify(result.program, fragment=True)
    lines = []
    for record in result.records:
        lines.append(f"// {record.name}: {len(record.matches)} matched, {len(record.skips)} skipped")
        lines += [f"//   {skip.path or 'top level'}: {skip.reason}" for skip in record.skips]
    weights = result.program.weights
    for change in weights.ledger:
        how = "added" if change.error is None else f"changed by {change.error:.2g}"
        now = f", now #{_four_decimals(weights[change.weight])}" if change.weight in weights else ""
        lines.append(f"//   @{change.weight} {how}{now}")
    return "\n".join([*lines, to_text(result.program, header=False)])


def random_ids(program: Program, seed: int = 0) -> Context:
    """What passes calibrate a fragment on: 4 × 16 random ids, if its first input is ``input_ids``."""
    first = next((node.target for node in program.graph.nodes), None)
    if first != "input_ids" or not program.nodes("embedding"):
        return Context(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return Context(seed=seed, tokens=lambda: torch.randint(vocabulary(program), (4, 16), generator=generator))


def _four_decimals(tensor: Tensor) -> str:
    """A hash that the last bits of a float, which not every processor rounds alike, do not change."""
    return tensor_hash((tensor.double() * 1e4).round().to(torch.int64) if tensor.is_floating_point() else tensor)[:8]


def _check_names(pipeline: Pipeline, names: Collection[str]) -> None:
    present = [spec.name for spec in pipeline.specs]
    for name in names:
        if name not in (*present, "all"):
            raise PrintError(
                f"no pass {name!r} in this pipeline to print around; it has {', '.join(present) or 'none'}"
            )


@dataclass
class PrintIR(Instrument):
    """Collects printed IR around passes; each piece starts with a line ``// before|after pass 3 'fuse-norm'``."""

    before_passes: frozenset[str] = frozenset()
    after_passes: frozenset[str] = frozenset()
    after_change: bool = False
    per_match: bool = False
    lines: list[str] = field(default_factory=list)

    @property
    def active(self) -> bool:
        return bool(self.before_passes or self.after_passes or self.after_change or self.per_match)

    def before(self, step: Step) -> None:
        if self.before_passes & {step.pass_.name, "all"}:
            self.lines.append(f"// before {step.title}\n{to_text(step.before)}")

    def after(self, step: Step) -> None:
        assert step.after is not None and step.record is not None
        counts = f"{len(step.record.matches)} matched, {len(step.record.skips)} skipped"
        if self.after_passes & {step.pass_.name, "all"}:
            self.lines.append(f"// after {step.title}: {counts}\n{to_text(step.after)}")
        if self.after_change and step.changed:
            self.lines.append(f"// {step.title}: {counts}\n{diff(step.before, step.after)}")
        if self.per_match and step.changed:
            self.lines += matches_apart(step)


def matches_apart(step: Step) -> list[str]:
    """What each match of a pass that has run edited, and first what the pass does without any.

    The pass runs again, up to each of its matches; two such programs that follow each other differ by one match. A pass
    that does all of its work however few matches it is allowed (``lower``: no graph is half lowered) is one edit.
    """
    assert step.after is not None and step.record is not None
    matches = step.record.matches
    before = step.before.copy()
    # They are the whole pass's: no match brings them.
    before.facts = step.after.facts
    last, whole = _up_to(step, 0), Printout.of(step.after)
    outside = diff(Printout.of(before), last)
    if not diff(last, whole):
        how = f"its {len(matches)} matches are one edit" if matches else "an edit that is no match"
        return [f"// {step.title}: {how}\n{outside}"] if outside else []
    pieces = [f"// {step.title}: apart from its {len(matches)} matches\n{outside}"] if outside else []
    for done, match in enumerate(matches, start=1):
        printout = whole if done == len(matches) else _up_to(step, done)
        title = f"// {step.title}: match {done} of {len(matches)}{_place(match)}"
        pieces.append(f"{title}\n{diff(last, printout)}")
        last = printout
    return pieces


def _up_to(step: Step, matches: int) -> Printout:
    return Printout.of(apply(step.pass_, step.before, step.ctx, limit=matches).program)


def _place(match: Match) -> str:
    return f" at {match.path or match.node}" + (f" ({match.note})" if match.note else "")


def load_source(
    source: str | Path | Program, *, weights: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
) -> Program:
    """The program behind what a user typed; see ``opt``. Raises ``SourceError``, or ``TextError`` for a bad graph."""
    if isinstance(source, Program):
        return source
    if str(source) in FAMILIES:
        return trace(tiny(str(source), dtype=dtype), name=str(source))
    path = Path(source)
    if path.is_file():
        return parse(read_text(path), weights)
    if (path / "config.json").is_file():
        return _load_folder(path, dtype)
    raise SourceError(
        f"{str(source)!r} is no printed graph, no model folder and no built-in model "
        f"(built in: {', '.join(FAMILIES)}); {did_you_mean(str(source), FAMILIES)}".removesuffix("; ")
    )


def _load_folder(path: Path, dtype: torch.dtype) -> Program:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return trace(model.eval(), name=path.name)


def read_passes(passes: str | Path | Pipeline) -> Pipeline:
    """A pipeline from its one-line form or its file. Raises ``ConfigError``."""
    if isinstance(passes, Pipeline):
        return passes
    if isinstance(passes, Path) or str(passes).endswith(".toml"):
        return load(passes)
    return from_text(passes) if passes.strip() else Pipeline([])


def command(source: str, passes: str, stop_after: StopPoint, dtype: torch.dtype) -> str:
    """The command line that prints the program at a stop point, of a model in ``dtype``, quoted for a shell."""
    import shlex

    shown = str(dtype).removeprefix("torch.")
    return f"mxfx opt {shlex.quote(source)} --passes {shlex.quote(passes)} --dtype {shown} --stop-after {stop_after}"
