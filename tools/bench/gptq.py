"""Time and memory of GPTQ, beside the matrix-multiply floor, Mase's formula and llm-compressor on the same samples.

    python -m tools.bench.gptq --model DIR --data DIR [--samples 32] [--length 512] [--device cuda]
    python -m tools.bench.gptq --shape llama-3.2-1b --samples 128 --length 2048 --device cuda [--layers 4]
    torchrun --nproc-per-node 2 -m tools.bench.gptq --shape llama-3-8b …
    python -m tools.bench.gptq --shape llama-3-8b --layers 4 --places device/device cpu/device cpu/cpu …

Prints machine and versions, then one row a method: seconds end to end (median of ``--repeat``, and the first run,
which compiles kernels and pins host memory), of a layer behind the first in the first run ("later s": nothing of that
is in it), ratio to the floor, and the peak of allocated device memory, the model included where it lies there.
"model s" is a first run of all layers of the shape: what was measured, and the layers left out at "later s" each.
The floor is the time that the forward pass and one Hessian per distinct input would take at the rate of a large matrix
product on the same device, nothing else counted. ``--places`` says where mxfx finds the weights and where its
activations wait; each row then also gives the ratio to the first, what ``mxfx check`` expects of memory, and the first
digits of a hash of all rounded weights ("bits"), which no place changes. With
``--shape`` weights and tokens are random, so only times mean anything; ``--layers`` takes that many of its layers,
which are all alike. What the roundings are worth is
``tools/bench/gptq_quality.py``'s to say.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import gc
import json
import os
import pstats
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mxfx.api import trace
from mxfx.calibration.datasets import load_tokens
from mxfx.calibration.keys import digest
from mxfx.config import Pipeline
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.weights import WeightStore
from mxfx.ground import ranks
from mxfx.passes import Annotate, Rule
from mxfx.passes.gptq import Gptq
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context, Selector, apply
from mxfx.rewrite.apply import Applied
from tools.bench.mase_gptq import mase_gptq
from tools.bench.measuring import machine, table
from tools.bench.peer_llmcompressor import llmcompressor_gptq, missing

_LINEARS = Selector(r"model\.layers\.\d+\..*_proj")
#: Hidden size, intermediate size, layers, heads, vocabulary; "tiny" is for trying the benchmark itself.
_SHAPES = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 128256),
    "llama-3-8b": (4096, 14336, 32, 32, 128256),
    "llama-3-70b": (8192, 28672, 80, 64, 128256),
    "tiny": (128, 256, 2, 8, 1024),
}
#: When the layers of the last run of mxfx began, and when the last one ended.
_BEGAN: list[float] = []


def main() -> None:
    ranks.start()
    args = _arguments()
    about = machine() | {"processes": str(ranks.world())}
    about |= {"transformers": transformers.__version__}
    print("  ".join(f"{k}={v}" for k, v in about.items()), flush=True)
    model = _random(args) if args.shape else load_model(args.model, args.dtype)
    ids = _tokens(args)
    program = _annotated(model, args.format)
    floor = _floor_seconds(program, ids.numel(), args.device)
    print(f"{ids.shape[0]} x {ids.shape[1]} tokens, {program.layers} layers, floor {floor:.3f} s", flush=True)
    rows: list[dict[str, object]] = []
    for name, prepare in _methods(model, program, ids, args).items():
        try:
            rows.append({"method": name, **_measured(prepare, floor, program.layers, args)})
        except Exception as error:
            # One failing method must not cost the figures of the others.
            traceback.print_exc(file=sys.__stderr__)
            if ranks.world() > 1:  # the others would wait for this process
                raise
            rows.append({"method": f"{name}: {type(error).__name__}", "s": float("nan")})
        print(rows[-1], flush=True)
    whole = [row for row in rows if len(row) == max(map(len, rows))]
    print(table([{**row, "ratio": float(str(row["s"])) / float(str(whole[0]["s"]))} for row in whole]))
    if args.json and ranks.is_first():
        found = {"machine": about, "tokens": list(ids.shape), "layers": program.layers, "floor": floor, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.profile:
        prepare = next(iter(_methods(model, program, ids, args).values()))
        _profile(prepare(), prepare(), args)
    ranks.stop()


def _methods(
    model: nn.Module, program: Program, ids: Tensor, args: argparse.Namespace
) -> dict[str, Callable[[], Callable[[], object]]]:
    """Name → what prepares a run, untimed, and returns the run."""
    ctx = Context(device=torch.device(args.device), tokens=lambda: ids, progress=_layers)

    def mxfx(place: str, **own: Any) -> Callable[[], object]:
        weights, activations = place.split("/")
        mine = _with_weights_on(program, args.device if weights == "device" else weights)
        pass_ = Gptq(**{"batch_size": args.batch_size, "activations": activations, **own})
        return lambda: apply(pass_, mine, ctx)

    def peer(work: Callable[..., object]) -> Callable[[], object]:
        own = copy.deepcopy(model).to(args.device)
        return lambda: work(own, ids, batch_size=args.batch_size)

    found: dict[str, Callable[[], Callable[[], object]]] = {}
    for place in args.places:
        for text in args.options or [""]:
            own = {key: json.loads(value) for key, value in (pair.split("=") for pair in text.split(",") if pair)}
            found[f"mxfx {place} {text}".strip()] = partial(mxfx, place, **own)
    if "mase" in args.peers:
        found["Mase's formula"] = partial(peer, mase_gptq)
    if "llm-compressor" in args.peers:
        reason = missing()
        if reason is None:
            found["llm-compressor"] = partial(peer, llmcompressor_gptq)
        else:
            print(f"llm-compressor: {reason}", flush=True)
    return found


def _annotated(model: nn.Module, fmt: str) -> Program:
    rule = Rule(_LINEARS, weight=parse(fmt), expect="7 * layers")
    return PassManager().run(trace(model), Pipeline([Annotate((rule,))]).completed()).program


def _with_weights_on(program: Program, device: str) -> Program:
    """The program with its weights there; those of a CPU as a model's that was loaded, not pinned."""
    store = program.weights
    moved = {name: tensor.to(device) for name, tensor in store.items()}
    found = program.copy()
    found.weights = WeightStore(moved, store.aliases, store.working, store.constants)
    return found


