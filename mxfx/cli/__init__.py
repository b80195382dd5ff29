"""Quantize causal language models to Microscaling formats; `mxfx help` has pages on everything."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mxfx.cli import calibrate, evaluate, generate, models, topics
from mxfx.cli.evaluate import (
    EVAL,
    ChatTemplate,
    DomainTokens,
    EvalData,
    GenKwargs,
    IncludePath,
    LimitTokens,
    NumFewshot,
    TaskLimit,
    Trust,
    err,
    out,
    print_summary,
    say,
)
from mxfx.cli.examples import add_examples
from mxfx.cli.start import prepare_imports
from mxfx.ground import interrupt, ranks
from mxfx.ground.errors import MxfxError, exit_code

if TYPE_CHECKING:
    from mxfx.api import Outcome
    from mxfx.graph.program import Program

app = typer.Typer(name="mxfx", no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
config_app = typer.Typer(no_args_is_help=True, help="Look at pipeline files.")
app.add_typer(config_app, name="config")
for file in (calibrate, evaluate, generate, models, topics):
    for name, command in file.COMMANDS.items():
        app.command(name)(command)

#: Exit code of a fault that is not the user's.
INTERNAL = 3

Files = Annotated[list[Path], typer.Argument(help="Pipeline files, of mxfx or in the tutorial's dialect.")]
Model = Annotated[str | None, typer.Option("--model", help="Hub id or local folder; overrides the file's.")]
Set = Annotated[
    list[str],
    typer.Option("--set", help="Override: calibration.samples=8, pass.gptq.damp=0.05, 'pass[3].block=64'."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"mxfx {version('mxfx')}", highlight=False)
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before a command."""


@app.command()
def run(
    files: Files,
    model: Model = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration data: wikitext2, c4, ptb, a local file, or a folder of .txt files.")
    ] = None,
    eval: Annotated[str | None, typer.Option("--eval", help=EVAL)] = None,
    eval_data: EvalData = None,
    limit_tokens: LimitTokens = None,
    domain_tokens: DomainTokens = None,
    task_limit: TaskLimit = None,
    num_fewshot: NumFewshot = None,
    apply_chat_template: ChatTemplate = False,
    gen_kwargs: GenKwargs = None,
    include_path: IncludePath = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows evaluated at once.")] = 1,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Run directory: results.json, emitted models, dumps, report.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    set_: Set = [],  # noqa: B006  (typer copies it)
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if any pass fell back or warned.")] = False,
    trust_remote_code: Trust = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="What instruments found and why places were skipped, pass by pass.")
    ] = False,
) -> None:
    """The whole job: trace, rewrite, evaluate; one table for all files.

    Over several processes, one a GPU: torchrun --nproc-per-node N -m mxfx run FILE … --device cuda
    """
    from mxfx.compat.prepare import prepare
    from mxfx.driver.options import RunOptions
    from mxfx.evaluation.tasks import TaskOptions

    options = RunOptions(
        model=model,
        data=data,
        eval=eval,
        eval_data=eval_data,
        limit_tokens=limit_tokens,
        domain_tokens=domain_tokens,
        tasks=TaskOptions(task_limit, num_fewshot, apply_chat_template, gen_kwargs, include_path),
        batch_size=batch_size,
        out=out_dir,
        device=device,
        overrides=tuple(set_),
        strict=strict,
        trust_remote_code=trust_remote_code,
        say=say,
    )
    # What is wrong with the command or a file is said before transformers is imported.
    options.check()
    prepare(files, options)
    from mxfx import api

    summary = api.run(files, options)
    for outcome in summary.outcomes:
        if outcome.file and outcome.phase != "decode":
            _print_passes(outcome, verbose)
    print_summary(summary, [o.model_note for o in summary.outcomes if o.model_note])
    if summary.out is not None:
        say(f"written to {summary.out}")
    if strict and summary.warnings:
        raise typer.Exit(1)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Pipeline file.")],
    model: Model = None,
    set_: Set = [],  # noqa: B006
    trust_remote_code: Trust = False,
    context: Annotated[int | None, typer.Option(min=1, help="Say what a cache of so many tokens takes.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts in that cache.")] = 1,
    device: Annotated[str, typer.Option(help="Device that it is checked for: cpu, cuda; it need not be here.")] = "cpu",
    numbers: Annotated[
        bool, typer.Option("--numbers", help="Load the weights and compare the traced program with the model.")
    ] = False,
) -> None:
    """Everything that can be checked without weights: options, facts, rules against the graph, memory and size."""
    from mxfx import api

    ((name, pipeline),) = api.prepare([file], api.RunOptions(model=model, device=device, overrides=tuple(set_)))
    say(f"tracing {pipeline.model_source()}")
    checked = api.check(pipeline, trust_remote_code=trust_remote_code, numbers=numbers)
    out.print(f"{name}: {len(pipeline.specs)} passes, in order: {', '.join(s.name for s in pipeline.specs)}")
    for line in checked.lines():
        out.print(line)
    if context is not None:
        out.print(checked.cache_line(context, batch))
    out.print("ok")


