"""Products of MX operands on one GPU beside bfloat16's: are they exact, what do they cost?

    python -m tools.bench.packed_gemm [--part exact|sums|many|few|together|tilings|tiles|norms …] [--operands FILE]
        [--json FILE] [--rehearse] [--quick] [--linears NAME] [--once]

`exact`: every kernel beside its definition. `sums`: results that differ from float64's, ours and cuBLAS's with and
without fast sums; with `--operands` also on recorded ones (safetensors: `NAME/x`, `NAME/codes`, `NAME/scales` in
mxint4@32). `many`: quantizer and product beside the bfloat16 GEMM alone, for all linears that read one input; `few`:
few rows times packed weights beside a bfloat16 product. Medians of CUDA-graph replay in one process;
operands rotate, so that none is in the cache.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import mxfx.ops.kernels  # noqa: F401  (registers the ops)
from mxfx.formats import parse
from mxfx.formats.stored import restore, store
from mxfx.ops import fp8
from mxfx.ops.kernels.packed import inexact_count
from tools.bench.measuring import arguments_of, kernel_ms, machine, require_cuda, table, write

if TYPE_CHECKING:
    from mxfx.ops.kernels.integer_triton import Tiling

ops = torch.ops.mxfx_kernels

#: Linears that read one input, by model: name, input channels, output channels of each.
SHAPES = {
    "1B": (
        ("q k v", 2048, (2048, 512, 512)),
        ("o", 2048, (2048,)),
        ("gate up", 2048, (8192, 8192)),
        ("down", 8192, (2048,)),
    ),
    "8B": (
        ("q k v", 4096, (4096, 1024, 1024)),
        ("o", 4096, (4096,)),
        ("gate up", 4096, (14336, 14336)),
        ("down", 14336, (4096,)),
    ),
}
CACHE = 1 << 27


def packed_weight(channels: int, width: int, text: str, device: str) -> tuple[Tensor, Tensor]:
    """Gaussian weights whose channels and blocks differ in size, rounded and packed."""
    weight = torch.randn(channels, width, device=device)
    weight *= torch.exp2(torch.randint(-3, 3, (channels, 1), device=device)) / width**0.5
    found = store(parse(text).fake_quantize(weight), parse(text))
    assert found is not None
    return found


def rounded(rows: int, width: int, text: str, dtype: torch.dtype, device: str) -> Tensor:
    """Heavy-tailed activations on a grid: a few channels and rows stand out, as after a residual stream."""
    x = torch.randn(rows, width, device=device)
    x *= torch.exp2(torch.randn(width, device=device)) * torch.exp2(torch.randn(rows, 1, device=device))
    return parse(text).fake_quantize(x.to(dtype))


def exact(device: str) -> Iterator[dict[str, object]]:
    """Kernels beside definitions, on operands of every format."""
    for text, dtype in itertools.product(
        ("mxint4@32/mse", "mxint4@16", "mxint4@128", "mxfp4_e2m1@32", "mxint8@32", "mxint3@32", "mxfp6_e2m3@32"),
        (torch.bfloat16, torch.float32),
    ):
        width, channels, fmt = 1536, 208, parse(text)
        codes, scales = packed_weight(channels, width, text, device)
        host = restore(codes.cpu(), scales.cpu(), fmt, width, dtype)
        worst, differing, fused = 0.0, 0, 0.0
        for rows in (1, 2, 8, 16, 300):
            x = rounded(rows, width, "mxint4@32/mse", dtype, device)
            wanted = F.linear(x.double(), host.to(device).double())
            both = ops.fake_quantize_linear([codes], [scales], [], None, text, x, "mxint4@32/mse", -1).double()
            fused = max(fused, float((both - wanted).abs().max() / wanted.abs().max()))
            got = ops.mx_linear(x, codes, scales, None, text).double()
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
            if fp8.not_carried(fmt) is None:
                payload, factors = ops.e4m3_rows(x)
                there, powers = fp8.to_rows(x.cpu())
                differing += int((payload.cpu() != there).sum() + (factors.cpu() != powers).sum())
                got = ops.mx_linear_e4m3(payload, factors, [codes, codes], [scales, scales], [], text, dtype)
                for half in got.double().split(channels, -1):
                    worst = max(worst, float((half - wanted).abs().max() / wanted.abs().max()))
        identity = torch.eye(width, device=device, dtype=dtype)
        expanded = ops.mx_linear(identity, codes, scales, None, text).t()
        yield {
            "format": text,
            "dtype": str(dtype).removeprefix("torch."),
            "largest error / largest entry": worst,
            "the same, quantizer too": fused,
            "E4M3 bytes unlike the CPU's": differing,
            "weights unlike the CPU's": int((expanded.cpu() != host).sum()),
            "inexact rows": inexact_count(),
        }


def sums(device: str, operands: Path | None) -> Iterator[dict[str, object]]:
    """How many results of an FP8 product in float32 differ from float64's, by the way that tensor cores sum."""
    cases: list[tuple[str, Tensor, Tensor, Tensor]] = []
    for width in (576, 2048, 4096, 8192, 14336):
        codes, scales = packed_weight(512, width, "mxint4@32", device)
        gaussian = parse("mxint4@32").fake_quantize(torch.randn(512, width, device=device))
        cases.append((f"Gaussian {width}", gaussian, codes, scales))
        cases.append((f"heavy tails {width}", rounded(512, width, "mxint4@32", torch.float32, device), codes, scales))
    if operands is not None:
        found = {name: tensor.to(device) for name, tensor in load_file(operands).items()}
        for name in sorted({name.rpartition("/")[0] for name in found}):
            x = found[f"{name}/x"].float()
            cases.append((name, x, found[f"{name}/codes"], found[f"{name}/scales"]))
    for name, x, codes, scales in cases:
        payload, factors = fp8.to_rows(x)
        weight, of_weight = fp8.to_rows(restore(codes, scales, parse("mxint4@32"), x.shape[-1], torch.float32))
        wanted = fp8.from_rows(payload, factors, torch.float64) @ fp8.from_rows(weight, of_weight, torch.float64).t()
        lost = (fp8.from_rows(payload, factors, torch.float32) != x).any(-1).sum()
        row: dict[str, object] = {"operands": name, "rows out of range": int(lost)}
        own = ops.mx_linear_e4m3(payload, factors, [codes], [scales], [], "mxint4@32", torch.float32)
        row["ours: unlike float64 / all"] = f"{int((own != wanted.float()).sum())} / {own.numel()}"
        row["ours: error"] = float((own - wanted).abs().max() / wanted.abs().max())
        for way, fast in (("sums in float32 every 128", False), ("fast sums", True)):
            got = torch._scaled_mm(
                payload.view(fp8.E4M3),
                weight.view(fp8.E4M3).t(),
                scale_a=factors,
                scale_b=of_weight.view(1, -1),
                out_dtype=torch.float32,
                use_fast_accum=fast,
            )
            row[f"{way}: unlike float64 / all"] = f"{int((got != wanted.float()).sum())} / {got.numel()}"
            row[f"{way}: error"] = float((got - wanted).abs().max() / wanted.abs().max())
        plain = x @ restore(codes, scales, parse("mxint4@32"), x.shape[-1], torch.float32).t()
        row["float32 GEMM: unlike"] = int((plain != wanted.float()).sum())
        yield row


