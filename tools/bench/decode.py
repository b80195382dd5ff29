"""Decoding on a GPU: a step of D beside the emitted bf16 graph, generated text beside Hugging Face's, and the cache.

    python -m tools.bench.decode [--quick] [--json FILE] [--rehearse] [--only-steps] [--e4m3] [--late]

The model is random, of Llama-3.2-1B's shape. D is W4 A4 KV4 MXINT4 blocks of 32 with online transforms, weights and
cache packed. A step is the replay of a recorded graph, and `kernels` how many it launches; with `--e4m3` few rows meet
codes as E4M3 and not as integers; text is what `generate` returns, greedy, host included.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from mxfx.config.emit import EmitConfig
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.ops.cache import write_cache
from mxfx.ops.kernels import limits
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope, RoundWeights
from mxfx.passes.annotate import Annotate, Rule
from mxfx.passes.fuse_norm import FuseNorm
from mxfx.passes.insert_fake_quant import InsertFakeQuant
from mxfx.passes.quantize_kv_cache import QuantizeKvCache
from mxfx.pipeline.emit import emitted
from mxfx.rewrite import Selector, apply
from mxfx.runtime.cache import cache_bytes
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm
from tools.bench.measuring import arguments_of, finish, kernel_ms
from tools.bench.prefill import RandomTransforms, llama

FORMAT = parse("mxint4@32/mse")
LONG = 32768


def quantized(program: Program) -> Program:
    """W4 A4 KV4 with online transforms, weights rounded to nearest (their values do not matter here)."""
    rules = (
        Rule(Selector(r"model\.layers\.\d+\..*proj"), weight=FORMAT, input=FORMAT),
        Rule(Selector(r"model\.layers\.\d+\.self_attn"), kv=FORMAT),
    )
    for one in (
        FuseNorm(),
        RandomTransforms(),
        Annotate(rule=rules),
        RoundWeights(),
        InsertFakeQuant(),
        QuantizeKvCache(),
    ):
        program = apply(one, program).program
    return program


def models(program: Program, device: str) -> dict[str, EmittedCausalLM]:
    packed = emitted(quantized(program), device, EmitConfig(packed=True))
    return {"emitted bf16": as_causal_lm(program, device), "D, packed": as_causal_lm(packed, device)}


def filled(lm: EmittedCausalLM, batch: int, context: int) -> tuple[Callable[[], object], Tensor]:
    """A step of decoding behind `context` tokens, to be called any number of times; and its logits."""
    ids = torch.randint(
        5, 1000, (batch, context), device=lm.device, generator=torch.Generator(lm.device).manual_seed(0)
    )
    cache = lm.new_cache(context + 1)
    with torch.no_grad():
        lm(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        logits = lm(ids[:, -1:], past_key_values=cache).logits

    def again() -> None:
        cache.crop(-1)
        with torch.no_grad():
            lm(ids[:, -1:], past_key_values=cache)

    if lm.device.type != "cuda" or cache.storage is None:
        return again, logits
    (step,) = cache.storage.attached.values()
    # The cache lives as long as the step.
    return lambda: (cache, step.recording.replay()), logits  # type: ignore[attr-defined]


def steps(
    emitted: dict[str, EmittedCausalLM], device: str, batches: tuple[int, ...], context: int
) -> Iterator[dict[str, object]]:
    base: dict[int, float] = {}
    for name, lm in emitted.items():
        for batch in batches:
            step, _ = filled(lm, batch, context)
            ms = _kernel_ms(step, device)
            base.setdefault(batch, ms)
            yield {
                "what": f"step, batch {batch}, context {context}",
                "of": name,
                "ms": ms,
                "tokens/s": batch / ms * 1e3,
                "over bf16": ms / base[batch],
                "kernels": _launched(step) if device == "cuda" else "",
            }
        cache = cache_bytes(lm.specs, 1, LONG)
        yield {
            "what": "cache of 32k tokens",
            "of": name,
            "ms": "",
            "tokens/s": f"{cache / 1e6:.1f} MB",
            "over bf16": "",
            "kernels": "",
        }


def texts(
    model: LlamaForCausalLM, emitted: dict[str, EmittedCausalLM], device: str, new: int, compiled: bool
) -> Iterator[dict[str, object]]:
    ids = torch.randint(5, 1000, (1, 128), device=device, generator=torch.Generator(device).manual_seed(0))
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found: list[tuple[str, Callable[[], object]]] = [
        ("transformers, dynamic cache", lambda: model.generate(ids, **given, max_new_tokens=new))
    ]
    if compiled:
        static = {**given, "cache_implementation": "static"}
        found.append(
            ("transformers, static cache, compiled", lambda: model.generate(ids, **static, max_new_tokens=new))
        )
    for name, lm in emitted.items():
        found.append((name, lambda lm=lm: lm.generate(ids, **given, max_new_tokens=new)))  # type: ignore[misc]
    for name, call in found:
        with torch.no_grad():
            call()
            call()
            seconds = sorted(_seconds(call, device) for _ in range(3))[1]
        yield {
            "what": f"generate, batch 1, 128 + {new}",
            "of": name,
            "ms": seconds / new * 1e3,
            "tokens/s": new / seconds,
            "over bf16": "",
            "kernels": "",
        }


def attention(device: str) -> Iterator[dict[str, object]]:
    """One layer's attention in a step behind 32k tokens, over several caches: more than the GPU's own holds."""
    from mxfx.ops.kernels.cache_triton import attend_token

    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(1, 32, 1, 64, device=device, dtype=torch.bfloat16, generator=generator)
    slots = torch.arange(LONG, device=device)
    plain, packed = [], []
    for _ in range(6):
        rows = [
            FORMAT.fake_quantize(torch.randn(1, 8, LONG, 64, device=device, dtype=torch.bfloat16, generator=generator))
            for _ in "kv"
        ]
        plain.append(rows)
        pairs = [
            (
                torch.zeros(1, 8, LONG, 32, dtype=torch.uint8, device=device),
                torch.zeros(1, 8, LONG, 2, dtype=torch.uint8, device=device),
            )
            for _ in "kv"
        ]
        for x, (codes, scales) in zip(rows, pairs, strict=True):
            write_cache(codes, scales, x, slots, FORMAT)
        packed.append((pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]))
    last = slots[-1:]
    grouped = q.view(1, 8, 4, 64)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    ways: dict[str, Callable[[], object]] = {
        "SDPA, group as queries": lambda: [sdpa(grouped, k, v) for k, v in plain],
        "SDPA, enable_gqa": lambda: [sdpa(q, k, v, enable_gqa=True) for k, v in plain],
        "kernel, bf16": lambda: [
            attend_token(q, (k, v, None, None), None, last, 0.125, 64, None, None) for k, v in plain
        ],
        "kernel, mxint4@32": lambda: [attend_token(q, c, None, last, 0.125, 64, FORMAT, FORMAT) for c in packed],
    }
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = f"SDPA, {backend.name.split('_')[0].lower()}, group as queries"
        ways[name] = lambda backend=backend: _with_backend(backend, lambda: [sdpa(grouped, k, v) for k, v in plain])  # type: ignore[misc]
    outs = {name: ways[name]()[0] for name in ("SDPA, enable_gqa", "kernel, bf16", "kernel, mxint4@32")}  # type: ignore[index]
    for name, out in outs.items():
        print(name, "off by", float((out - outs["SDPA, enable_gqa"]).norm() / outs["SDPA, enable_gqa"].norm()))
    found: dict[str, float] = {}
    for name, way in ways.items():
        try:
            found[name] = kernel_ms(way) / len(plain)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
    fastest = min(ms for name, ms in found.items() if name.startswith("SDPA"))
    for name, ms in found.items():
        yield {
            "what": "attention of a step, 32k",
            "of": name,
            "ms": ms,
            "tokens/s": "",
            "over bf16": ms / fastest,
            "kernels": "",
        }


def _launched(step: Callable[[], object]) -> int:
    """Kernels of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kinds = ("Memcpy", "Memset")
    return sum(e.device_type == DeviceType.CUDA and not e.name.startswith(kinds) for e in profile.events() or ())