def _floor_seconds(program: Program, tokens: int, device: str) -> float:
    """Forward pass of the linears and one Hessian per distinct input, at the rate of a large product."""
    linears = [n for n in program.nodes("linear") if "weight" in n.meta["mxfx"].formats]
    flops = sum(2 * tokens * program.weights[program.weight_of(n)].numel() for n in linears)
    # A Hessian is symmetric: half of its products suffice.
    flops += sum(tokens * source.meta["val"].shape[-1] ** 2 for source in {n.args[0] for n in linears})  # type: ignore[union-attr]
    size = 8192 if device != "cpu" else 1024
    dtype = torch.float32 if device == "cpu" else program.dtype
    x = torch.randn(size, size, device=device).to(dtype)
    seconds = min(_seconds(lambda: x @ x, device) for _ in range(5))
    return flops / (2 * size**3 / seconds)


def _seconds(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _layers(items: Iterable, description: str, total: int | None = None) -> Iterator:
    """A progress bar that remembers when each layer began; the host waits for the device in every layer by itself."""
    _BEGAN.clear()
    for item in items:
        _BEGAN.append(time.perf_counter())
        yield item
    _BEGAN.append(time.perf_counter())


def _measured(
    prepare: Callable[[], Callable[[], object]], floor: float, layers: int, args: argparse.Namespace
) -> dict[str, object]:
    times, peak, expected, waited, bits = [], float("nan"), float("nan"), "", ""
    later = float("nan")
    on_cuda = args.device != "cpu"
    for _ in range(args.repeat):
        work = prepare()
        _BEGAN.clear()
        if on_cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated() if on_cuda else 0
        results: list[object] = []
        times.append(_seconds(lambda work=work, results=results: results.append(work()), args.device))
        if on_cuda:
            peak = torch.cuda.max_memory_allocated() / 1e9
        if len(times) == 1 and len(_BEGAN) > 2:
            later = (_BEGAN[-1] - _BEGAN[1]) / (len(_BEGAN) - 2)
        for applied in results:
            if isinstance(applied, Applied):
                details = applied.record.details
                # What the weights take that lie on the device: as they came, and as rounded in float32.
                rounded = sum(t.nbytes for t in applied.program.weights.values() if t.is_cuda and t.itemsize == 4)
                expected = (details["expected_bytes"] + start + rounded) / 1e9
                waited = str(details["activations"])
                bits = _bits(applied.program)
        results.clear()
    median = statistics.median(times)
    return {
        "s": median,
        "first s": times[0],
        "least s": min(times),
        "s a layer": median / layers,
        "later s": later,
        "model s": times[0] + (_all_layers(args, layers) - layers) * later,
        "x floor": median / floor,
        "peak GB": peak,
        "expected GB": expected,
        "host GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "activations": waited,
        "bits": bits,
    }


def _bits(program: Program) -> str:
    rounded = {change.weight for change in program.weights.ledger}
    return digest([program.weights.hash(name) for name in sorted(rounded)])[:8]


def _all_layers(args: argparse.Namespace, layers: int) -> int:
    return _SHAPES[args.shape][2] if args.shape else layers


def _profile(work: Callable[[], object], again: Callable[[], object], args: argparse.Namespace) -> None:
    """Where the host spends one more run of mxfx, by cumulative and by own time; on CUDA the kernels of another, and
    what the host spends in calls of CUDA.
    """
    profile = cProfile.Profile()
    profile.enable()
    _seconds(work, args.device)
    profile.disable()
    with (args.profile if ranks.is_first() else Path(os.devnull)).open("w") as file:
        found = pstats.Stats(profile, stream=file)
        found.sort_stats("cumulative").print_stats(60)
        found.sort_stats("tottime").print_stats(40)
        if args.device != "cpu":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as kernels:
                _seconds(again, args.device)
            found_there = sorted(kernels.key_averages(), key=lambda one: -one.self_device_time_total)
            print("   Ordered by: device time\n\n       ms    calls", file=file)
            for one in found_there[:40]:
                print(f"{one.self_device_time_total / 1e3:9.1f} {one.count:8} {one.key[:100]}", file=file)
            # Waits, copies and allocations, of pinned memory too (cudaHostAlloc), in every thread.
            calls = [one for one in kernels.key_averages() if one.key.startswith("cuda")]
            print("\n   Ordered by: host time in calls of CUDA\n\n       ms    calls", file=file)
            for one in sorted(calls, key=lambda one: -one.self_cpu_time_total)[:15]:
                print(f"{one.self_cpu_time_total / 1e3:9.1f} {one.count:8} {one.key[:100]}", file=file)


def _tokens(args: argparse.Namespace) -> Tensor:
    if args.shape:
        generator = torch.Generator().manual_seed(args.seed)
        return torch.randint(3, _SHAPES[args.shape][-1], (args.samples, args.length), generator=generator)
    tokenizer = load_tokenizer(args.model)
    return load_tokens(args.data, tokenizer, samples=args.samples, length=args.length, seed=args.seed).ids


def _random(args: argparse.Namespace) -> nn.Module:
    hidden, intermediate, layers, heads, vocabulary = _SHAPES[args.shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=args.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(args.seed)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(args.device):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    # The benchmark's own; each row says where mxfx finds the weights.
    return model.to("cpu")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model")
    source.add_argument("--shape", choices=_SHAPES)
    parser.add_argument("--layers", type=int, help="of a --shape; all by default")
    parser.add_argument("--data")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--format", default="mxint4@32")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--places",
        nargs="*",
        default=["device/device"],
        metavar="WEIGHTS/ACTIVATIONS",
        help="one run of mxfx each: device/device, cpu/device, cpu/cpu, cpu/disk",
    )
    parser.add_argument("--options", nargs="*", help="one run of mxfx each, such as 'refine=2,order=\"none\"'")
    parser.add_argument("--peers", nargs="*", default=["mase", "llm-compressor"], help="none of them: --peers")
    parser.add_argument("--profile", type=Path, help="write where the host spends one more run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model and not args.data:
        parser.error("--model needs --data")
    return args


if __name__ == "__main__":
    main()
