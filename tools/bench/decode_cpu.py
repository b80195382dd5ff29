"""Decoding on a CPU: a step of D beside the emitted float graph and Hugging Face's model, of SmolLM2-135M's shape.

    python -m tools.bench.decode_cpu [--quick] [--json FILE]

Weights are random. D is W4 A4 KV4 MXINT4 blocks of 32 with online transforms, its head and embedding float. Each figure
is the least of several steps behind 64 tokens: time of the processors, which a loaded machine stretches less than that
of the clock, and the clock's. Threads are torch's (``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mxfx.config.emit import EmitConfig
from mxfx.graph.trace import trace
from mxfx.ops.kernels.library import load_cpu
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope
from mxfx.pipeline.emit import emitted
from mxfx.rewrite import apply
from mxfx.runtime.causal_lm import as_causal_lm
from tools.bench.decode import quantized
from tools.bench.measuring import arguments_of, finish


def smollm2(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "rope_theta": 100000.0},
        **{"max_position_embeddings": 8192, "tie_word_embeddings": True},
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def models(layers: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable, Callable]]:
    """Name, model, and what makes an empty cache of it."""
    model = smollm2(layers, dtype)
    yield "transformers", model, DynamicCache
    program = trace(model)
    for one in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        program = apply(one, program).program
    for name, given in (("emitted float", program), ("D, packed", quantized(program))):
        lm = as_causal_lm(emitted(given, "cpu", EmitConfig(packed=True)))
        yield name, lm, lambda lm=lm: lm.new_cache(256)


@torch.no_grad()
def step_ms(model: Callable, cache: object, steps: int) -> tuple[float, float]:
    """Least milliseconds of a step: of the processors, of the clock."""
    ids = torch.randint(5, 1000, (1, 64), generator=torch.Generator().manual_seed(0))
    model(ids, past_key_values=cache, logits_to_keep=1)
    found = []
    for _ in range(steps):
        began = time.process_time(), time.perf_counter()
        model(ids[:, :1], past_key_values=cache)
        found.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    processor, clock = zip(*found[2:], strict=True)
    return min(processor) * 1e3, min(clock) * 1e3


def main() -> None:
    given = arguments_of(__doc__ or "").parse_args()
    print("C kernels:", load_cpu() or "built")
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, model, cache in models(4 if given.quick else 30, dtype):
            processor, clock = step_ms(model, cache(), 6 if given.quick else 24)
            rows.append({"of": name, "dtype": str(dtype), "processor ms": processor, "clock ms": clock})
            print(rows[-1], flush=True)
    fastest = min(float(str(row["processor ms"])) for row in rows if row["of"] == "transformers")
    for row in rows:
        row["tokens/s over transformers' fastest"] = fastest / float(str(row["processor ms"]))
    finish(rows, given.json)


if __name__ == "__main__":
    main()
