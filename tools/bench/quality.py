"""Perplexity of pipelines on a real model: several configurations and seeds in one run, with medians.

    python tools/bench/quality.py passes_configs/tutorial_a_rtn.toml … --model DIR --data DIR --eval-data DIR
        [--seeds 0 1 2] [--tokens 105000] [--device cuda] [--set k=v] [--json FILE]

Prints the machine and the versions, then one row a configuration: token perplexity over 2048-token windows of the
evaluation documents (joined by blank lines, float32 log-softmax), its ratio to the float model in the same run, the
median over seeds, and the seconds that the passes took. Needs neither the hub nor lm-eval.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers

from mxfx import api
from mxfx.calibration.datasets import documents
from mxfx.pipeline import Pipeline, apply_overrides
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.causal_lm import as_causal_lm
from mxfx.runtime.evaluate import token_perplexity, token_windows
from mxfx.runtime.pretrained import load_model, load_tokenizer


def main() -> int:
    args = _arguments()
    _print_machine(args)
    tokenizer = load_tokenizer(args.model)
    windows = _windows(args, tokenizer)
    model = load_model(args.model, args.dtype).to(args.device)
    program = PassManager().run(api.trace(model, name=args.model), Pipeline([]).completed()).program
    reference = _perplexity(program, windows, args)
    print(f"float: token ppl {reference:.4f} on {sum(w.numel() for w in windows):,} tokens", flush=True)
    results = [_configuration(entry, program, tokenizer, windows, reference, args) for entry in args.configs]
    print(f"\n{'config':44} {'median ×':>9} {'all ratios':26} {'bits/w':>6} {'pass s':>7}")
    for r in results:
        ratios = " ".join(f"{x:.4f}" for x in r["ratios"])
        print(f"{r['config']:44} {r['median']:9.4f} {ratios:26} {r['bits_per_weight']:6.2f} {r['seconds']:7.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"float": reference, "results": results}, indent=2) + "\n")
    return 0 if all(r["ratios"] for r in results) else 1


def _configuration(entry: str, program, tokenizer, windows, reference: float, args) -> dict:
    """All seeds of one configuration; an entry is ``FILE`` or ``FILE;k=v;k=v`` with overrides of its own."""
    file, *own = entry.split(";")
    ratios, seconds, bits = [], [], 0.0
    for seed in args.seeds:
        overrides = [*args.set, *own, f"calibration.seed={seed}", f"calibration.dataset={json.dumps(args.data)}"]
        try:
            pipeline = apply_overrides(api.load_pipeline(file), [f"model.name={json.dumps(args.model)}", *overrides])
            done, took = _compile(pipeline, program, tokenizer, args)
            ratios.append(_perplexity(done, windows, args) / reference)
        except Exception:
            # One failing configuration must not cost the figures of the others.
            traceback.print_exc(limit=-6)
            continue
        seconds.append(took)
        bits = bits_per_weight(done)
        print(f"  {Path(file).stem} {own} seed {seed}: × {ratios[-1]:.4f}, {took:.1f} s", flush=True)
        del done
    name = Path(file).stem + "".join(f" {o}" for o in own)
    return {
        "config": name,
        "ratios": ratios,
        "median": statistics.median(ratios) if ratios else float("nan"),
        "seconds": statistics.median(seconds) if seconds else float("nan"),
        "bits_per_weight": bits,
    }


def _compile(pipeline: Pipeline, program, tokenizer, args):
    calibration = pipeline.calibration

    def tokens() -> torch.Tensor:
        return api.load_tokens(
            args.data, tokenizer, samples=calibration.samples, length=calibration.length, seed=calibration.seed
        ).ids

    ctx = Context(seed=calibration.seed, device=torch.device(args.device), tokens=tokens)
    started = time.perf_counter()
    done = PassManager().run(program, pipeline, ctx).program
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return done, time.perf_counter() - started


def _perplexity(program, windows, args) -> float:
    return token_perplexity(as_causal_lm(program, args.device), windows, batch_size=args.batch).perplexity


def _windows(args, tokenizer) -> list[torch.Tensor]:
    windows = token_windows(documents(args.eval_data), tokenizer, length=2048)
    taken, total = [], 0
    for window in windows:
        if total >= args.tokens:
            break
        taken.append(window)
        total += window.numel()
    return taken


def _print_machine(args) -> None:
    name = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}, {versions}, python {platform.python_version()}")
    print(f"model {args.model} in {args.dtype}; calibration {args.data}; evaluation {args.eval_data}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+")
    for name in ("--model", "--data", "--eval-data"):
        parser.add_argument(name, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=105_000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
