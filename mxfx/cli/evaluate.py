"""Commands that measure emitted models: ``eval`` and ``compare``; and the options that ``run`` shares with them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from mxfx.driver.measure import Summary

# A pipe has no width of its own: the tables fit in 120 columns.
# Paths and messages may hold brackets and words between colons: nothing is read as markup.
out = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model's repository ships.")]
EVAL = "What to evaluate, between commas: wikitext, local files or folders, chat, tasks of lm-eval."
EvalData = Annotated[str | None, typer.Option(help="Local documents that stand for the hub's wikitext.")]
LimitTokens = Annotated[int | None, typer.Option(min=2, help="Tokens of the first text that is evaluated.")]
DomainTokens = Annotated[int | None, typer.Option(min=2, help="Tokens of each other text; as the first without it.")]
TaskLimit = Annotated[int | None, typer.Option(min=1, help="Documents of each task of lm-eval.")]
NumFewshot = Annotated[int | None, typer.Option(min=0, help="Examples before each question of a task.")]
ChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="Put a task's questions as a user's turn.")]
GenKwargs = Annotated[str | None, typer.Option(help="Of a task's generation: temperature=0.7,max_gen_toks=256.")]
IncludePath = Annotated[Path | None, typer.Option(help="Folder of further task files of lm-eval.")]


def again(
    folders: Annotated[list[Path], typer.Argument(help="Emitted models: OUT, OUT/NAME or OUT/NAME/model.")],
    tasks: Annotated[str, typer.Option("--tasks", "--eval", help=EVAL)] = "wikitext",
    eval_data: EvalData = None,
    limit_tokens: LimitTokens = None,
    domain_tokens: DomainTokens = None,
    task_limit: TaskLimit = None,
    num_fewshot: NumFewshot = None,
    apply_chat_template: ChatTemplate = False,
    gen_kwargs: GenKwargs = None,
    include_path: IncludePath = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    phase: Annotated[
        str, typer.Option(help="prefill: whole windows; decode: one token a step, through the cache.")
    ] = "prefill",
    float_: Annotated[
        str | None,
        typer.Option("--float", help="Float model to compare with, or none; without it, what the run was made of."),
    ] = None,
    write: Annotated[
        bool, typer.Option(help="Write scores and figures into the run: results.json, report.html, the model's card.")
    ] = True,
    device: str = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Evaluate emitted models again, from their files, beside the float model that they were made of."""
    from mxfx.driver.again import evaluate_saved
    from mxfx.driver.options import RunOptions
    from mxfx.evaluation.tasks import TaskOptions

    options = RunOptions(
        eval=tasks,
        eval_data=eval_data,
        limit_tokens=limit_tokens,
        domain_tokens=domain_tokens,
        tasks=TaskOptions(task_limit, num_fewshot, apply_chat_template, gen_kwargs, include_path),
        batch_size=batch_size,
        device=device,
        trust_remote_code=trust_remote_code,
        say=say,
    )
    summary = evaluate_saved(folders, options, phase=phase, float_model=float_, write=write)
    print_summary(summary, [f"read by {phase}" + (", one token a step" if phase == "decode" else ", whole windows")])


def say(line: str) -> None:
    """A line on standard error, not wrapped."""
    err.print(line, soft_wrap=True)


def print_summary(summary: Summary, notes: Sequence[str] = ()) -> None:
    """The tables, with ``notes`` below the first; warnings on standard error."""
    from mxfx.report.table import domain_tables, evaluated_note, results_table

    note = evaluated_note(summary.first, notes)
    out.print(results_table(summary.rows, "Perplexity of the emitted models", note))
    out.print(*domain_tables(summary.domains, summary.tasks))
    for warning in summary.warnings:
        say(f"warning: {warning}")


def compare(
    a: Annotated[Path, typer.Argument(help="A pipeline's folder in a run directory: OUT/NAME.")],
    b: Annotated[Path, typer.Argument(help="Another one, evaluated on the same text.")],
    floor: Annotated[float, typer.Option(min=0.0, help="Relative spread from seed to seed.")] = 0.01,
) -> None:
    """Two evaluated models on the same tokens: differences with their errors, and which are inside the noise."""
    from mxfx.evaluation.compare import compare_runs, unshared
    from mxfx.report.table import differences_table

    out.print(differences_table(compare_runs(a, b, floor=floor), floor, a, b))
    for line in unshared(a, b):
        say(f"not compared: {line}")


COMMANDS = {"eval": again, "compare": compare}