def rotating(make: Callable[[], tuple], size: int, run: Callable[..., object]) -> Callable[[], object]:
    """A call on operands that were not used for longer than the cache remembers."""
    sets = [make() for _ in range(max(2, min(64, -(-CACHE // size))))]
    turn = itertools.cycle(sets)
    return lambda: run(*next(turn))


def many(device: str, rows: int) -> Iterator[dict[str, object]]:
    """Quantizer and FP8 product beside a bfloat16 product alone, of all linears that read one input."""
    text = "mxint4@32/mse"
    for model, (name, width, channels) in ((m, s) for m, shapes in SHAPES.items() for s in shapes):
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        weights = [torch.randn(n, width, device=device, dtype=torch.bfloat16) for n in channels]
        packed = [packed_weight(n, width, text, device) for n in channels]
        codes, scales = [p[0] for p in packed], [p[1] for p in packed]
        payload, factors = ops.fake_quantize_e4m3(x, text, -1)

        def product(payload=payload, factors=factors, codes=codes, scales=scales, sums="exact") -> Tensor:
            return ops.mx_linear_e4m3(payload, factors, codes, scales, [], text, torch.bfloat16, sums=sums)

        plain = kernel_ms(lambda weights=weights, x=x: [F.linear(x, w) for w in weights])
        quantize = kernel_ms(lambda x=x: ops.fake_quantize_e4m3(x, text, -1))
        multiply = kernel_ms(product)
        both = kernel_ms(lambda x=x: product(*ops.fake_quantize_e4m3(x, text, -1)))
        fast = kernel_ms(lambda x=x: product(*ops.fake_quantize_e4m3(x, text, -1), sums="fast"))
        yield {
            "linears": f"{model} {name}",
            "M": rows,
            "bf16 ms": plain,
            "fake_quantize": kernel_ms(lambda x=x: ops.fake_quantize(x, text, -1)),
            "quantize to E4M3": quantize,
            "expand + product": multiply,
            "both": both,
            "product / bf16": multiply / plain,
            "both / bf16": both / plain,
            "both, fast sums / bf16": fast / plain,
        }


def few(device: str, counts: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """Few rows times one packed weight beside a bfloat16 product; no weight is in the cache."""
    for width, channels in ((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048), (4096, 14336), (14336, 4096)):
        for rows, text in itertools.product(counts, ("mxint4@32", "mxfp4_e2m1@32", "mxint8@32")):
            if text != "mxint4@32" and (rows != 1 or width != 2048):
                continue
            x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)

            def plain(width=width, channels=channels) -> tuple[Tensor]:
                return (torch.randn(channels, width, device=device, dtype=torch.bfloat16),)

            def small(width=width, channels=channels, text=text) -> tuple[Tensor, Tensor]:
                return packed_weight(channels, width, text, device)

            wide = kernel_ms(rotating(plain, 2 * channels * width, lambda w, x=x: F.linear(x, w)))
            narrow = rotating(small, channels * width // 2, lambda c, s, x=x, t=text: ops.mx_linear(x, c, s, None, t))
            packed = kernel_ms(narrow)
            yield {
                "K×N": f"{width}×{channels}",
                "rows": rows,
                "format": text,
                "bf16 µs": wide * 1e3,
                "packed µs": packed * 1e3,
                "packed / bf16": packed / wide,
                "GB/s": channels * width * parse(text).bits_per_element / 8 / packed / 1e6,
            }


def together(device: str, counts: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """Few rows times all linears that read one input, none of them in the cache, by each way there is."""
    text = "mxint4@32"
    for (model, (name, width, channels)), rows in itertools.product(
        ((m, s) for m, shapes in SHAPES.items() for s in shapes), counts
    ):
        size = sum(channels) * width
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        codes, units = as_integers(x, text)
        payload, factors = ops.fake_quantize_e4m3(x, text, -1)

        def plain(width=width, channels=channels) -> tuple:
            return ([torch.randn(n, width, device=device, dtype=torch.bfloat16) for n in channels],)

        def small(width=width, channels=channels) -> tuple:
            return tuple(zip(*(packed_weight(n, width, text, device) for n in channels), strict=True))

        def wide(weights, x=x) -> None:
            for w in weights:
                F.linear(x, w)

        out = torch.empty(rows, sum(channels), device=device, dtype=torch.bfloat16)
        ways: dict[str, Callable[..., object]] = {
            "codes": lambda c, s, a=codes, u=units, o=out: in_integers(a, u, c, s, o, text),
            "E4M3, one by one": lambda c, s, p=payload, f=factors: ops.mx_linear_e4m3(
                p, f, list(c), list(s), [], text, torch.bfloat16
            ),
            "quantizer too": lambda c, s, x=x: ops.fake_quantize_linear(list(c), list(s), [], None, text, x, text, -1),
        }
        base = kernel_ms(rotating(plain, 2 * size, wide))
        found = {way: kernel_ms(rotating(small, size // 2, call)) for way, call in ways.items()}
        yield {
            "linears": f"{model} {name}",
            "rows": rows,
            "bf16 µs": base * 1e3,
            **{f"{way} µs": ms * 1e3 for way, ms in found.items()},
            **{f"{way} / bf16": ms / base for way, ms in found.items()},
            "codes GB/s": size * parse(text).bits_per_element / 8 / found["codes"] / 1e6,
        }


def as_integers(x: Tensor, text: str) -> tuple[Tensor, Tensor]:
    """Rows of `x`, rounded, as the product in integers takes them."""
    from mxfx.ops.kernels.packed_cuda import integers

    return integers("fake_quantize", x, text, -1)


def in_integers(x: Tensor, units: Tensor, codes: tuple, scales: tuple, out: Tensor, text: str) -> None:
    from mxfx.ops.kernels.integer_triton import multiply_integers

    multiply_integers(x, units, codes, scales, [], None, parse(text), out)


def tilings_of(width: int, rows: int) -> Iterator[Tiling]:
    """Those whose threads all have work, and registers for it."""
    from mxfx.ops.kernels.integer_triton import Tiling

    most = min(width // 32, 256)
    for channels, each, blocks, warps in itertools.product(
        (1, 2, 4, 8), (1, 2, 4, 8, 16), (most, most // 2, most // 4), (1, 2, 4, 8)
    ):
        of_a_thread = blocks // (32 * warps)
        if of_a_thread and each <= rows and (each > 1 or rows == 1) and each * channels * of_a_thread <= 64:
            yield Tiling(channels, each, blocks, warps)


def tilings(device: str, counts: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """The best five tilings of the product in integers for each of the 1B shape's inputs and each number of rows."""
    from mxfx.ops.kernels import integer_triton

    chosen, text = integer_triton.tiling_for, "mxint4@32"
    for (name, width, channels), rows in itertools.product(SHAPES["1B"], counts):
        size = sum(channels) * width
        codes, units = as_integers(torch.randn(rows, width, device=device, dtype=torch.bfloat16), text)
        out = torch.empty(rows, sum(channels), device=device, dtype=torch.bfloat16)
        sets = [[packed_weight(n, width, text, device) for n in channels] for _ in range(-(-2 * CACHE // size))]
        operands = itertools.cycle([tuple(zip(*s, strict=True)) for s in sets])

        def product(operands=operands, codes=codes, units=units, out=out) -> None:
            in_integers(codes, units, *next(operands), out, text)

        found: dict[Tiling, float] = {}
        for tiling in tilings_of(width, rows):
            integer_triton.tiling_for = lambda *_, tiling=tiling: tiling  # type: ignore[assignment]
            found[tiling] = kernel_ms(product, seconds=0.001)
        integer_triton.tiling_for = chosen
        now = kernel_ms(product, seconds=0.001)
        for tiling, ms in sorted(found.items(), key=lambda item: item[1])[:5]:
            yield {"linears": name, "rows": rows, "tiling": str(tiling), "µs": ms * 1e3, "chosen now": now * 1e3}


#: Quantizer of the linears that read one input, in D.
QUANTIZERS = {
    "q k v": "norm_quantize",
    "o": "transform_quantize",
    "gate up": "norm_quantize",
    "down": "silu_mul_quantize",
}
#: Channels, warps, blocks of a warp and stages of the product in integers on tensor cores.
TILES = (
    *((16, 8, 4, 3), (32, 4, 2, 3), (16, 4, 4, 3), (32, 4, 4, 3), (16, 8, 2, 4), (32, 8, 2, 3), (64, 4, 1, 4)),
    *((16, 4, 4, 5), (16, 16, 2, 3)),
)


def tiles(device: str, counts: tuple[int, ...], only: str | None, once: bool) -> Iterator[dict[str, object]]:
    """Each way to multiply few to 64 rows: µs, and results that differ from float64's rounded to bfloat16.

    `op` is what a graph of D calls, its quantizer in it; `late` is the same where no kernel starts early. `once`
    compiles and measures nothing.
    """
    from mxfx.ops.kernels.integer_mma_triton import Tiling, multiply_integer_tiles

    text, bf16 = "mxint4@32/mse", torch.bfloat16
    fmt = parse(text)
    for model, (name, width, outputs) in ((m, s) for m, shapes in SHAPES.items() for s in shapes):
        if only not in (None, name):
            continue
        size = sum(outputs) * width
        many = 1 if once else 2 + CACHE // size
        sets = [[packed_weight(n, width, text, device) for n in outputs] for _ in range(2 * many)]
        packed = [tuple([list(part) for part in zip(*s, strict=True)]) for s in sets]
        wide = [[torch.randn(n, width, device=device, dtype=bf16) for n in outputs] for _ in range(many)]
        definition = torch.cat([restore(c, s, fmt, width, torch.float32) for c, s in sets[0]]).double()
        gain, own = torch.ones(width, device=device, dtype=bf16), torch.randn(width // 32, 32, 32, device=device) / 6
        extra = {"norm_quantize": (gain, own.to(bf16), text, 1e-5), "silu_mul_quantize": (own.to(bf16), text)}
        for rows in counts:
            x = torch.randn(rows, width, device=device, dtype=bf16)
            codes, units = as_integers(x, text)
            payload, factors = ops.fake_quantize_e4m3(x, text, -1)
            wanted = (ops.fake_quantize(x, text, -1).double() @ definition.t()).to(bf16)
            out, residual = torch.empty_like(wanted), torch.zeros_like(wanted)
            turn = itertools.cycle(packed)
            quantizer = QUANTIZERS[name]
            given = (x, x) if quantizer == "silu_mul_quantize" else (x,)
            given += extra.get(quantizer, (own.to(bf16), text))
            op = getattr(ops, f"{quantizer}_linear")
            ways: dict[str, Callable[[tuple], object]] = {}
            if rows not in (2, 32):
                ways["op late"] = ways["op"] = lambda w, op=op, given=given, r=residual: op(*w, [], r, text, *given)
            if rows <= 8:
                ways["dp4a"] = lambda w, a=codes, u=units, o=out: in_integers(a, u, *w, o, text)
            if rows == 1:
                ways["dp4a late"] = ways["dp4a"]
            if rows > 4:
                ways["E4M3"] = lambda w, p=payload, f=factors: ops.mx_linear_e4m3(p, f, *w, [], text, bf16)
            for channels, warps, blocks, stages in TILES if rows > 2 else ():
                each = min(max(rows, 8), 32)
                if channels * blocks * each > 2048:
                    continue  # more sums than registers
                tiling = Tiling(channels, each, warps, blocks, stages)
                name_of = f"{channels}/{warps}/{blocks}/{stages}"
                ways[name_of] = lambda w, t=tiling, a=codes, u=units, o=out: multiply_integer_tiles(
                    a, u, *w, [], None, fmt, o, t
                )
            if once:
                for way, call in ways.items():
                    start_early(not way.endswith("late"))
                    call(packed[0])
                continue
            plain = itertools.cycle(wide)
            base = kernel_ms(lambda plain=plain, x=x: [F.linear(x, w) for w in next(plain)])
            row: dict[str, object] = {"linears": f"{model} {name}", "rows": rows, "bf16 µs": f"{base * 1e3:.2f}"}
            first: dict[str, Tensor] = {}
            for way, call in ways.items():
                start_early(not way.endswith("late"))
                found = call(packed[0])
                result = first[way] = out.clone() if found is None else found  # type: ignore[assignment]
                unlike = f" !{int(torch.ne(result, first['op late'] if way.startswith('op') else wanted).sum())}"
                ms = kernel_ms(lambda call=call, turn=turn: call(next(turn)))
                row[way] = f"{ms * 1e3:.2f} {ms / base:.2f}{unlike.replace(' !0', ' =')}"
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            yield row


def start_early(early: bool) -> None:
    """Whether kernels that can start while the one before them ends do so from here on."""
    from mxfx.ops.kernels import (
        early_triton,
        integer_mma_triton,
        integer_triton,
        norm_triton,
        skinny_triton,
        transform_triton,
    )

    early_triton.EARLY = early
    norm_triton._launch_scales.cache_clear()
    for module in (integer_triton, integer_mma_triton, norm_triton, skinny_triton, transform_triton):
        module._launch.cache_clear()


def norms(device: str, counts: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """µs of a norm, transform and rounding to integers, its factors found inside, or by a kernel before."""
    from mxfx.ops.kernels import packed_cuda

    kept = packed_cuda.FACTORS_INSIDE
    for width, rows in itertools.product((2048, 4096), counts):
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        own = (torch.randn(width // 32, 32, 32, device=device) / 6).to(torch.bfloat16)
        given = (x, torch.ones(width, device=device, dtype=x.dtype), own, "mxint4@32/mse", 1e-5)
        row: dict[str, object] = {"width": width, "rows": rows}
        for where, inside in (("inside", 1 << 20), ("before", 0)):
            packed_cuda.FACTORS_INSIDE = inside
            row[where] = kernel_ms(lambda given=given: packed_cuda.integers("norm_quantize", *given)) * 1e3
        packed_cuda.FACTORS_INSIDE = kept
        yield row


def main() -> None:
    parser = arguments_of("Products of MX operands beside bfloat16's")
    parser.add_argument("--part", nargs="*", default=["exact", "sums", "many", "few", "together"])
    parser.add_argument("--operands", type=Path, help="recorded operands for 'sums' (safetensors)")
    parser.add_argument("--linears", help="of 'tiles' only those: 'q k v', 'o', 'gate up' or 'down'")
    parser.add_argument("--once", action="store_true", help="'tiles' compiles its kernels, and measures nothing")
    parser.add_argument("--rehearse", action="store_true", help="'exact' alone, on the CPU: that it runs")
    arguments = parser.parse_args()
    device = "cpu" if arguments.rehearse else "cuda"
    if not arguments.rehearse:
        require_cuda()
    torch.manual_seed(0)
    parts: dict[str, Callable[[], Iterator[dict[str, object]]]] = {
        "exact": lambda: exact(device),
        "sums": lambda: sums(device, arguments.operands),
        "many": lambda: many(device, 2048 if arguments.quick else 16384),
        "together": lambda: together(device, (1, 16) if arguments.quick else (1, 2, 4, 8, 16)),
        "tilings": lambda: tilings(device, (1, 16) if arguments.quick else (1, 4, 16)),
        "tiles": lambda: tiles(
            device, (1, 8, 16) if arguments.quick else (1, 2, 4, 8, 16, 32, 64), arguments.linears, arguments.once
        ),
        "norms": lambda: norms(device, (1, 2, 4, 8, 16, 64)),
        "few": lambda: few(device, (1, 16) if arguments.quick else (1, 4, 8, 16, 64)),
    }
    rows: list[dict[str, object]] = []
    for name in ["exact"] if arguments.rehearse else arguments.part:
        found: list[dict[str, object]] = []
        try:
            found.extend(parts[name]())
        except Exception:
            traceback.print_exc()
        if name != "tiles":  # which prints its rows itself: they have not the same columns
            print(f"\n{name}\n{table(found)}", flush=True)
        rows += [{"part": name, **row} for row in found]
    print("  ".join(f"{k}={v}" for k, v in machine().items()))
    write({"rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
