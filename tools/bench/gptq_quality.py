"""What GPTQ is worth on a real model, beside Mase's formula and llm-compressor, in one run on the same samples.

    python -m tools.bench.gptq_quality --model DIR --data DIR --eval-data DIR [--config-b FILE] [--seeds 0 1 2]
        [--tokens 105000] [--samples 32] [--length 512] [--dtype bfloat16] [--device cuda] [--json FILE]

All decoder linears in MXINT4 blocks of 32, in two bases: as the model stands, and under block-32 Hadamards (absorbed
in the weights of v, o; online at the inputs of the other linears; keys and queries after RoPE). Each rounding is put
into the same emitted graphs and evaluated twice: with weights alone quantized (W4), and with activations, keys and
values too (W4A4KV4). ``--config-b`` adds that pipeline, as it is and with the weights that Mase's formula finds.

Prints token perplexity over 2048-token windows as a multiple of the float model's: the median over seeds, each seed,
and the median over that of Mase's formula. Mase's formula runs in float32, from the same weights as mxfx.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from mxfx import api
from mxfx.calibration.datasets import documents, load_tokens
from mxfx.config import Pipeline
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.evaluation.evaluate import token_perplexity
from mxfx.evaluation.windows import token_windows
from mxfx.formats import parse
from mxfx.graph.node import layer_of, path_of
from mxfx.graph.program import Program
from mxfx.passes import Annotate, InsertFakeQuant, QuantizeKvCache, RoundWeights, Rule, TransformInputs, TransformKv
from mxfx.passes.gptq import Gptq
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context, Pass, Selector, apply
from mxfx.runtime.causal_lm import EmittedCausalLM, as_causal_lm
from tools.bench.mase_gptq import mase_gptq, rotate
from tools.bench.measuring import machine, table
from tools.bench.peer_llmcompressor import llmcompressor_gptq, missing

_FORMAT = parse("mxint4@32")
_WINDOW = 2048
_MASE = "Mase's formula"
_PEER = "llm-compressor int4"
_BASES: dict[str, tuple[Pass, ...]] = {
    "as it is": (),
    "Hadamard 32": (
        TransformKv(kind="hadamard", block=32),
        # The values' rotation is the output projection's already.
        TransformInputs(kind="hadamard", block=32, select=Selector(r".*(?<!o)_proj")),
    ),
}

#: Path of a linear → its rounded weight, in the basis of the program.
Weights = dict[str, Tensor]


def main() -> None:
    args = _arguments()
    about = machine() | {"transformers": transformers.__version__, "model": args.model, "dtype": args.dtype}
    print("  ".join(f"{k}={v}" for k, v in about.items()), flush=True)
    tokenizer = load_tokenizer(args.model)
    windows = token_windows(documents(args.eval_data), tokenizer, length=_WINDOW)[: math.ceil(args.tokens / _WINDOW)]
    model = load_model(args.model, args.dtype).to(args.device)
    bench = Bench(model, windows, args)
    for seed in args.seeds:
        ids = load_tokens(args.data, tokenizer, samples=args.samples, length=args.length, seed=seed).ids
        bench.seed(ids, seed)
        if args.json:
            found = {"machine": about, "float": bench.reference, "rows": bench.rows(), "seconds": bench.seconds}
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(bench.rows()))


class Bench:
    """The emitted graphs that every rounding is evaluated in, and the perplexities found so far."""

    def __init__(self, model: nn.Module, windows: list[Tensor], args: argparse.Namespace) -> None:
        self._model, self._windows, self._args = model, windows, args
        self._raised = PassManager().run(api.trace(model, name=args.model), Pipeline().completed()).program
        self.reference = self._perplexity(as_causal_lm(self._raised, args.device))
        print(f"float: {self.reference:.4f} on {sum(len(w) for w in windows):,} tokens", flush=True)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._ratios: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        self._bases = {name: Basis.of(self._raised, passes, args.device) for name, passes in _BASES.items()}

    def seed(self, ids: Tensor, seed: int) -> None:
        """Round with every method on these samples, and evaluate."""
        ctx = Context(seed=seed, device=torch.device(self._args.device), tokens=lambda: ids)
        of_mase: Weights = {}
        for name, basis in self._bases.items():
            methods: dict[str, Callable[[], Weights]] = {
                "round to nearest": partial(basis.weights, RoundWeights(), ctx),
                "mxfx gptq": partial(basis.weights, Gptq(), ctx),
                "mxfx gptq refine 2": partial(basis.weights, Gptq(refine=2), ctx),
                _MASE: partial(self._mase, ids, basis),
            }
            if not basis.rotated and missing() is None:
                methods[_PEER] = partial(self._peer, ids)
            for method, solve in methods.items():
                with self._survived(f"{method}, {name}, seed {seed}"):
                    weights = self._evaluate(method, name, basis, solve)
                    if method == _MASE and not basis.rotated:
                        of_mase = weights
        if self._args.config_b:
            with self._survived(f"config B, seed {seed}"):
                self._config_b(ctx, of_mase)

    def rows(self) -> list[dict[str, object]]:
        """The table: one row a basis, what is quantized, and method."""
        found = []
        for (basis, scope, method), ratios in sorted(self._ratios.items()):
            median, mase = statistics.median(ratios), self._ratios.get((basis, scope, _MASE))
            found.append(
                {
                    "basis": basis,
                    "quantized": scope,
                    "method": method,
                    "x float": median,
                    "x Mase": median / statistics.median(mase) if mase else float("nan"),
                    "seeds": " ".join(f"{ratio:.4f}" for ratio in ratios),
                }
            )
        return found

    def _evaluate(self, method: str, name: str, basis: Basis, solve: Callable[[], Weights]) -> Weights:
        started = time.perf_counter()
        weights = solve()
        if self._args.device != "cpu":
            torch.cuda.synchronize()
        self.seconds[f"{method}, {name}"].append(time.perf_counter() - started)
        for scope, model in basis.models.items():
            self._note(name, scope, method, _substituted(model, weights))
        return weights

    def _config_b(self, ctx: Context, of_mase: Weights) -> None:
        passes = [
            # Its checkpoints would outlive the run.
            dataclasses.replace(p, checkpoint_dir=None) if isinstance(p, Gptq) else p
            for p in api.load_pipeline(self._args.config_b)
        ]
        model = as_causal_lm(PassManager().run(self._raised, passes, ctx).program, self._args.device)
        self._note("config B", "W4A4KV4", "mxfx gptq", model)
        if of_mase:
            self._note("config B", "W4A4KV4", _MASE, _substituted(model, of_mase))

    def _note(self, basis: str, scope: str, method: str, model: nn.Module) -> None:
        ratio = self._perplexity(model) / self.reference
        self._ratios[basis, scope, method].append(ratio)
        print(f"  {basis}, {scope}, {method}: x {ratio:.4f}", flush=True)

    def _perplexity(self, model: nn.Module) -> float:
        return token_perplexity(model, self._windows, batch_size=self._args.batch).perplexity

    def _mase(self, ids: Tensor, basis: Basis) -> Weights:
        model = copy.deepcopy(self._model).float()
        if basis.rotated:
            rotate(model)
            basis.check_equal(_decoder_weights(model))
        mase_gptq(model, ids)
        return _decoder_weights(model)

    def _peer(self, ids: Tensor) -> Weights:
        return _decoder_weights(llmcompressor_gptq(copy.deepcopy(self._model), ids))

    @contextlib.contextmanager
    def _survived(self, what: str) -> Iterator[None]:
        """One failing method must not cost the figures of the others."""
        try:
            yield
        except Exception:
            print(f"failed: {what}", flush=True)
            traceback.print_exc()


@dataclasses.dataclass(frozen=True)
class Basis:
    """An annotated program in one basis, and emitted models of it whose weights are exchanged: W4 and W4A4KV4."""

    program: Program
    rotated: bool
    models: dict[str, EmittedCausalLM]

    @classmethod
    def of(cls, raised: Program, changes: tuple[Pass, ...], device: str) -> Basis:
        linears = Rule(Selector(r"model\.layers\.\d+\..*_proj"), weight=_FORMAT, input=_FORMAT, expect="7 * layers")
        caches = Rule(Selector(r"model\.layers\.\d+\.self_attn"), kv=_FORMAT, expect="layers")
        program = PassManager().run(raised, [Annotate((linears, caches)), *changes]).program
        quantized = PassManager().run(program, [InsertFakeQuant(), QuantizeKvCache()]).program
        models = {"W4": as_causal_lm(program, device), "W4A4KV4": as_causal_lm(quantized, device)}
        return cls(program, bool(changes), models)

    def weights(self, pass_: Pass, ctx: Context) -> Weights:
        """The decoder's weights after a pass that rounds them."""
        return _weights_of(apply(pass_, self.program, ctx).program)

    def check_equal(self, others: Weights) -> None:
        """Raises ``ValueError`` unless the other basis is this one: otherwise weights cannot be exchanged."""
        for path, weight in _weights_of(self.program).items():
            other = others[path].to(weight.device)
            if not torch.allclose(weight.float(), other, rtol=1e-3, atol=1e-3 * float(other.abs().max())):
                raise ValueError(f"{path}: the rotated reference has another weight than the transformed program")


def _weights_of(program: Program) -> Weights:
    linears = [node for node in program.nodes("linear") if layer_of(node) is not None]
    return {path_of(node): program.weights[program.weight_of(node)] for node in linears}


def _decoder_weights(model: nn.Module) -> Weights:
    modules = model.named_modules()
    return {name: m.weight.detach() for name, m in modules if isinstance(m, nn.Linear) and ".layers." in name}


def _substituted(model: EmittedCausalLM, weights: Weights) -> EmittedCausalLM:
    """The emitted model, its decoder's weights exchanged."""
    for path, weight in weights.items():
        parameter = model.graph.get_parameter(f"{path}.weight")
        # Not copy_: until it is exchanged, the tensor is that of the model which was traced.
        parameter.data = weight.to(parameter.device, parameter.dtype)
    return model


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--data", "--eval-data"):
        parser.add_argument(name, required=True)
    parser.add_argument("--config-b", type=Path, help="such as passes_configs/tutorial_b_gptq.toml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=105_000)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
