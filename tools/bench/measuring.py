"""What all benchmarks share: the machine's name, a median, a table, a JSON file."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
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
    """Median milliseconds of `call` on the GPU, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=25, rep=rep, return_mode="median"))


def options(description: str) -> argparse.Namespace:
    """The command line of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="write a plot to this file")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
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
    about = machine()
    print("  ".join(f"{k}={v}" for k, v in about.items()))
    print(table(rows))
    if target is not None:
        target.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
