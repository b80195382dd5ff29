"""Seconds of lm-eval's ``wikitext`` on local documents, for the float model and for emitted programs of pipelines.

    python -m tools.bench.lm_eval_time passes_configs/best_w4a4kv4.toml … --model DIR --data DIR --eval-data DIR
        [--tokens 100000] [--batch 8] [--repeat 5] [--device cuda] [--set k=v] [--json FILE]

Prints machine and versions, then one row a model: seconds of one evaluation (median of ``--repeat``, the models taking
turns), its ratio to the float Hugging Face model's, the fastest and the slowest run, the one before them, which
compiles kernels, and the word perplexity. Weights decide nothing of the time:
``--set calibration.samples=4 --set pass.distill.steps=1`` builds a program quickly.
An entry may have overrides of its own: ``FILE;k=v;k=v``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path

import torch
import transformers
from torch import nn

from mxfx import api
from mxfx.calibration.sources import calibration_tokens
from mxfx.config import Pipeline, apply_overrides
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.evaluation.evaluate import evaluate
from mxfx.evaluation.results import EvalResult
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context
from mxfx.runtime.causal_lm import as_causal_lm
from tools.bench.measuring import machine, table


def main() -> None:
    args = _arguments()
    about = machine() | {"transformers": transformers.__version__}
    print("  ".join(f"{k}={v}" for k, v in about.items()), flush=True)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.dtype).to(args.device).eval()
    program = PassManager().run(api.trace(model, name=args.model), Pipeline([]).completed()).program
    models: dict[str, nn.Module] = {"float, Hugging Face": model}
    for entry in args.configs:
        file, *own = entry.split(";")
        emitted = as_causal_lm(_passed(program, file, own, tokenizer, args), args.device)
        models[Path(file).stem + "".join(f" {o}" for o in own)] = emitted
    rows = _timed(models, tokenizer, args)
    print(f"\nlm-eval wikitext, {args.tokens:,} tokens at most, batches of {args.batch} x {args.length}, {args.dtype}")
    print(table(rows))
    if args.json:
        found = {"machine": about, "tokens": args.tokens, "batch": args.batch, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def _passed(program, file, own, tokenizer, args):
    overrides = [f"model.name={json.dumps(args.model)}", f"calibration.dataset={json.dumps(args.data)}"]
    pipeline = apply_overrides(api.load_pipeline(file), [*overrides, *args.set, *own])
    wanted = pipeline.calibration
    read = {"samples": wanted.samples, "length": wanted.length, "seed": wanted.seed, "repeat": True}
    # Weights decide nothing of the time: documents alone, also where the pipeline wants the model's own texts.
    ids = calibration_tokens([args.data], tokenizer, **read).ids
    ctx = Context(seed=wanted.seed, device=torch.device(args.device), tokens=lambda: ids)
    return PassManager().run(program, pipeline, ctx).program


def _timed(models: dict[str, nn.Module], tokenizer, args: argparse.Namespace) -> list[dict]:
    """A row a model; models take turns, so that a machine that slows down slows all of them."""

    def once(model: nn.Module) -> EvalResult:
        options = {"eval_data": args.eval_data, "batch_size": args.batch, "max_length": args.length}
        return evaluate(model, tokenizer, limit_tokens=args.tokens, **options)

    # A collection that walks the graphs of all programs takes tenths of a second and hits whom it pleases.
    gc.collect()
    gc.freeze()
    found: dict[str, list[EvalResult]] = {name: [] for name in models}
    for turn in range(1 + args.repeat):
        for name, model in models.items():
            found[name].append(once(model))
            print(f"{name}, turn {turn}: {found[name][-1].seconds:.2f} s", flush=True)
    rows = []
    base = None
    for name, (first, *rest) in found.items():
        seconds = [result.seconds for result in rest]
        median = statistics.median(seconds)
        base = base or median
        rows.append(
            {
                "model": name,
                "s": median,
                "x float": median / base,
                "fastest": min(seconds),
                "slowest": max(seconds),
                "first": first.seconds,
                "tokens": first.tokens,
                "word ppl": first.word_perplexity,
            }
        )
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+")
    for name in ("--model", "--data", "--eval-data"):
        parser.add_argument(name, required=True)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
