"""Do the Triton kernels give the CPU's bits? `kernels.py` beside this says how fast they are.

    python -m tools.bench.gpu_check [--json FILE] [--quick]

A failure is collected, not raised, and the exit status says whether there was one.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from torch import Tensor

import mxfx.ops.kernels  # noqa: F401  (registers the ops)
from mxfx.algorithms.hadamard import hadamard_matrix, kronecker_orders
from mxfx.formats import FloatElement, Format, IntElement, ScaleRule, parse
from mxfx.ops import block_transform, hadamard, rope
from mxfx.ops import fused as definitions
from tools.bench import kernels
from tools.bench.measuring import options, require_cuda

ELEMENTS = ("mxint2", "mxint4", "mxint8", "mxfp4_e2m1", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2")
MAX_LINES = 25
#: Elements that two scales of equal error take further apart than a step.
RARE = 1e-4
ops = torch.ops.mxfx_kernels


class Report:
    """Counts checks and keeps the first failures."""

    def __init__(self) -> None:
        self.done = 0
        self.failures: list[str] = []

    def check(self, name: str, run: Callable[[], str | None]) -> None:
        self.done += 1
        try:
            complaint = run()
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            complaint = f"{type(error).__name__}: {' | '.join(lines[:2])[:300]}"
        if complaint:
            self.failures.append(f"{name}: {complaint}")

    def print(self) -> None:
        print(f"{self.done} checks, {len(self.failures)} failures")
        for line in self.failures[:MAX_LINES]:
            print("  FAIL", line)
        if len(self.failures) > MAX_LINES:
            print(f"  … {len(self.failures) - MAX_LINES} more")


def same_bits(x: Tensor, text: str, axis: int = -1) -> str | None:
    """Complaint unless the kernel equals the CPU reference, signs of zero included."""
    wanted = parse(text).fake_quantize(x, axis)
    got = ops.fake_quantize(_to_cuda(x), text, axis).cpu()
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"gives {got.shape} {got.dtype}, not {wanted.shape} {wanted.dtype}"
    equal = (got == wanted) & (torch.signbit(got) == torch.signbit(wanted)) | got.isnan() & wanted.isnan()
    if bool(equal.all()):
        return None
    places = (~equal).nonzero()
    first = tuple(places[0].tolist())
    start = first[-1] // 32 * 32
    return (
        f"{len(places)} of {x.numel()} differ; at {first}: x={x[first].item()!r} want={wanted[first].item()!r} "
        f"got={got[first].item()!r} amax of its 32={x[(*first[:-1], slice(start, start + 32))].abs().max().item()!r}"
    )


def _to_cuda(x: Tensor) -> Tensor:
    """On the GPU with the same strides, which `.cuda()` keeps only for dense tensors."""
    if x.is_contiguous():
        return x.cuda()
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    flat = torch.as_strided(x, (span,), (1,), x.storage_offset())
    return torch.as_strided(flat.cuda(), x.shape, x.stride(), 0)


def patterns(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All 65,536 bit patterns of a 16-bit type, in each role that an element can have in a block of 32."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    for position in (0, 17, 31):
        lone = torch.zeros(65536, 32, dtype=dtype)
        lone[:, position] = every
        yield f"alone at {position}", lone
    beside = torch.zeros(65536, 32, dtype=dtype)
    beside[:, 3], beside[:, 9], beside[:, 30] = every, 1.75, -0.4375
    yield "beside 1.75", beside
    noise = torch.randn(65536, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    noise[:, 12] = every
    yield "in noise", noise
    yield "mixed", every[torch.randperm(65536, generator=torch.Generator().manual_seed(2))].view(-1, 32)


def check_patterns(report: Report, dtype: torch.dtype, element: str) -> None:
    """Every bit pattern under every rule; `element` may name a minifloat."""
    texts = [element] if element.startswith("minifloat") else [f"{element}@32/{rule}" for rule in kernels.RULES]
    for role, x in patterns(dtype):
        for text in texts:
            report.check(f"{text} {dtype} {role}", lambda x=x, text=text: same_bits(x, text))


def check_values(report: Report, block: int, element: str) -> None:
    """Random blocks, ties, near ties, wild float32 bits, NaN and Inf here and there; a ragged last block."""
    generator = torch.Generator().manual_seed(block)
    wide = torch.randn(400, 4 * block, generator=generator)
    wide *= torch.exp2(torch.randint(-140, 120, (400, 1), generator=generator).float())
    ties = torch.randint(-64, 65, (400, 4 * block), generator=generator).float() / 8
    broken = torch.randn(400, 4 * block, generator=generator)
    broken[::5, 7], broken[1::5, 9], broken[2::5, 11] = float("nan"), float("inf"), -float("inf")
    bits = torch.randint(-(2**31), 2**31 - 1, (400, 4 * block), generator=generator).int().view(torch.float32)
    for rule in kernels.RULES if block == 32 else ("floor", "mse"):
        text = f"{element}@{block}/{rule}"
        for kind, x in (("wide", wide), ("ties", ties), ("broken", broken), ("ragged", wide[:, :-11].contiguous())):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                if (kind == "ragged" and rule != "mse") or (block != 32 and dtype == torch.float16):
                    continue
                cast = x.to(dtype)
                report.check(f"{text} {dtype} {kind}", lambda x=cast, text=text: same_bits(x, text))
        report.check(f"{text} float32 bits", lambda text=text: same_bits(bits, text))


def check_shapes(report: Report) -> None:
    base = torch.randn(3, 5, 4, 6, 64).to(torch.bfloat16)
    views = {
        "1-d": base.flatten()[:1000],
        "heads": base[0].transpose(0, 1),
        "4 strided axes": base.permute(3, 1, 0, 2, 4),
        "narrow": base[..., 3:35],
        "odd narrow": base[..., 1:50],
        "steps": base[:, ::2, 1:],
        "last stride 2": base[..., ::2],
        "empty": base[:0],
        "one": base[0, 0, 0, 0, :1],
        "expanded": base[:, :1].expand(3, 5, 4, 6, 64),
    }
    for name, text in itertools.product(views, ("mxint4@32/mse", "mxfp4_e2m1@20", "minifloat_e4m3")):
        report.check(f"{text} {name}", lambda x=views[name], text=text: same_bits(x, text))
    report.check("axis 1", lambda: same_bits(base[0], "mxint4@32/mse", 1))
    report.check("float64 falls back", lambda: same_bits(base.double(), "mxint4@32/mse"))
    report.check("64-bit offsets", _far_offsets)


def _far_offsets() -> str | None:
    free, _ = torch.cuda.mem_get_info()
    if free < 14 << 30:
        return f"needs 14 GiB of device memory, {free >> 30} are free"
    x = torch.zeros(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(256).to(torch.bfloat16)
    x[-256:] = tail.cuda()
    for view, name in ((x, "flat"), (x.view(-1, 64).T[:32].T, "strided")):
        wanted = parse("mxint4@32/mse").fake_quantize(view[-256:].cpu() if name == "flat" else view[-4:].cpu())
        got = ops.fake_quantize(view, "mxint4@32/mse", -1)[-len(wanted) :].cpu()
        if not torch.equal(got, wanted):
            return f"{name}: the last blocks of {view.numel()} elements are wrong"
    got = ops.hadamard(x.view(-1, 64), 64)[-4:].flatten()
    if not torch.equal(got, ops.hadamard(tail.cuda().view(-1, 64), 64).flatten()) or not got.any():
        return "the last blocks of a transform of as many are wrong"
    return None


def _near(got: Tensor, wanted: Tensor, fmt: Format, flips: float, slack: float) -> str | None:
    """Complaint unless all but a share `flips` of the elements are equal and each of those is one step away.

    A step is that of the coarser block where the two chose scales a factor of 2 apart, and a share `slack` of the
    block's largest element more. Two scales of equal error under `mse` differ further: the lower one saturates the
    largest element by as much as it gains on all n others, s²/12 - (s/2)²/12 each, so by s √n / 4, and the higher one
    may have rounded it by s / 2; s is half of the step below. That is `RARE`.
    """
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"gives {got.shape} {got.dtype}, not {wanted.shape} {wanted.dtype}"
    got, wanted = got.double(), wanted.double()
    if not torch.equal(got.isnan(), wanted.isnan()):
        return f"NaN at {int(got.isnan().sum())} places instead of {int(wanted.isnan().sum())}"
    got, wanted = got.nan_to_num(), wanted.nan_to_num()
    share = (got != wanted).double().mean().item()
    larger = torch.maximum(got.abs(), wanted.abs())
    blocks = larger.unflatten(-1, (-1, fmt.block))
    largest = blocks.amax(-1, keepdim=True)
    scale = torch.exp2(largest.clamp_min(1e-30).log2().floor() - fmt.element.max_exponent + 1)
    step = scale.expand_as(blocks)
    if isinstance(fmt.element, FloatElement):
        binade = torch.exp2((blocks / scale).clamp_min(1e-30).log2().floor().clamp_min(fmt.element.min_exponent))
        step = 2 * scale * binade * 2.0**-fmt.element.mantissa_bits
    off, slack_of_block = (got - wanted).abs(), (slack * largest).expand_as(blocks).flatten(-2)
    step = step.flatten(-2)
    far = int((off > step + slack_of_block).sum())
    if isinstance(fmt.element, IntElement) and fmt.rule is ScaleRule.MSE and far <= RARE * off.numel():
        far = int((off > step * max(1.0, fmt.block**0.5 / 8 + 0.25) + slack_of_block).sum())
    return None if share <= flips and not far else f"{share:.2e} of the elements differ, {far} by more than a step"


def check_fused(report: Report, dtype: torch.dtype, block: int, name: str, half: int) -> None:
    """Fused kernels against their definitions on the CPU; a product rounded elsewhere may flip a code."""
    width = block * 8
    x, gate = torch.randn(97, width).to(dtype), torch.randn(97, width).to(dtype)
    # Neighbours of a block that is not finite stay as they are.
    broken = _broken(x, (5, 3), (9, block + 1))
    weight = torch.rand(width).to(dtype)
    shared = hadamard_matrix(block)
    own = torch.randn(8, block, block) / block**0.5
    heads = torch.randn(2, 33, 3, 2 * block).to(dtype).transpose(1, 2)
    heads_broken = _broken(heads, (0, 1, 7, 2), (1, 2, 30, block))
    angle = torch.randn(2, 33, 2 * block).to(dtype)
    headed = torch.randn(3, 2, block, block) / block**0.5
    wide = torch.randn(2, 9, 6, 2 * block).to(dtype).transpose(1, 2)
    wide_broken = _broken(wide, (0, 1, 7, 2), (1, 2, 3, block))
    cases = {
        "H": ("transform_quantize", (broken, shared, name, True)),
        "T shared": ("transform_quantize", (broken, own[0], name, False)),
        "T own": ("transform_quantize", (broken, own, name, False)),
        "T own, x's dtype": ("transform_quantize", (broken, own.to(dtype), name, False)),
        "T per head": ("transform_quantize", (wide_broken, headed, name, False)),
        "T per head, contiguous": ("transform_quantize", (wide.contiguous(), headed, name, False)),
        "T own, many rows": ("transform_quantize", (torch.randn(1000, width).to(dtype), own.to(dtype), name, False)),
        "H, whole tiles": ("transform_quantize", (torch.randn(1024, width).to(dtype), shared, name, True)),
        "T own strided": ("transform_quantize", (torch.stack((broken, gate), 1)[:, 1], own, name, False)),
        "silu H": ("silu_mul_quantize", (gate, broken, shared, name, True)),
        "silu T": ("silu_mul_quantize", (gate, broken, own, name, False)),
        "silu": ("silu_mul_quantize", (gate, broken, None, name, False)),
        "norm": ("norm_quantize", (broken, weight, None, name, 1e-5)),
        "norm H": ("norm_quantize", (broken, weight, shared, name, 1e-5, 0.0, False, True)),
        "norm T own, gain first": ("norm_quantize", (x, weight, own, name, 1e-5, 1.0, True, False)),
        "norm T own": ("norm_quantize", (broken, weight, own, name, 1e-5)),
        "norm T own without gain": ("norm_quantize", (x, None, own, name, 1e-5)),
        "norm without gain": ("norm_quantize", (x, None, shared, name, 1e-5, 0.0, False, True)),
        "rope": ("rope_quantize", (heads_broken, angle, angle, None, name, False)),
        "rope H": ("rope_quantize", (heads_broken, angle, angle, shared, name, True)),
        "rope T per head": ("rope_quantize", (heads_broken, angle, angle, headed, name, False)),
        "rope one head": (
            "rope_quantize",
            (wide[:1, :1].contiguous(), angle[:1, :9], angle[:1, :9], None, name, False),
        ),
        "rope one batch, contiguous": (
            "rope_quantize",
            (wide[:1, :3].contiguous(), angle[:1, :9], angle[:1, :9], headed, name, False),
        ),
        "rope one batch": ("rope_quantize", (heads_broken, angle[:1], angle[:1], shared, name, True)),
    }
    for case, (op, args) in list(cases.items())[half::2]:
        report.check(f"{case} {name} {dtype} block {block}", lambda op=op, args=args: _same_op(op, args))
    if half:
        return
    report.check(f"rope {dtype} block {block}", lambda: _same_rope(heads, angle))
    report.check(f"T per head {dtype} block {block}", lambda: _same_product(wide_broken, headed))


def check_high_orders(report: Report, dtype: torch.dtype) -> None:
    """Hadamard transforms of a whole row of current models, alone and with a quantizer behind them."""
    for width, order in ((576, 576), (1536, 1536), (2048, 512), (8192, 8192), (14336, 14336)):
        x = _broken(torch.randn(3, 7, width).to(dtype), (0, 1, 5), (2, 3, 1))
        report.check(f"hadamard {order} {dtype}", lambda x=x, order=order: _same_hadamard(x, order))
        right = kronecker_orders(order)[1]
        name = f"mxint4@{32 if right % 32 == 0 and right & (right - 1) == 0 else right}/mse"
        report.check(f"hadamard {order} {name} {dtype}", lambda a=(x, order, name): _same_op("hadamard_quantize", a))


def _same_hadamard(x: Tensor, order: int) -> str | None:
    wanted, got = hadamard(x.double(), order), ops.hadamard(_to_cuda(x), order).cpu().double()
    # What is not finite may be infinite in one and NaN in the other.
    if not torch.equal(got.isfinite(), wanted.isfinite()):
        return f"not finite at {int((~got.isfinite()).sum())} places instead of {int((~wanted.isfinite()).sum())}"
    got, wanted = torch.where(got.isfinite(), got, 0), torch.where(wanted.isfinite(), wanted, 0)
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    return None if error < torch.finfo(x.dtype).eps + 1e-6 else f"off by {error:.1e} of the largest"


def _broken(x: Tensor, nan: tuple[int, ...], infinite: tuple[int, ...]) -> Tensor:
    """`x`, strides kept, with NaN in one place and infinity in another."""
    x = x.clone()
    x[nan], x[infinite] = float("nan"), float("inf")
    return x


def _same_rope(x: Tensor, angle: Tensor) -> str | None:
    wanted, got = rope(x, angle, angle), ops.rope(_to_cuda(x), angle.cuda(), angle.cuda()).cpu()
    near = torch.allclose(got, wanted, rtol=1e-6, atol=1e-6) if x.dtype == torch.float32 else torch.equal(got, wanted)
    return None if near else f"{int((got != wanted).sum())} of {x.numel()} differ"


def _same_product(x: Tensor, matrix: Tensor) -> str | None:
    """A product against one in float64: off by no more than two roundings of the dtype."""
    wanted = block_transform(x.double(), matrix.double())
    got = ops.block_transform(_to_cuda(x), matrix.cuda()).cpu()
    if not torch.equal(got.isfinite(), wanted.isfinite()):
        return f"not finite at {int((~got.isfinite()).sum())} places instead of {int((~wanted.isfinite()).sum())}"
    got, wanted = (torch.where(t.isfinite(), t, 0) for t in (got.double(), wanted))
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    return None if error < 2 * torch.finfo(x.dtype).eps + 1e-6 else f"off by {error:.1e} of the largest"


def _same_op(op: str, args: tuple) -> str | None:
    wanted = getattr(definitions, op)(*args)
    on_cuda = [_to_cuda(a) if isinstance(a, Tensor) else a for a in args]
    fmt = next(parse(a) for a in args if isinstance(a, str))
    # Products and sums in 16 bits round alike everywhere. Sums of other lengths and `exp` differ in the last place of
    # float32, which flips a result in 16 bits now and then and with it, on a fine grid, a code.
    flips, slack = 0.02, 0.0
    if op == "rope_quantize" and args[3] is None and wanted.dtype != torch.float32:
        flips = 0.0
    if op == "norm_quantize" and args[2] is not None and args[2].dim() == 3:
        # The norm meets the product in float32; the definition rounds it twice before.
        flips, slack = 0.08, torch.finfo(wanted.dtype).eps
    return _near(getattr(ops, op)(*on_cuda).cpu(), wanted, fmt, flips, slack)


def check_compiled(report: Report) -> None:
    x = torch.randn(64, 256, device="cuda").to(torch.bfloat16)
    matrix = hadamard_matrix(32, torch.float32, x.device)

    def chain(x: Tensor) -> Tensor:
        return ops.transform_quantize(ops.fake_quantize(x, "mxint8@32", -1) * 2, matrix, "mxint4@32/mse", True)

    wanted = chain(x)

    def compiled() -> str | None:
        function = torch.compile(chain, fullgraph=True, dynamic=True)
        other = torch.cat((x, x))
        good = torch.equal(function(x), wanted) and torch.equal(function(other), chain(other))
        return None if good else "compiled result differs"

    def captured() -> str | None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(x)
        graph.replay()
        return None if torch.equal(out, wanted) else "replayed result differs"

    report.check("torch.compile(fullgraph=True, dynamic=True)", compiled)
    report.check("CUDA graph", captured)


def check_cases(report: Report, part: int, parts: int) -> None:
    """Each case of the benchmark runs; what it compiles is in the cache when it is timed."""
    x = torch.randn(kernels.SIZE, kernels.SIZE, device="cuda").to(torch.bfloat16)
    cases = [*kernels.quantizers(x, quick=False), *kernels.fused(x)]

    def runs(call: Callable[[], object]) -> str | None:
        out = call()
        assert isinstance(out, Tensor)
        return None if bool(out.isfinite().all()) else "gives NaN or Inf"

    for name, call, _ in cases[part::parts]:
        report.check(name, lambda call=call: runs(call))


def tasks(quick: bool) -> list[tuple[Callable[..., None], tuple]]:
    """All checks, cut so that each compiles a few kernels."""
    dtypes, elements = (torch.bfloat16, torch.float16), ELEMENTS
    blocks: tuple[int, ...] = (16, 20, 32, 36, 64, 100, 128)
    minifloats: tuple[str, ...] = ("minifloat_e4m3", "minifloat_e3m4", "minifloat_e5m10")
    formats = [(torch.bfloat16, b, f"mxint4@{b}/mse") for b in (32, 128)]
    formats += [(torch.bfloat16, b, f"mxfp8_e4m3@{b}") for b in (32, 36)]
    formats += [(torch.float16, 64, "mxfp8_e4m3@16"), (torch.float32, 32, "mxint4@32/mse")]
    if quick:
        elements, minifloats, blocks = ("mxint4", "mxfp8_e4m3"), ("minifloat_e4m3",), (20, 128)
    else:
        formats += [(torch.bfloat16, b, f"mxint4@{b}/mse") for b in (16, 36, 64)]
        formats += [(torch.bfloat16, b, f"mxfp8_e4m3@{b}") for b in (16, 64, 128)]
        formats += [(torch.bfloat16, 64, "mxint4@16"), (torch.float32, 128, "mxint8@128")]
        formats += [(torch.float16, 32, "mxint4@32/mse")]
    found: list[tuple[Callable[..., None], tuple]] = [(check_compiled, ()), (check_shapes, ())]
    found += [(check_fused, (*each, half)) for each in formats for half in range(2)]
    found += [(check_high_orders, (dtype,)) for dtype in (*dtypes, torch.float32)]
    found += [(check_cases, (part, 8)) for part in range(8)]
    found += [(check_patterns, pair) for pair in itertools.product(dtypes, elements + minifloats)]
    found += [(check_values, (b, e)) for b, e in itertools.product(blocks, elements) if b == 32 or e in ELEMENTS[1:7:2]]
    return found


def work(task: tuple[Callable[..., None], tuple]) -> Report:
    """One task in a process of its own: the checks are many small compilations."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    check, arguments = task
    report = Report()
    check(report, *arguments)
    return report


def run_checks(quick: bool) -> Report:
    total = Report()
    workers = max(min((os.cpu_count() or 2) - 2, 12), 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(work, task): task for task in tasks(quick)}
        for future in as_completed(pending):
            check, arguments = pending[future]
            try:
                report = future.result()
            except Exception as error:
                total.failures.append(
                    f"{check.__name__}{arguments}: worker: {type(error).__name__}: {str(error)[:200]}"
                )
                continue
            total.done += report.done
            total.failures += report.failures
    return total


def main() -> None:
    arguments = options("Do the Triton kernels give the CPU's bits?")
    require_cuda()
    start = time.perf_counter()
    report = run_checks(arguments.quick)
    report.print()
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"checks": report.done, "failures": report.failures}, indent=1) + "\n")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
