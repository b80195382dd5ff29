"""Every linear of a saved program on real text: its product in FP8 beside float64, and rows that E4M3 did not hold.

    python -m tools.bench.fp8_linears SAVED --text FILE|DIR [--tokens 4096] [--length 1024] [--device cuda]
        [--json FILE]

`SAVED` is a folder that mxfx saved, packed. The program runs emitted as for use; at each product of rows of E4M3 the
same operands, as the quantizing kernel gives them, are multiplied once more: by the kernel with exact sums and by the
one with fast sums, both with a result in float32, and in float64 with decoded weights. A row for all linears that do
one thing (the quantizer in front of them, input and output channels), over all layers: `rows` that came in; `not held`,
rows that differ from what the quantizer's own op rounds them to; `unlike float64`, results that are not float64's
rounded once to float32, of how many; `fast`, the same with fast sums, and their largest error over the largest result.
The last row counts what is wrong anywhere.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mxfx import api
from mxfx.calibration.datasets import load_tokens
from mxfx.config.emit import EmitConfig
from mxfx.driver.pretrained import load_tokenizer
from mxfx.formats import parse
from mxfx.formats.stored import restore
from mxfx.ops import fp8
from mxfx.ops.kernels.packed import ADD_NORM_LINEAR, MULTIPLYING, ROUNDING
from mxfx.pipeline.emit import emitted
from mxfx.runtime.causal_lm import as_causal_lm
from tools.bench.measuring import arguments_of, finish

ops = torch.ops.mxfx_kernels
#: Op that rounds and multiplies → the op that rounds, and the one that gives rows of E4M3.
QUANTIZERS = {product: (plain, e4m3) for plain, e4m3 in ROUNDING.items() if (product := MULTIPLYING[e4m3])}
#: Rows whose products are made in float64 at a time.
ROWS = 1024


def main() -> None:
    args = _arguments()
    device = torch.device(args.device)
    program = api.load(args.saved)
    samples = max(args.tokens // args.length, 1)
    ids = load_tokens(args.text, load_tokenizer(str(args.saved)), samples=samples, length=args.length, seed=0).ids
    model = as_causal_lm(emitted(program, device, EmitConfig(device="cuda", packed=True)), device)
    with torch.no_grad(), Linears() as seen:
        model(ids.to(device))
    if not seen.found:
        raise SystemExit(
            f"{args.saved}: no product of rows of E4M3 ran: is the folder packed, and its formats 4-bit ones?"
        )
    found = [{"what": name} | one.row() for name, one in seen.found.items()]
    finish([*found, {"what": "all"} | sum(seen.found.values(), Seen()).row()], args.json)


@dataclass
class Seen:
    """What linears of a kind came to."""

    linears: int = 0
    rows: int = 0
    lost: int = 0
    results: int = 0
    wrong: int = 0
    fast: int = 0
    error: float = 0.0

    def __add__(self, other: Seen) -> Seen:
        sums = {name: getattr(self, name) + getattr(other, name) for name in vars(self) if name != "error"}
        return Seen(**sums, error=max(self.error, other.error))

    def row(self) -> dict[str, object]:
        return {
            "linears": self.linears,
            "rows": self.rows,
            "not held": self.lost,
            "unlike float64": f"{self.wrong} / {self.results}",
            "fast": f"{self.fast} / {self.results}",
            "error of fast": self.error,
        }


@dataclass
class Linears(TorchDispatchMode):
    """Looks at each op that rounds and multiplies, by kind, and lets it run."""

    found: dict[str, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is ADD_NORM_LINEAR:  # what it normalizes is the sum, its first result
            codes, scales, biases, _, weights, _, *operands = args
            self._look(
                next(op for op in QUANTIZERS if "norm" in op.name()), codes, scales, biases, weights, out[0], *operands
            )
        elif func in QUANTIZERS:
            codes, scales, biases, _, weights, *operands = args
            self._look(func, codes, scales, biases, weights, *operands)
        elif func is ops.mx_linear_e4m3.default:
            raise SystemExit(
                "a linear reads rows that another op made: this bench does not know what they were rounded from"
            )
        return out

    def _look(self, func: Any, codes: list, scales: list, biases: list, weights: str, *operands: Any) -> None:
        plain, e4m3 = QUANTIZERS[func]
        fmt = parse(weights)
        if fp8.not_carried(fmt) is not None:
            return
        payload, factors = e4m3(*operands)
        width = payload.shape[-1]
        rounded = plain(*operands).reshape(-1, width)
        payload, factors = payload.reshape(-1, width), factors.reshape(-1, 1)
        weight = torch.cat([restore(c, s, fmt, width, torch.float64) for c, s in zip(codes, scales, strict=True)])
        bias = torch.cat(biases).double() if biases else 0.0
        name = f"{plain.name().partition('::')[2]} {width} -> {len(weight)}"
        seen = Seen(linears=len(codes), rows=len(rounded))
        seen.lost = int((fp8.from_rows(payload, factors, torch.float64) != rounded.double()).any(-1).sum())
        for some, of_some in zip(payload.split(ROWS), factors.split(ROWS), strict=True):
            wide = fp8.from_rows(some, of_some, torch.float64) @ weight.mT + bias
            wanted = wide.float()
            given = (some, of_some, codes, scales, biases, weights, torch.float32)
            exact = ops.mx_linear_e4m3(*given)
            fast = ops.mx_linear_e4m3(*given, sums="fast")
            seen.results += wanted.numel()
            seen.wrong += int((exact != wanted).sum())
            seen.fast += int((fast != wanted).sum())
            seen.error = max(seen.error, float((fast - wide).abs().max() / wide.abs().max()))
        self.found[name] = self.found.get(name, Seen()) + seen


def _arguments() -> argparse.Namespace:
    parser = arguments_of("Products in FP8 of every linear on real text beside float64")
    parser.add_argument("saved", type=Path, help="folder that mxfx saved")
    parser.add_argument("--text", type=Path, required=True, help="text file, or folder of such")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
