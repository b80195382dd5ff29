"""Where a step of distillation spends its time on a GPU.

    python -m tools.bench.distill_step FILE --model DIR [--batch 8] [--length 1024] [--steps 20] [--set k=v]
        [--json FILE]

Runs the pipeline up to ``distill`` on random tokens, then for each way to compute a gradient (as it is; with the float
model's states kept; with compiled layers): seconds until the first step, milliseconds a step, peak memory; then the
kernels that take longest of the last way. Figures of speed alone: the tokens are no text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from mxfx import api
from mxfx.calibration.staged import Staged
from mxfx.calibration.teacher import Teacher
from mxfx.calibration.training import GradientStep, divergence, trainable
from mxfx.config import Pipeline, apply_overrides
from mxfx.driver.pretrained import load_model
from mxfx.graph.node import info
from mxfx.graph.program import Program
from mxfx.passes.distill import Distill, free_weights
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import ALL, Context, Rewriter
from tools.bench.measuring import require_cuda, write

_WAYS = {"as it is": (False, False), "states kept": (True, False), "compiled too": (True, True)}
_SHOWN = 25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    for name, default in (("--batch", 8), ("--length", 1024), ("--steps", 20)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require_cuda()
    device = torch.device("cuda")
    overrides = [f"model.name={json.dumps(args.model)}", *args.set]
    passes = list(apply_overrides(api.load_pipeline(args.config), overrides))
    distill = next(pass_ for pass_ in passes if isinstance(pass_, Distill))
    start = api.trace(load_model(args.model, args.dtype).to(device), name=args.model)
    tokens = torch.randint(1000, (4 * args.batch, args.length), generator=torch.Generator().manual_seed(0))
    ctx = Context(device=device, tokens=lambda: tokens, reference=start)
    before = Pipeline([pass_ for pass_ in passes if pass_ is not distill])
    program = PassManager().run(start, before.completed(), ctx).program
    found = distill._targets(Rewriter(program, "distill"))
    grids = {name: info(nodes[0]).formats["weight"].format for name, nodes in found.items()}
    free = free_weights(program, distill.tune, ALL) - set(grids)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.batch} x {args.length} tokens a step")
    rows = [
        _way(name, trainable(program, grids, device, free=free), start, tokens, kept, compiled, args, ctx)
        for name, (kept, compiled) in _WAYS.items()
    ]
    write({"ways": rows}, args.json)
    return 0


def _way(
    name: str,
    trained: tuple,
    start: Program,
    tokens: Tensor,
    kept: bool,
    compiled: bool,
    args: argparse.Namespace,
    ctx: Context,
) -> dict:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    module, parameters = trained
    run = Staged(module, compiled=compiled)
    teacher = Teacher(Staged(trainable(start, {}, ctx.device)[0]), ctx)
    samples = teacher.samples(tokens, args.batch, often=kept)
    step = GradientStep(lambda *g: divergence(run(g[0]), teacher.logits(*g)), list(parameters.values()), ctx.device)
    given = samples.take(slice(args.batch))
    began = time.perf_counter()
    step(*given)
    torch.cuda.synchronize()
    first, began = time.perf_counter() - began, time.perf_counter()
    for _ in range(args.steps):
        step(*given)
    torch.cuda.synchronize()
    each = (time.perf_counter() - began) / args.steps * 1e3
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"{name:14} first {first:6.1f} s, then {each:7.1f} ms a gradient, peak {peak:.1f} GB", flush=True)
    if compiled:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            step(*given)
            torch.cuda.synchronize()
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=_SHOWN, max_name_column_width=72))
    return {"way": name, "first_s": first, "gradient_ms": each, "peak_gb": peak}


if __name__ == "__main__":
    sys.exit(main())
