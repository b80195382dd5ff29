"""Bandwidth of the quantizing kernels, beside a device copy, inductor, torchao's casts and Mase's formula.

    python -m tools.bench.kernels [--json FILE] [--plot FILE] [--quick]
    python -m tools.bench.kernels --plot-from JSON --plot FILE

A row says what one op costs: median milliseconds on the GPU by CUDA-graph replay, GB/s over the bytes that it must
move (each operand once), its speed as a share of a device copy of the same bytes, of a fused op its time over
quantizing alone; before them, the microseconds that the host needs for a launch. With `--plot` also over sizes, which
`--json` keeps: a machine without matplotlib measures, another one plots.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import mxfx.ops.kernels  # noqa: F401  (registers the ops)
from mxfx.algorithms.hadamard import hadamard_matrix, kronecker_signs, kronecker_transform
from mxfx.formats import parse
from tools.bench.measuring import arguments_of, host_us, kernel_ms, machine, require_cuda, table, write

SIZE = 8192
ELEMENTS = ("mxint4", "mxint8", "mxfp4_e2m1", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2")
RULES = ("floor", "rceil", "even", "ceil", "mse")
ops = torch.ops.mxfx_kernels

Case = tuple[str, Callable[[], object], int]


def mase_mxint4(x: Tensor, block: int = 32) -> Tensor:
    """Mase's block integer quantizer from its definition: step 2^(ceil(log2 amax) - 3), round, clip to [-8, 7]."""
    blocks = x.float().unflatten(-1, (-1, block))
    exponent = blocks.abs().amax(-1, keepdim=True).log2().ceil().clamp(-127, 127)
    step = 2 ** (exponent - 3)
    return ((blocks / step).round().clamp(-8, 7) * step).flatten(-2).to(x.dtype)


def quantizers(x: Tensor, quick: bool) -> Iterator[Case]:
    """`fake_quantize`, every element type and rule."""
    moved = 2 * x.nbytes
    for element in ELEMENTS[:3] if quick else ELEMENTS:
        for rule in ("floor", "mse") if quick else RULES:
            name = str(parse(f"{element}@32/{rule}"))
            yield name, lambda name=name: ops.fake_quantize(x, name, -1), moved
    yield "minifloat_e4m3", lambda: ops.fake_quantize(x, "minifloat_e4m3", -1), moved


