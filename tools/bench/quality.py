"""Perplexity of pipelines on a real model: several configurations and seeds in one run, with medians.

    python -m tools.bench.quality passes_configs/tutorial_a_rtn.toml … --model DIR --data DIR --eval-data DIR
        [--seeds 0 1 2] [--jobs 3] [--tokens 105000] [--device cuda] [--set k=v] [--hooks] [--json FILE]

Prints the machine and the versions, then one row a configuration: token perplexity over 2048-token windows of the
evaluation documents (joined by blank lines, float32 log-softmax), its ratio to the float model in the same run, the
median over seeds, and the seconds that the passes took. With ``--jobs`` that many seeds run at a time, a process each;
seconds are then those of a shared device. With ``--hooks`` each pipeline that searched rotations gets a second row: an
independent reference of the tutorial's scheme, module hooks on the Hugging Face model with the same winners, its
weights rounded by Mase's formula. Needs neither the hub nor lm-eval.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from mxfx import api
from mxfx.calibration.datasets import documents
from mxfx.config import Pipeline, apply_overrides
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.evaluation.evaluate import token_perplexity
from mxfx.evaluation.windows import token_windows
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.causal_lm import as_causal_lm
from tests.reference.mase_hooks import quantize_activations
from tools.bench.mase_gptq import mase_gptq


@dataclass(frozen=True)
class Result:
    """What one configuration came to with one seed; ``ratio`` is to the float model's perplexity."""

    config: str
    seed: int
    ratio: float
    seconds: float
    bits_per_weight: float


def main() -> int:
    args = _arguments()
    _print_machine(args)
    found = _in_processes(args) if args.jobs > 1 else Bench(args).run()
    rows = _medians(found["results"])
    print(f"\n{'config':60} {'median ×':>9} {'all ratios':26} {'bits/w':>6} {'pass s':>7}")
    for row in rows:
        ratios = " ".join(f"{x:.4f}" for x in row["ratios"])
        print(
            f"{row['config']:60} {row['median']:9.4f} {ratios:26} {row['bits_per_weight']:6.2f} {row['seconds']:7.1f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(found | {"medians": rows}, indent=2) + "\n")
    return 0 if all(len(row["ratios"]) == len(args.seeds) for row in rows) else 1


def _medians(results: list[dict]) -> list[dict]:
    rows = []
    for config in dict.fromkeys(r["config"] for r in results):
        mine = [r for r in results if r["config"] == config]
        medians = {name: statistics.median(r[name] for r in mine) for name in ("seconds", "bits_per_weight")}
        ratios = [r["ratio"] for r in mine]
        rows.append({"config": config, "ratios": ratios, "median": statistics.median(ratios), **medians})
    return rows


def _in_processes(args: argparse.Namespace) -> dict:
    """Each seed in a process of its own, ``--jobs`` at a time; what they found, together."""

    def one(seed: int) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            own = [*sys.argv[1:], "--jobs", "1", "--seeds", str(seed), "--json", str(file)]
            subprocess.run([sys.executable, "-m", "tools.bench.quality", *own], check=False)
            return json.loads(file.read_text()) if file.exists() else {"float": math.nan, "results": []}

    with ThreadPoolExecutor(args.jobs) as pool:
        parts = list(pool.map(one, args.seeds))
    return {"float": parts[0]["float"], "results": [r for part in parts for r in part["results"]]}


class Bench:
    """The float program, the evaluation windows, and every configuration with every seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._tokenizer = load_tokenizer(args.model)
        self._windows = _windows(args, self._tokenizer)
        self._model = load_model(args.model, args.dtype).to(args.device)
        traced = api.trace(self._model, name=args.model)
        self._program = PassManager().run(traced, Pipeline([]).completed()).program
        self._reference = self._perplexity(as_causal_lm(self._program, args.device))
        print(f"float: token ppl {self._reference:.4f} on {sum(w.numel() for w in self._windows):,} tokens", flush=True)

    def run(self) -> dict:
        results = []
        for entry in self._args.configs:
            for seed in self._args.seeds:
                try:
                    results += self._configuration(entry, seed)
                except Exception:
                    # One failing configuration must not cost the figures of the others.
                    traceback.print_exc(limit=-6)
        return {"float": self._reference, "results": [vars(result) for result in results]}

    def _configuration(self, entry: str, seed: int) -> list[Result]:
        """An entry is ``FILE`` or ``FILE;k=v;k=v`` with overrides of its own."""
        file, *own = entry.split(";")
        args = self._args
        name = Path(file).stem + "".join(f" {o}" for o in own)
        overrides = [*args.set, *own, f"calibration.seed={seed}", f"calibration.dataset={json.dumps(args.data)}"]
        pipeline = apply_overrides(api.load_pipeline(file), [f"model.name={json.dumps(args.model)}", *overrides])
        wanted = pipeline.calibration
        ids = api.load_tokens(
            args.data, self._tokenizer, samples=wanted.samples, length=wanted.length, seed=wanted.seed
        ).ids
        ctx = Context(seed=wanted.seed, device=torch.device(args.device), tokens=lambda: ids)
        started = time.perf_counter()
        done = PassManager().run(self._program, pipeline, ctx)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        ratio = self._ratio(as_causal_lm(done.program, args.device))
        results = [Result(name, seed, ratio, seconds, bits_per_weight(done.program))]
        print(f"  {name} seed {seed}: × {ratio:.4f}, {seconds:.1f} s", flush=True)
        searched = [step.record.details for step in done.steps if "winners" in step.record.details]
        if args.hooks and searched:
            results.append(self._hooks(name, seed, ids, searched[0]["winners"]))
        return results

    def _hooks(self, name: str, seed: int, ids: torch.Tensor, winners: list[str]) -> Result:
        model = copy.deepcopy(self._model)
        wide = copy.deepcopy(model).float()
        mase_gptq(wide, ids)
        # Rounded weights are exact in the model's dtype; the rest is equal.
        model.load_state_dict({key: value.to(model.dtype) for key, value in wide.state_dict().items()})
        ratio = self._ratio(quantize_activations(model, winners))
        print(f"  {name} by hooks, rotated {', '.join(winners)}, seed {seed}: × {ratio:.4f}", flush=True)
        return Result(f"{name} by hooks", seed, ratio, math.nan, math.nan)

    def _ratio(self, model: torch.nn.Module) -> float:
        return self._perplexity(model) / self._reference

    def _perplexity(self, model: torch.nn.Module) -> float:
        return token_perplexity(model, self._windows, batch_size=self._args.batch).perplexity


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
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--hooks", action="store_true")
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
