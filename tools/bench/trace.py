"""How long it takes, and how much memory, to trace a model of a given size without its weights.

    python -m tools.bench.trace [--model llama-3-8b | llama-3-70b | qwen3-8b] [--json FILE]

The model is made on the meta device. Peak memory is that of the whole process (with torch and transformers
loaded), beside what it took before the trace.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import transformers

from mxfx.graph.node import kind, layer_of
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope
from mxfx.rewrite import apply

#: Published sizes: configuration class and its entries.
SIZES: dict[str, tuple[str, dict[str, object]]] = {
    "llama-3-8b": (
        "LlamaConfig",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        },
    ),
    "llama-3-70b": (
        "LlamaConfig",
        {
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        },
    ),
    "qwen3-8b": (
        "Qwen3Config",
        {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        },
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="llama-3-8b")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    class_name, sizes = SIZES[args.model]
    with torch.device("meta"):
        config = getattr(transformers, class_name)(**sizes)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    before = _peak_mb()
    started = time.perf_counter()
    program = trace(model, name=args.model)
    traced = time.perf_counter()
    raised = program
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        raised = apply(pass_, raised).program
    figures = {
        "model": args.model,
        "parameters": sum(t.numel() for t in program.weights.values()),
        "layers": program.layers,
        "trace_seconds": round(traced - started, 2),
        "raise_seconds": round(time.perf_counter() - traced, 2),
        "peak_mb": round(_peak_mb()),
        "peak_mb_before": round(before),
        "nodes": len(program.graph.nodes),
        "nodes_per_layer": _per_layer(program),
        "raised_nodes_per_layer": _per_layer(raised),
        "raised_kinds_per_layer": dict(Counter(kind(n) for n in raised.graph.nodes if layer_of(n) == 1 and kind(n))),
    }
    print("\n".join(f"{name:22} {value}" for name, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def _per_layer(program: Program) -> int:
    """Computing nodes of the second layer: the first also makes what all layers share."""
    return sum(layer_of(n) == 1 for n in program.graph.nodes if n.op == "call_function")


def _peak_mb() -> float:
    """Largest resident size of this process so far; Linux counts in kB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    main()