def fused(x: Tensor) -> Iterator[Case]:
    """Transforms and producers with `mse` quantization behind them; matrices in x's dtype, as passes store them."""
    width, moved = x.shape[-1], 2 * x.nbytes
    for block in (32, 64, 128):
        name = f"mxint4@{block}/mse"
        signs = hadamard_matrix(block, torch.float32, x.device)
        own = torch.randn(width // block, block, block, device=x.device) / block**0.5
        stored = own.to(x.dtype)
        yield name, lambda name=name: ops.fake_quantize(x, name, -1), moved
        yield f"hadamard {block}", lambda block=block: ops.hadamard(x, block), moved
        yield f"hadamard {block} + {name}", lambda s=signs, n=name: ops.transform_quantize(x, s, n, True), moved
        yield f"T {block} + {name}", lambda t=stored, n=name: ops.transform_quantize(x, t, n, False), moved
        yield f"T {block} in float32 + {name}", lambda t=own, n=name: ops.transform_quantize(x, t, n, False), moved
    for order in (2048, 8192):
        rows, name = x.view(-1, order), "mxint4@32/mse"
        yield f"hadamard {order}", lambda rows=rows, order=order: ops.hadamard(rows, order), moved
        yield (
            f"hadamard {order} + {name}",
            lambda rows=rows, order=order, name=name: ops.hadamard_quantize(rows, order, name),
            moved,
        )
    gate, weight = torch.randn_like(x), torch.rand(2048, device=x.device, dtype=x.dtype)
    short, h32, name = x.view(-1, 2048), hadamard_matrix(32, torch.float32, x.device), "mxint4@32/mse"
    t32 = (torch.randn(64, 32, 32, device=x.device) / 32**0.5).to(x.dtype)
    up32 = (torch.randn(width // 32, 32, 32, device=x.device) / 32**0.5).to(x.dtype)
    yield "norm 2048 + quantize", lambda: ops.norm_quantize(short, weight, None, name, 1e-5), moved
    yield "norm 2048 + H32 + quantize", lambda: ops.norm_quantize(short, weight, h32, name, 1e-5, hadamard=True), moved
    yield "norm 2048 + T32 + quantize", lambda: ops.norm_quantize(short, None, t32, name, 1e-5), moved
    yield "silu*up + quantize", lambda: ops.silu_mul_quantize(gate, x, None, name), 3 * x.nbytes
    yield "silu*up + H32 + quantize", lambda: ops.silu_mul_quantize(gate, x, h32, name, True), 3 * x.nbytes
    yield "silu*up + T32 + quantize", lambda: ops.silu_mul_quantize(gate, x, up32, name), 3 * x.nbytes
    heads = x.view(8, -1, 8, 64).transpose(1, 2)
    angle = torch.randn(1, heads.shape[2], 64, device=x.device, dtype=x.dtype)
    own = (torch.randn(8, 2, 32, 32, device=x.device) / 32**0.5).to(x.dtype)
    yield "rope", lambda: ops.rope(heads, angle, angle), moved
    yield "rope + quantize", lambda: ops.rope_quantize(heads, angle, angle, None, name), moved
    yield "rope + H32 + quantize", lambda: ops.rope_quantize(heads, angle, angle, h32, name, True), moved
    yield "rope + T32 a head + quantize", lambda: ops.rope_quantize(heads, angle, angle, own, name), moved
    yield "T32 a head, (b, h, s, 64) strided", lambda: ops.block_transform(heads, own), moved
    yield "quantize, (b, h, s, 64) strided", lambda: ops.fake_quantize(heads, name, -1), moved


def others(x: Tensor, quick: bool) -> Iterator[Case]:
    """The same work by other means."""
    moved = 2 * x.nbytes
    for name in ("mxint4@32/mse",) if quick else ("mxint4@32", "mxint4@32/mse", "mxfp4_e2m1@32"):
        compiled = torch.compile(parse(name).fake_quantize, dynamic=False)
        yield f"inductor {name}", lambda compiled=compiled: compiled(x), moved
    signs = kronecker_signs(8192, torch.float32, x.device)
    yield "hadamard 8192, two products in float32", lambda: kronecker_transform(x, *signs), moved
    matrix = hadamard_matrix(8192, x.dtype, x.device)
    yield "hadamard 8192, one dense product in bfloat16", lambda: x @ matrix, moved
    yield "eager mxint4@32/mse", lambda: parse("mxint4@32/mse").fake_quantize(x), moved
    yield "Mase MXINT4", lambda: mase_mxint4(x), moved
    if not quick:
        compiled_mase = torch.compile(mase_mxint4, dynamic=False)
        yield "inductor Mase MXINT4", lambda: compiled_mase(x), moved


def peers(x: Tensor, quick: bool) -> Iterator[Case]:
    """Other projects' kernels for the nearest thing to a quantizer or a transform of ours, where they are installed."""
    moved = 2 * x.nbytes
    if find_spec("torchao"):
        for element in (torch.float8_e4m3fn,) if quick else (torch.float8_e4m3fn, torch.float4_e2m1fn_x2):
            cast = torchao_cast(element)
            name = f"torchao {str(element).removeprefix('torch.')} floor, to MX and back"
            yield f"{name}, eager", lambda cast=cast: cast(x), moved
            compiled = torch.compile(cast, dynamic=False)
            yield f"{name}, compiled", lambda compiled=compiled: compiled(x), moved
    if find_spec("fast_hadamard_transform"):
        from fast_hadamard_transform import hadamard_transform

        for order in (128, 2048, 8192):
            rows = x.view(-1, order)
            name = f"fast_hadamard_transform {order}"
            yield name, lambda rows=rows, order=order: hadamard_transform(rows, order**-0.5), moved


def torchao_cast(element: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Fake quantization by torchao's casts, blocks of 32, OCP's scale (`floor`)."""
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx

    def cast(x: Tensor) -> Tensor:
        scale, codes = to_mx(x, element, 32, ScaleCalculationMode.FLOOR)
        return to_dtype(codes, scale, element, 32, x.dtype)

    return cast


def copy_ms(moved: int) -> float:
    """Median milliseconds of a device copy that reads and writes `moved` bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return kernel_ms(lambda: target.copy_(source))


def measure(cases: Iterable[Case]) -> list[dict[str, object]]:
    """One row a case; a case that fails says why and does not end the run."""
    rows: list[dict[str, object]] = []
    copies: dict[int, float] = {}
    for name, call, moved in cases:
        if moved not in copies:
            copies[moved] = copy_ms(moved)
            rows.append(_row(f"copy {moved >> 20} MiB", copies[moved], moved, copies[moved]))
        try:
            row = _row(name, kernel_ms(call), moved, copies[moved])
            alone = next((r["ms"] for r in rows if r["case"] == name.rpartition(" + ")[2]), None)
            rows.append(row | {"× quantizing alone": "" if alone is None else row["ms"] / alone})
        except Exception as error:
            torch.cuda.synchronize()
            said = f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
            rows.append({"case": said, "ms": 0.0, "GB/s": 0.0, "of copy": 0.0, "× quantizing alone": ""})
    return rows


def _row(name: str, ms: float, moved: int, copy: float) -> dict[str, object]:
    return {"case": name, "ms": ms, "GB/s": moved / ms / 1e6, "of copy": copy / ms, "× quantizing alone": ""}


def launches() -> list[dict[str, object]]:
    """What a call costs the host: each op on a tensor so small that the GPU keeps up."""
    x = torch.randn(16, 64, device="cuda").to(torch.bfloat16)
    signs, weight = hadamard_matrix(32, torch.float32, x.device), torch.rand(64, device="cuda", dtype=x.dtype)
    target, name = torch.empty_like(x), "mxint4@32/mse"
    calls = {
        "copy_": lambda: target.copy_(x),
        "fake_quantize": lambda: ops.fake_quantize(x, name, -1),
        "transform_quantize": lambda: ops.transform_quantize(x, signs, name, True),
        "norm_quantize": lambda: ops.norm_quantize(x, weight, None, name, 1e-5),
        "silu_mul_quantize": lambda: ops.silu_mul_quantize(x, x, None, name),
        "its definition in ATen": lambda: F.silu(x) * x,
    }
    with torch.no_grad():
        return [{"launch": op, "host, µs": host_us(call)} for op, call in calls.items()]


def over_sizes(quick: bool) -> list[dict[str, object]]:
    """Bandwidth of one quantizer, its fused form and a copy from 1 MiB to 512 MiB."""
    rows = []
    signs = hadamard_matrix(32, torch.float32, torch.device("cuda"))
    for exponent in range(20, 30, 3 if quick else 1):
        x = torch.randn(2**exponent // 2, device="cuda").to(torch.bfloat16).view(-1, 2048)
        target = torch.empty_like(x)
        calls = {
            "copy": lambda x=x, target=target: target.copy_(x),
            "mxint4@32": lambda x=x: ops.fake_quantize(x, "mxint4@32", -1),
            "mxint4@32/mse": lambda x=x: ops.fake_quantize(x, "mxint4@32/mse", -1),
            "hadamard 32 + mxint4@32/mse": lambda x=x: ops.transform_quantize(x, signs, "mxint4@32/mse", True),
        }
        rows += [
            {"MiB": 2 ** (exponent - 20), "case": n, "GB/s": 2 * x.nbytes / kernel_ms(c) / 1e6}
            for n, c in calls.items()
        ]
    return rows


def plot(rows: list[dict[str, object]], device: str, target: Path) -> None:
    """Bandwidth over size, one line a case; rows are those of `over_sizes`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for case in dict.fromkeys(row["case"] for row in rows):
        line = [(row["MiB"], row["GB/s"]) for row in rows if row["case"] == case]
        axes.plot(*zip(*line, strict=True), marker="o", label=case)
    axes.set(xscale="log", xlabel="tensor, MiB", ylabel="GB/s read and written", title=device)
    axes.legend()
    figure.savefig(target, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = arguments_of("Bandwidth of the quantizing kernels")
    parser.add_argument("--plot", type=Path, help="write a plot of bandwidth over size to this file")
    parser.add_argument("--plot-from", type=Path, help="plot what --json wrote to this file; measure nothing")
    arguments = parser.parse_args()
    if arguments.plot_from is not None:
        found = json.loads(arguments.plot_from.read_text())
        plot(found["sizes"], found["machine"]["device"], arguments.plot or arguments.plot_from.with_suffix(".png"))
        return
    require_cuda()
    print("  ".join(f"{k}={v}" for k, v in machine().items()))
    x = torch.randn(SIZE, SIZE, device="cuda").to(torch.bfloat16)
    found: dict[str, list[dict[str, object]]] = {"rows": [], "launches": launches(), "sizes": []}
    print(table(found["launches"]), flush=True)
    if arguments.plot is not None:
        found["sizes"] = over_sizes(arguments.quick)
        if find_spec("matplotlib"):
            plot(found["sizes"], torch.cuda.get_device_name(), arguments.plot)
    for cases in (fused(x), peers(x, arguments.quick), others(x, arguments.quick), quantizers(x, arguments.quick)):
        rows = measure(cases)
        print(table(rows), flush=True)
        found["rows"] += rows
        # After every part: a run that is cut short has kept what it found.
        write(found, arguments.json)


if __name__ == "__main__":
    main()