@app.command()
def passes(name: Annotated[str | None, typer.Argument(help="Only this pass.")] = None) -> None:
    """All passes, or one: options, contract, docs."""
    from mxfx.config.pipeline import register_passes
    from mxfx.report.contracts import describe, summary
    from mxfx.rewrite import all_passes, find_pass

    register_passes()
    out.print(describe(find_pass(name)) if name else summary(all_passes()))


@config_app.command("show")
def config_show(
    file: Annotated[Path, typer.Argument(help="Pipeline file.")],
    model: Model = None,
    device: Annotated[str, typer.Option(help="Device whose emit stage is shown: cpu, cuda.")] = "cpu",
    set_: Set = [],  # noqa: B006
) -> None:
    """The pipeline that a file stands for, raise and emit stages included, as canonical TOML."""
    from mxfx.compat.prepare import prepare
    from mxfx.compat.tutorial import only_collects
    from mxfx.driver.options import RunOptions

    if only_collects(file):
        typer.echo(f"# no pipeline, but a collector: mxfx collect SOURCE --model M --config {file}\n{file.read_text()}")
        return
    ((_, pipeline),) = prepare([file], RunOptions(model=model, device=device, overrides=tuple(set_)))
    from mxfx.config import to_toml

    sys.stdout.write(to_toml(pipeline))


@config_app.command("schema")
def config_schema() -> None:
    """The JSON Schema of pipeline files, for editors."""
    from mxfx.config import schema

    sys.stdout.write(json.dumps(schema(), indent=2) + "\n")


@app.command("opt")
def opt_(
    source: Annotated[
        str, typer.Argument(help="Graph's file, model folder, hub id, llama-tiny …, or '-': graph, or parts of graphs.")
    ],
    passes: Annotated[
        str,
        typer.Option("--passes", help="'a,b{x=1}' or a pipeline file. Only what is written runs, nothing is added."),
    ] = "",
    print_ir_before: Annotated[list[str], typer.Option(help="Print the graph before a pass; 'all'.")] = [],  # noqa: B006
    print_ir_after: Annotated[list[str], typer.Option(help="Print the graph after a pass; 'all'.")] = [],  # noqa: B006
    print_ir_after_change: Annotated[
        bool, typer.Option("--print-ir-after-change", help="Print the regions that each pass edited.")
    ] = False,
    print_ir_per_match: Annotated[
        bool,
        typer.Option(
            "--print-ir-per-match",
            help="Print the regions that each single match edited, - before, + after. A pass runs once more for each.",
        ),
    ] = False,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Verify the graph after every pass.")] = False,
    check_numerics: Annotated[
        bool, typer.Option("--check-numerics", help="Hold every pass to its promise about numbers.")
    ] = False,
    timing: Annotated[bool, typer.Option("--timing", help="Add the seconds of each pass, as comments.")] = False,
    stop_after: Annotated[
        str | None, typer.Option(metavar="n[.m]", help="Stop after pass n, or after match m of it; both count from 1.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision that a model is loaded in.")] = "float32",
) -> None:
    """Passes over a graph or a model, printed IR out; what it prints it reads again."""
    from mxfx import api
    from mxfx.driver.options import check_dtype
    from mxfx.graph.text import parse
    from mxfx.pipeline.manager import StopPoint
    from mxfx.pipeline.opt import opt_fragments

    check_dtype(dtype)
    given: str | Program = source
    if source == "-" and (text := sys.stdin.read()).startswith("mxfx-ir "):
        given = parse(text)
    elif source == "-":
        prints = print_ir_before or print_ir_after or print_ir_after_change or print_ir_per_match
        if prints or check_numerics or timing or stop_after:
            raise typer.BadParameter("parts of graphs take --passes alone: they are verified and printed as they end")
        sys.stdout.write(opt_fragments(text, passes))
        return
    _or_config_error("--stop-after", lambda: stop_after and StopPoint.parse(stop_after))
    printed = api.optimize(
        given,
        passes,
        dtype=dtype,
        print_ir_before=print_ir_before,
        print_ir_after=print_ir_after,
        print_ir_after_change=print_ir_after_change,
        print_ir_per_match=print_ir_per_match,
        verify_each=verify_each,
        check_numerics=check_numerics,
        timing=timing,
        stop_after=stop_after,
    )
    sys.stdout.write(printed)


