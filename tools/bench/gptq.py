"""GPTQ on a model: time beside the matrix-multiply floor and Mase's formula, and perplexities in the same run.

    python tools/bench/gptq.py --model DIR --data DIR [--eval-data DIR] [--samples 32] [--length 512] [--device cuda]
    python tools/bench/gptq.py --shape llama-3.2-1b --samples 128 --length 2048 --device cuda

Prints machine and versions, then one row a method: seconds end to end (median of ``--repeat``), ratio to the floor,
peak device memory, and with ``--eval-data`` the token perplexity and its ratio to the float model. The floor is the
time that the forward pass and the Hessians would take at the rate of a large matrix product on the same device,
nothing else counted. With ``--shape`` the model has random weights and the tokens are random: times only.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from mase_gptq import mase_gptq
from measuring import machine, table
from torch import Tensor, nn

from mxfx.api import trace
from mxfx.calibration.datasets import documents, load_tokens
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.passes import Annotate, Lower, RaiseAttention, RaiseNorm, RaiseRope, RoundWeights, Rule
from mxfx.passes.gptq import Gptq
from mxfx.rewrite import Context, Selector, apply
from mxfx.runtime.causal_lm import emit
from mxfx.runtime.pretrained import load_model, load_tokenizer

_LINEARS = Selector(r"model\.layers\.\d+\..*_proj")
_SHAPES = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def main() -> None:
    args = _arguments()
    about = machine() | {"transformers": transformers.__version__}
    print("  ".join(f"{k}={v}" for k, v in about.items()), flush=True)
    model, ids, windows = _random(args) if args.shape else _real(args)
    program = _annotated(model, args.format)
    floor = _floor_seconds(program, ids.numel(), args.device)
    print(f"{ids.shape[0]} x {ids.shape[1]} tokens, {program.layers} layers, floor {floor:.2f} s", flush=True)
    reference = _perplexity(emit(apply(Lower(), program).program, args.device), windows) if windows else None
    rows: list[dict[str, object]] = []

    def measure(name: str, work: Callable[[], object], perplexity: Callable[[object], float]) -> None:
        seconds, peak, result = _timed(work, args)
        row: dict[str, object] = {"method": name, "seconds": seconds, "x floor": seconds / floor, "peak GB": peak}
        if reference is not None:
            found = perplexity(result)
            row |= {"ppl": found, "x float": found / reference}
        rows.append(row)
        print(row, flush=True)

    def emitted(result: object) -> float:
        return _perplexity(emit(apply(Lower(), result).program, args.device), windows)  # type: ignore[arg-type]

    def of_model(result: object) -> float:
        return _perplexity(lambda batch: result(batch, use_cache=False).logits, windows)  # type: ignore[operator]

    ctx = Context(device=torch.device(args.device), tokens=lambda: ids)
    options = {"batch_size": args.batch_size, "activations": args.activations}
    for text in args.options or [""]:
        own = dict(pair.split("=") for pair in text.split(",") if pair)
        pass_ = Gptq(**options, **{k: json.loads(v) for k, v in own.items()})
        measure(f"mxfx gptq {text}".strip(), lambda pass_=pass_: apply(pass_, program, ctx).program, emitted)
    if not args.shape:
        measure("round to nearest", lambda: apply(RoundWeights(), program).program, emitted)
    if not args.without_mase:
        measure("Mase's formula", lambda: _mase(model, ids, args), of_model)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "floor": floor, "float": reference, "rows": rows}, indent=1))


def _mase(model: nn.Module, ids: Tensor, args: argparse.Namespace) -> nn.Module:
    own = copy.deepcopy(model).to(args.device)
    mase_gptq(own, ids, batch_size=args.batch_size)
    return own


def _annotated(model: nn.Module, fmt: str) -> Program:
    program = trace(model)
    rule = Rule(_LINEARS, weight=parse(fmt), expect="7 * layers")
    for pass_ in (RaiseNorm(), RaiseRope(), RaiseAttention(), Annotate((rule,))):
        program = apply(pass_, program).program
    return program


def _floor_seconds(program: Program, tokens: int, device: str) -> float:
    """Forward pass of the linears and one Hessian per distinct input, at the rate of a large product."""
    linears = [n for n in program.nodes("linear") if "weight" in n.meta["mxfx"].formats]
    flops = sum(2 * tokens * program.weights[program.weight_of(n)].numel() for n in linears)
    flops += sum(tokens * source.meta["val"].shape[-1] ** 2 for source in {n.args[0] for n in linears})  # type: ignore[union-attr]
    size = 8192 if device != "cpu" else 2048
    dtype = torch.float32 if device == "cpu" else program.dtype
    x = torch.randn(size, size, device=device).to(dtype)
    seconds = min(_seconds(lambda: x @ x, device)[0] for _ in range(5))
    return flops / (2 * size**3 / seconds)


def _seconds(work: Callable[[], object], device: str) -> tuple[float, object]:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _timed(work: Callable[[], object], args: argparse.Namespace) -> tuple[float, float, object]:
    """Median seconds, peak device memory in GB above what was held before, and the last result."""
    times, result, peak = [], None, 0.0
    for _ in range(args.repeat):
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        taken, result = _seconds(work, args.device)
        times.append(taken)
        if args.device != "cpu":
            peak = torch.cuda.max_memory_allocated() / 1e9
    return statistics.median(times), peak, result


@torch.no_grad()
def _perplexity(logits: Callable[[Tensor], Tensor], windows: list[Tensor]) -> float:
    total = count = 0.0
    for window in windows:
        y = logits(window)[0, :-1].float()
        total += torch.nn.functional.cross_entropy(y, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return float(torch.tensor(total / count).exp())


def _real(args: argparse.Namespace) -> tuple[nn.Module, Tensor, list[Tensor]]:
    tokenizer = load_tokenizer(args.model)
    ids = load_tokens(args.data, tokenizer, samples=args.samples, length=args.length, seed=args.seed).ids
    windows = []
    if args.eval_data:
        text = "\n\n".join(documents(args.eval_data))
        stream = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: args.eval_tokens])
        windows = [w[None].to(args.device) for w in stream.split(args.eval_length) if len(w) > 1]
    return load_model(args.model, args.dtype), ids, windows


def _random(args: argparse.Namespace) -> tuple[nn.Module, Tensor, list[Tensor]]:
    shape = _SHAPES[args.shape]
    config = transformers.LlamaConfig(**shape, num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=True)
    torch.manual_seed(args.seed)
    with torch.device(args.weights_on):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model, torch.randint(3, 32000, (args.samples, args.length)), []


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model")
    source.add_argument("--shape", choices=_SHAPES)
    parser.add_argument("--data")
    parser.add_argument("--eval-data")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--eval-length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--format", default="mxint4@32")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights-on", default="cpu", help="where the weights of a --shape lie")
    parser.add_argument("--activations", default="device", choices=["device", "cpu", "disk"])
    parser.add_argument("--options", nargs="*", help="one run each, such as 'refine=2,order=\"none\"'")
    parser.add_argument("--without-mase", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model and not args.data:
        parser.error("--model needs --data")
    return args


if __name__ == "__main__":
    main()
