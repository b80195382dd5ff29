"""Commands that measure emitted models: ``eval`` and ``compare``; and the options that ``run`` shares with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# A pipe has no width of its own: the tables fit in 120 columns.
# Paths and messages may hold brackets and words between colons: nothing is read as markup.
out = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)

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
    folder: Annotated[Path, typer.Argument(help="Run directory, or the model folder in it.")],
    tasks: Annotated[str, typer.Option(help=EVAL)] = "wikitext",
    model: Annotated[
        str | None, typer.Option(help="Its float model, hub id or folder: for KL, agreement, ratios, and chat.")
    ] = None,
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
    device: str = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Evaluate an emitted model again, from its files alone, or beside its float model."""
    from mxfx import api
    from mxfx.driver.again import evaluate_saved
    from mxfx.evaluation.results import ratio_with_stderr
    from mxfx.evaluation.tasks import TaskOptions
    from mxfx.report.table import DomainRow, Row, domain_tables, results_table

    options = api.RunOptions(
        model=model,
        eval=tasks,
        eval_data=eval_data,
        limit_tokens=limit_tokens,
        domain_tokens=domain_tokens,
        tasks=TaskOptions(task_limit, num_fewshot, apply_chat_template, gen_kwargs, include_path),
        batch_size=batch_size,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    done = evaluate_saved(folder, options, phase)
    evaluation, floats = done.evaluation, {} if done.floats is None else done.floats.domains
    if (first := evaluation.first) is not None:
        beside = next(iter(floats.values()), None)
        ratio = None if beside is None else ratio_with_stderr(first, beside)
        row = Row(
            str(folder),
            word_perplexity=first.word_perplexity,
            ratio=None if ratio is None else ratio.ratio,
            ratio_stderr=None if ratio is None else ratio.stderr,
            token_perplexity=first.token_perplexity,
            token_ratio=None if beside is None else first.token_perplexity / beside.token_perplexity,
            bits_per_weight=done.bits_per_weight,
            eval_seconds=evaluation.seconds,
        )
        out.print(results_table([row], f"Perplexity of {phase}", f"{first.tokens:,} tokens of {first.source}"))
    domains = [DomainRow.of("float", result, None) for result in floats.values()]
    for name, result in evaluation.domains.items():
        ratio = ratio_with_stderr(result, floats[name], "token_perplexity") if floats else None
        domains.append(DomainRow.of(folder.name, result, ratio))
    tasks_found = [(folder.name, *row) for result in evaluation.tasks.values() for row in result.rows()]
    out.print(*domain_tables(domains, tasks_found))
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def compare(
    a: Annotated[Path, typer.Argument(help="A pipeline's folder in a run directory: OUT/NAME.")],
    b: Annotated[Path, typer.Argument(help="Another one, evaluated on the same text.")],
    floor: Annotated[float, typer.Option(min=0.0, help="Relative spread from seed to seed.")] = 0.01,
) -> None:
    """Two evaluated models on the same tokens: differences with their errors, and which are inside the noise."""
    from mxfx.evaluation.compare import compare_runs
    from mxfx.report.table import differences_table

    out.print(differences_table(compare_runs(a, b, floor=floor), floor))


COMMANDS = {"eval": again, "compare": compare}