@app.command("bisect")
def bisect_(
    target: Annotated[Path, typer.Argument(help="Run directory (of one pipeline), or a pipeline file.")],
    model: Model = None,
    data: Annotated[str | None, typer.Option(help="Calibration data, and the text that KL is measured on.")] = None,
    max_kl: Annotated[float, typer.Option(min=0.0, help="Threshold in nats a token.")] = 0.05,
    device: str = "cpu",
    set_: Set = [],  # noqa: B006
    trust_remote_code: Trust = False,
) -> None:
    """Which pass, and which match inside it (n.m), takes KL from the float model over a threshold."""
    from mxfx import api

    options = api.RunOptions(
        model=model, data=data, device=device, overrides=tuple(set_), trust_remote_code=trust_remote_code
    )
    sys.stdout.write(f"{api.find_culprit(target, options, max_kl)}\n")


@app.command()
def repro(
    folder: Annotated[Path, typer.Argument(help="Folder that a failed pass left: OUT/NAME/repro.")],
    shrink: Annotated[bool, typer.Option("--shrink", help="Cut it to one layer if it still fails there.")] = False,
) -> None:
    """Run a failed pass again; exit code 0 if it fails as it was recorded, 1 if not."""
    from mxfx.pipeline.reproduce import reproduce

    found = reproduce(folder, shrink)
    sys.stdout.write(f"{found}\n")
    if not found.same:
        raise typer.Exit(1)


@app.command()
def weights(
    folder: Annotated[Path, typer.Argument(help="Run directory (of one pipeline).")],
    changed: Annotated[str | None, typer.Option(help="Name of a weight; tied names find each other.")] = None,
) -> None:
    """Which passes changed a weight, with hashes and relative change; without --changed, one line a weight."""
    from mxfx.driver.run_directory import find_pipeline
    from mxfx.report.weight_history import History

    history = History.read(find_pipeline(folder).path)
    if changed is None:
        for name, changes in history.by_weight().items():
            sys.stdout.write(f"{name}: {', '.join(change.pass_name for change in changes)}\n")
        return
    found = history.changed(changed)
    sys.stdout.write("".join(f"{change}\n" for change in found) or f"no pass changed {changed}\n")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write report.html of a run again, from its files."""
    from mxfx import api

    out.print(str(api.write_report(folder)), highlight=False, soft_wrap=True)


add_examples(app)
add_examples(config_app, "config")


def _or_config_error(option: str, check: Callable[[], object]) -> None:
    from mxfx.config import ConfigError, Place

    try:
        check()
    except ValueError as error:
        raise ConfigError(Place(option), str(error)) from error


def main() -> None:
    """Entry point: an error is one message, never a traceback.

    Exit code 2: what the user gave is wrong. Exit code 1: a check stopped the run (numerics, verifier, budget,
    --strict). Exit code 3: a fault of mxfx itself; the environment variable ``MXFX_TRACEBACK`` shows its traceback.
    Exit codes 130 and 143: ctrl-C, SIGTERM.
    """
    with interrupt.listening():
        _main()


def _main() -> None:
    prepare_imports()
    try:
        ranks.start()
        # `python -m mxfx` too: what completion prints calls the command by this name.
        app(standalone_mode=True, prog_name="mxfx")
    except SystemExit:
        ranks.stop()
        raise
    except (MxfxError, OSError) as error:
        _say("error:", str(error), error)
        raise SystemExit(exit_code(error)) from None
    except Exception as error:
        if os.environ.get("MXFX_TRACEBACK"):
            raise
        error.add_note("this is a fault of mxfx or of a library below it; MXFX_TRACEBACK=1 shows where")
        _say("internal error:", f"{type(error).__name__}: {error}", error)
        raise SystemExit(INTERNAL) from None


def _say(head: str, message: str, error: Exception) -> None:
    if interrupt.came() or not ranks.speaks():
        return
    err.print(Text.assemble((head, "bold red"), " ", message), soft_wrap=True)
    for note in getattr(error, "__notes__", ()):
        err.print(note, soft_wrap=True)


def _print_passes(outcome: Outcome, verbose: bool) -> None:
    from mxfx.report.passes import account_lines, pass_table

    out.print(pass_table(outcome.result, outcome.name))
    if verbose:
        for line in account_lines(outcome.result):
            out.print(line, highlight=False, soft_wrap=True)