def _with_backend(backend: SDPBackend, call: Callable[[], object]) -> object:
    with sdpa_kernel(backend):
        return call()


def _kernel_ms(call: Callable[[], object], device: str) -> float:
    if device != "cuda":
        return _seconds(call, device) * 1e3
    times = []
    for _ in range(40):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def _seconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--rehearse", action="store_true", help="everything once, tiny, on the CPU; times say nothing")
    parser.add_argument("--only-steps", action="store_true", help="neither texts nor attention alone")
    parser.add_argument("--e4m3", action="store_true", help="few rows as E4M3, not as integers")
    parser.add_argument("--late", action="store_true", help="no kernel starts before the one before it ends")
    given = parser.parse_args()
    if not given.rehearse:
        from mxfx.ops.kernels import early_triton

        early_triton.EARLY = not given.late
    limits.INTEGER_ROWS = 0 if given.e4m3 else limits.INTEGER_ROWS
    device = "cpu" if given.rehearse else "cuda"
    layers = 2 if given.rehearse else 16
    model = llama(layers, device)
    program = trace(model)
    for one in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        program = apply(one, program).program
    batches, context, new = ((1, 2), 20, 6) if given.rehearse else ((1, 16), 1024, 32 if given.quick else 256)
    parts: list[Callable[[], Iterator[dict[str, object]]]] = [
        lambda: steps(lms, device, batches, context),
        lambda: texts(model, lms, device, new, compiled=not given.rehearse and not given.quick),
    ]
    if given.only_steps:
        parts = parts[:1]
    elif not given.rehearse:
        parts.insert(0, lambda: attention(device))
    started = time.perf_counter()
    lms = models(program, device)
    print(f"(emitted in {time.perf_counter() - started:.0f} s)", flush=True)
    rows: list[dict[str, object]] = []
    for part in parts:
        started = time.perf_counter()
        try:
            for row in part():
                print(row, flush=True)
                rows.append(row)
        except Exception:
            traceback.print_exc()
        gc.collect()
        print(f"({time.perf_counter() - started:.0f} s)", flush=True)
    finish(rows, given.json)


if __name__ == "__main__":
    main()
