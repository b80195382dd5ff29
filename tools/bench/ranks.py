"""Distillation and evaluation by one process or several: run it alone, then under torchrun, and compare.

    python -m tools.bench.ranks --json one.json
    torchrun --nproc-per-node 2 -m tools.bench.ranks --beside one.json [--json two.json]

Prints the machine, then of the pass ``distill`` and of an evaluation with divergence from the float model, on a random
model of SmolLM2-135M's shape: seconds from the second step on, of the first step (which compiles and records) apart,
and the median of later steps in milliseconds, of an evaluation a window of all processes together. The seconds have in
them what is done once (recording, the held-out samples, the meeting at the end), the medians only what grows with the
work; ``--beside`` adds the ratio of both to an earlier run. Every process traces and emits by itself, which no figure
has. ``--rehearse`` does everything once, tiny, on the CPU. GPTQ by several processes is ``tools.bench.gptq``'s, which
``torchrun`` starts in the same way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

from mxfx.api import trace
from mxfx.config import Pipeline
from mxfx.evaluation.scoring import FloatLogits, score
from mxfx.evaluation.windows import Window
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.passes import Annotate, Distill, InsertFakeQuant, Rule
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context, Selector, apply
from mxfx.runtime.causal_lm import as_causal_lm
from tools.bench.measuring import machine, table, write

#: Hidden size, intermediate size, layers, heads, of them for keys and values, vocabulary.
_SMOLLM2 = (576, 1536, 30, 9, 3, 49152)
_TINY = (128, 256, 2, 4, 2, 1024)
_MATCH = r"model\.layers\.\d+\..*_proj"


class _Clock:
    """A progress bar that remembers when its steps began."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: dict[str, list[float]] = {}

    def __call__(self, items: object, description: str, total: int | None = None) -> Iterator:
        times = self.times.setdefault(description, [])
        for item in items:  # type: ignore[attr-defined]
            times.append(self.now())
            yield item
        times.append(self.now())

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    ranks.start()
    args = _arguments()
    device = torch.device("cpu" if args.rehearse else "cuda")
    print("  ".join(f"{k}={v}" for k, v in machine().items()), f" processes={ranks.world()}", flush=True)
    start = _model(_TINY if args.rehearse else _SMOLLM2, device)
    rows = [_distillation(start, device, args), _evaluation(start, device, args)]
    if args.beside:
        before = {row["what"]: row for row in json.loads(args.beside.read_text())["rows"]}
        for row in rows:
            for ratio, figure in (("one / this", "s"), ("steady", "ms a step")):
                row[ratio] = float(before[row["what"]][figure]) / float(str(row[figure]))
    print(table(rows))
    if ranks.is_first():
        write({"processes": ranks.world(), "rows": rows}, args.json)
    ranks.stop()


def _distillation(start: Program, device: torch.device, args: argparse.Namespace) -> dict[str, object]:
    rule = Rule(Selector(_MATCH), weight=parse("mxint4@32"), input=parse("mxint4@32"))
    clock = _Clock(device)
    tokens = torch.randint(3, 1000, (16 * args.batch, args.length), generator=torch.Generator().manual_seed(0))
    ctx = Context(device=device, tokens=lambda: tokens, reference=start, progress=clock)
    program = PassManager().run(start, Pipeline([Annotate((rule,)), InsertFakeQuant()]).completed(), ctx).program
    began = clock.now()
    distill = Distill(steps=args.steps, batch_size=args.batch, checks=1, compile=args.compile)
    applied = apply(distill, program, ctx)
    steps = clock.times["distill"]
    return {
        "what": "distill",
        "s": steps[-1] - steps[1],
        "first step s": steps[1] - began,
        # The first two steps record; the last ends with the held-out samples.
        "ms a step": 1e3 * _median(steps[2:-1]),
        "result": applied.record.details["held_out_kl"]["after"],
    }


def _evaluation(start: Program, device: torch.device, args: argparse.Namespace) -> dict[str, object]:
    rule = Rule(Selector(_MATCH), weight=parse("mxint4@32"), input=parse("mxint4@32"))
    pipeline = Pipeline([Annotate((rule,)), InsertFakeQuant()]).completed()
    model, plain = (
        as_causal_lm(PassManager().run(start, steps.emitted(device.type), Context(device=device)).program, device)
        for steps in (pipeline, Pipeline([]).completed())
    )
    ids = torch.randint(3, 1000, (args.windows, args.length + 1), generator=torch.Generator().manual_seed(1))
    windows = [Window(row[:-1], row[1:], 0) for row in ids]
    clock = _Clock(device)
    for title, part in (("first", windows[: 2 * ranks.world()]), ("all", windows)):
        began = clock.now()
        with patch("mxfx.evaluation.scoring.track", clock):
            scores, _ = score(model, part, batch_size=1, reference=FloatLogits(lambda: plain), title=title)
        seconds = clock.now() - began
    assert scores.kl is not None
    kl = float(scores.kl.double().mean())
    return {
        "what": "evaluate",
        "s": seconds,
        "first step s": 0.0,
        "ms a step": 1e3 * _median(clock.times["all"][2:]) / ranks.world(),
        "result": kl,
    }


def _median(times: list[float]) -> float:
    return statistics.median(after - before for before, after in pairwise(times))


def _model(shape: tuple[int, ...], device: torch.device) -> Program:
    hidden, intermediate, layers, heads, keys, vocabulary = shape
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return trace(model.to(device))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 100), ("batch", 8), ("length", 1024), ("windows", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true", help="distill through torch.compile")
    parser.add_argument("--beside", type=Path, help="what an earlier run wrote")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU; times say nothing")
    args = parser.parse_args()
    if args.rehearse:
        args.steps, args.batch, args.length, args.windows = 6, 4, 16, 10
    return args


if __name__ == "__main__":
    try:
        main()
    except Exception:
        # Other processes than the first print nothing else.
        traceback.print_exc(file=sys.__stderr__)
        sys.exit(1)
