"""What GPTQ of large models takes on 1, 8 and 64 GPUs, on paper: seconds, memory, and what bounds each.

    python -m tools.bench.scale [--samples 512] [--length 2048] [--json FILE]

A model is the sizes of its products; a machine is a handful of rates. On a CUDA device the rates are measured at once;
without one they are those of an H100, and the line says of each whether it was measured there or is assumed. The 1B and
8B rows are there to be held against ``tools.bench.gptq``. Every rank runs its share of the samples and rounds its share
of rows or experts; each factorizes every Hessian that linears share; Hessians are added up by all ranks for all. Copies
hide behind the forward pass and the second moments, so of these a layer takes the longer, and the solver comes behind;
where all fits on the GPU there are no copies. Where activations wait on the host, gate and up run twice
if that is faster than the way of what they give (``mxfx.calibration.schedule``); pinning what waits is paid once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mxfx.algorithms.gptq_solver import PANEL
from mxfx.calibration.estimate import solver_bytes
from mxfx.calibration.schedule import WHILE_A_BYTE_TRAVELS
from tools.bench.measuring import finish

_BLOCK = 32
_GPUS = (1, 8, 64)
_PER_HOST = 8
#: Bytes of a GPU of 80 GB that a run may take; what is beyond waits on the host.
_ROOM = 68e9


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor: columns, rows together; of ``experts`` each token takes ``active``."""

    columns: int
    rows: int
    experts: int = 1
    active: int = 1


@dataclass(frozen=True)
class Shape:
    """A decoder: layers that are alike, the width of its residual stream, a layer's groups.

    ``gated`` is the group of gate and up, whose result the last group reads, where one matrix makes it.
    """

    layers: int
    hidden: int
    groups: tuple[Group, ...]
    gated: Group | None = None

    @property
    def weights(self) -> int:
        """Of one layer."""
        return sum(g.columns * g.rows * g.experts for g in self.groups)


def _llama(layers: int, hidden: int, intermediate: int, keys: int) -> Shape:
    qkv, gated = Group(hidden, hidden + 2 * keys), Group(hidden, 2 * intermediate)
    return Shape(layers, hidden, (qkv, Group(hidden, hidden), gated, Group(intermediate, hidden)), gated)


_SHAPES = {
    "1B": _llama(16, 2048, 8192, 512),
    "8B": _llama(32, 4096, 14336, 1024),
    "70B": _llama(80, 8192, 28672, 1024),
    # DeepSeek-V3, its three dense layers taken for layers of experts.
    "671B": Shape(
        61,
        7168,
        (
            Group(7168, 2112),
            Group(1536, 24576),
            Group(512, 32768),
            Group(16384, 7168),
            Group(7168, 4096),
            Group(2048, 7168),
            Group(7168, 4096, 256, 8),
            Group(2048, 7168, 256, 8),
        ),
    ),
}


@dataclass(frozen=True)
class Rates:
    """Of one GPU, in units of a second: operations in bf16, float32 and float64, bytes of memory, to the host, of host
    memory pinned, to other GPUs of the host and of others; seconds of a launch.
    """

    products: float = 760e12
    single: float = 45e12
    wide: float = 25e12
    memory: float = 2.9e12
    pinned: float = 2.4e9
    host: float = 50e9
    peers: float = 350e9
    hosts: float = 45e9
    launch: float = 60e-6


