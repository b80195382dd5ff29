"""What function-preserving passes really change on a real model: ‖Δ‖/‖y‖ of the logits, in float64.

    python -m tools.bench.promises --model DIR --data DIR [--tokens 64] [--json FILE]

One row a pass, applied to the float64 twin of the raised program (fused norms where the pass needs them), with the
bound that the pass promises. Exits non-zero if one does not hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from mxfx import api
from mxfx.calibration.datasets import load_tokens
from mxfx.config import Pipeline
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.formats import parse
from mxfx.graph.execute import execute
from mxfx.graph.program import Program
from mxfx.passes import (
    Annotate,
    FuseNorm,
    OnlineRotation,
    PermuteChannels,
    RotateQk,
    RotateResidual,
    RotateValue,
    Rule,
    ScaleChannels,
    TransformInputs,
    TransformKv,
)
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Close, Context, Pass, Selector, apply
from tools.bench.measuring import machine, table, write

_FORMAT = parse("mxint4@32")
_RULES = (
    Rule(Selector(r".*\.layers\.\d+\..*_proj"), weight=_FORMAT, input=_FORMAT),
    Rule(Selector(r".*\.layers\.\d+\.self_attn"), kv=_FORMAT),
)
_PASSES: tuple[Pass, ...] = (
    FuseNorm(),
    RotateResidual(),
    RotateValue(),
    RotateQk(),
    TransformInputs(kind="hadamard"),
    TransformInputs(kind="hadamard", block=0),
    TransformInputs(kind="wush"),
    TransformKv(kind="hadamard"),
    TransformKv(kind="wush"),
    ScaleChannels(),
    PermuteChannels(),
    OnlineRotation(sites=("linear", "kv_cache")),
)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("  ".join(f"{k}={v}" for k, v in machine().items()), flush=True)
    tokenizer = load_tokenizer(args.model)
    ids = load_tokens(args.data, tokenizer, samples=4, length=256, seed=0).ids
    ctx = Context(tokens=lambda: ids)
    raised = PassManager().run(api.trace(load_model(args.model, "bfloat16")), Pipeline([]).completed()).program
    fused = apply(Annotate(_RULES), apply(FuseNorm(), raised).program).program.twin(torch.float64)
    plain = raised.twin(torch.float64)
    probe = ids[:1, : args.tokens]
    rows, broken = [], 0
    for pass_ in _PASSES:
        before = plain if isinstance(pass_, FuseNorm) else fused
        after = apply(pass_, before, ctx)
        assert isinstance(pass_.numerics, Close)
        error = _distance(after.program, before, probe)
        broken += error > pass_.numerics.tol
        changed = len(after.record.matches)
        rows.append({"pass": str(pass_), "rewrites": changed, "error": error, "promised": pass_.numerics.tol})
        print(rows[-1], flush=True)
    print(table(rows))
    write({"rows": rows}, args.json)
    return 1 if broken else 0


def _distance(after: Program, before: Program, ids: torch.Tensor) -> float:
    expected, actual = execute(before, ids), execute(after, ids)
    return float((actual - expected).norm() / expected.norm())


if __name__ == "__main__":
    sys.exit(main())
