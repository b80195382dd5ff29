"""What all benchmarks share: the machine's name, a median, a table, a JSON file."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """Device and versions that a figure belongs to."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        import triton

        found |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": triton.__version__}
    return found


def median_ms(call: Callable[[], object], rep: int = 100) -> float:
    """Median milliseconds of `call` on the GPU, the L2 cache flushed before each run; launches included."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=25, rep=rep, return_mode="median"))


def kernel_ms(call: Callable[[], object], replays: int = 7, seconds: float = 0.004) -> float:
    """Median milliseconds of what `call` runs on the GPU, launches left out.

    A CUDA graph holds `call` a few times and is replayed. The operands of one call have to exceed the L2 cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
        once = _elapsed(call)
        repeats = max(2, min(50, round(seconds * 1e3 / max(once, 1e-3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                call()
        graph.replay()
        found = sorted(_elapsed(graph.replay) / repeats for _ in range(replays))
    torch.cuda.current_stream().wait_stream(stream)
    return found[len(found) // 2]


def host_us(call: Callable[[], object], count: int = 200) -> float:
    """Microseconds that the host needs to launch `call`, the GPU not waited for; for calls on small tensors."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    took = time.perf_counter() - start
    torch.cuda.synchronize()
    return took / count * 1e6


def _elapsed(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def arguments_of(description: str) -> argparse.ArgumentParser:
    """What the command line of every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
    return parser


def options(description: str, *, rehearsal: bool = False) -> argparse.Namespace:
    """The command line of a benchmark; with `rehearsal` it can also run small, on a CPU, to see that it runs."""
    parser = arguments_of(description)
    if rehearsal:
        parser.add_argument(
            "--rehearse", action="store_true", help="everything once, tiny, on the CPU; times say nothing"
        )
    return parser.parse_args()


def require_cuda() -> None:
    if not torch.cuda.is_available():
        sys.exit("this benchmark measures a CUDA device and finds none")


def table(rows: list[dict[str, object]]) -> str:
    """Rows with the same keys as aligned text."""
    if not rows:
        return "(nothing measured)"
    cells = [list(rows[0]), *([_cell(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def finish(rows: list[dict[str, object]], target: Path | None) -> None:
    """Print the machine and the table; write JSON where asked."""
    print("  ".join(f"{k}={v}" for k, v in machine().items()))
    print(table(rows))
    write({"rows": rows}, target)


def write(found: Mapping[str, object], target: Path | None) -> None:
    """`found`, with the machine, as JSON where asked."""
    if target is not None:
        target.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