_SOURCES = {
    "products": "measured",
    "memory": "measured",
    "pinned": "measured",
    **dict.fromkeys(("single", "wide", "host", "peers", "hosts", "launch"), "assumed"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates, sources = (
        (_measured(), {**_SOURCES, **dict.fromkeys(("single", "wide", "host"), "measured")})
        if torch.cuda.is_available()
        else (Rates(), _SOURCES)
    )
    print("rates: " + ", ".join(f"{name} {getattr(rates, name):.3g} ({sources[name]})" for name in vars(rates)))
    rows = [
        predicted(name, shape, gpus, args.samples * args.length, args.batch_size * args.length, rates)
        for name, shape in _SHAPES.items()
        for gpus in _GPUS
    ]
    finish(rows, args.json)


def predicted(name: str, shape: Shape, gpus: int, tokens: int, batch: int, rates: Rates) -> dict[str, object]:
    """Seconds of the whole model, what bounds a layer, and bytes on a GPU and on a host."""
    widest = max(g.columns for g in shape.groups)
    solving = max(solver_bytes(g.rows, g.columns) for g in shape.groups)
    sums = max((g.experts * 4 * g.columns**2 for g in shape.groups if g.experts > 1), default=0)
    weights = 2 * shape.weights
    device = max(solving + min(sums, 24 << 30) + weights / 2, 8 * batch * widest * 2 + weights)
    # Of each token one residual comes while another goes, beside what attention gives.
    waiting = 2 * tokens * (3 * shape.hidden + (0 if _runs_twice(shape) else widest)) / gpus
    elsewhere = device + 2 * tokens * (3 * shape.hidden + widest) / gpus > _ROOM
    parts = layer_seconds(shape, gpus, tokens, rates, elsewhere)
    copies = parts.pop("copies")
    stream = parts["forward"] + parts["grams"]
    arithmetic = sum(parts.values())
    layer = arithmetic - stream + max(stream, copies)
    pinning = waiting / rates.pinned if elsewhere else 0.0
    # What hides behind something longer bounds nothing.
    hidden = ("forward", "grams") if copies > stream else ("copies",)
    costs = {part: seconds for part, seconds in [*parts.items(), ("copies", copies)] if part not in hidden}
    bound = max(costs, key=lambda part: costs[part])
    return {
        "model": name,
        "GPUs": gpus,
        "s": shape.layers * layer + pinning,
        "s a layer": layer,
        "s of pinning": pinning,
        "bound by": bound,
        **{f"{part} %": 100 * seconds / arithmetic for part, seconds in parts.items()},
        "copies %": 100 * copies / arithmetic,
        "GB a GPU": device / 1e9,
        "activations": "host" if elsewhere else "device",
        "GB a host of them": waiting * min(gpus, _PER_HOST) / 1e9,
    }


def _runs_twice(shape: Shape) -> bool:
    """Whether gate and up do: operations for a byte of what waits, which is half as wide as their rows."""
    return shape.gated is not None and 2 * shape.gated.columns <= WHILE_A_BYTE_TRAVELS["cuda"]


def layer_seconds(shape: Shape, gpus: int, tokens: int, rates: Rates, elsewhere: bool) -> dict[str, float]:
    """Of one layer on each of the GPUs, by what they are spent on; ``elsewhere``: activations wait on the host."""
    mine = tokens / gpus
    again = shape.gated if elsewhere and _runs_twice(shape) else None
    products = [*shape.groups, *([again] if again else [])]
    forward = sum(2 * mine * g.active * g.columns * g.rows for g in products) / rates.products
    # Half of the products of a symmetric matrix, and what of the panels on its diagonal is not needed.
    grams = sum(mine * g.active * g.columns * (g.columns + min(2048, g.columns)) for g in shape.groups) / rates.products
    # Factor and inverse, a third of n³ multiplications and additions each; of experts, each rank has its own.
    factors = sum(4 / 3 * g.columns**3 * _mine(g, gpus) for g in shape.groups) / rates.wide
    rounding = 0.0
    for g in shape.groups:
        rows = g.rows * _mine(g, gpus) / (1 if g.experts > 1 else gpus)
        # Behind each panel half of the columns on average are read and written in float32; losses of rows in TF32.
        feedback = max(rows * g.columns**2 / rates.single, 4 * g.columns / PANEL * rows * g.columns / rates.memory)
        launches = g.columns / _BLOCK * rates.launch * (_mine(g, gpus) if g.experts > 1 else 1)
        rounding += max(feedback, launches) + 4 * rows * g.columns**2 / (rates.products / 2)
    link = rates.peers if gpus <= _PER_HOST else rates.hosts
    # Each rank adds up its share and gives it to all.
    sums = sum(4 * g.columns**2 * g.experts for g in shape.groups) * 2 * (gpus - 1) / gpus / link
    # Up: the residual for q, k, v, with what attention gave for o, for gate and up, and for down with what it reads.
    wide = 0 if again else max(g.columns * g.active for g in shape.groups)
    copies = (2 * mine * (5 * shape.hidden + wide) if elsewhere else 0) / rates.host + 2 * shape.weights / rates.host
    return {
        "forward": forward,
        "grams": grams,
        "factors": factors,
        "rounding": rounding,
        "sums": sums,
        "copies": copies,
    }


def _mine(group: Group, gpus: int) -> float:
    """Of the group's Hessians, how many one GPU factorizes."""
    return max(1.0, group.experts / gpus)


def _measured() -> Rates:
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(8192, 8192, device="cuda", dtype=torch.float64)
    positive = wide @ wide.mT + 8192 * torch.eye(8192, device="cuda", dtype=torch.float64)
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device="cuda")
    eye = torch.eye(8192, device="cuda", dtype=torch.float64)
    plain = wide.float()

    def factorize() -> None:
        torch.linalg.solve_triangular(torch.linalg.cholesky_ex(positive)[0], eye, upper=False)

    return Rates(
        products=2 * 8192**3 / _seconds(lambda: x @ x),
        single=2 * 8192**3 / _seconds(lambda: plain @ plain),
        # The inverse of a whole matrix: three times what the slabs of the solver need.
        wide=(1 / 3 + 1) * 8192**3 / _seconds(factorize),
        memory=2 * x.nbytes / _seconds(lambda: x.clone()),
        host=len(host) / _seconds(lambda: there.copy_(host, non_blocking=True)),
    )


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
