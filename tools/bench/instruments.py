"""What the instruments that stand around every run cost, on configuration A of the tutorial and SmolLM2.

    python -m tools.bench.instruments [--json FILE] [--quick]

Runs the same passes bare and with all instruments of `mxfx run --out` (dump, reproducer, ledger, numbers, verifier,
timing), best of five each (two with --quick), in turns. Figures are seconds of processor time, which other processes
hardly change; shares are of the bare compile: trace and passes, nothing evaluated. What the instruments cost is how
much longer the run is; the bar is 15 %. The rows below it are their hooks in wall seconds, whose sum may be larger: a
weight that the dump hashes first is not hashed again by the pass that changes it.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mxfx import api
from mxfx.config import Pipeline
from mxfx.driver.pretrained import load_meta_model, load_model
from mxfx.graph.program import Program
from mxfx.graph.trace import bind, trace
from mxfx.pipeline.manager import Instrument, PassManager, Run
from mxfx.rewrite import Context
from tools import assets
from tools.bench.measuring import finish, options

CONFIG = Path(__file__).parents[2] / "passes_configs" / "tutorial_a_rtn.toml"
BAR = 0.15


class Costs(Instrument):
    """Keeps what the manager measured of each instrument."""

    seconds: dict[str, float]

    def exit(self, run: Run) -> None:
        self.seconds = dict(run.costs)


def best(count: int, call: Callable[[], object]) -> float:
    def once() -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    return min(once() for _ in range(count))


def instrumented(program: Program, pipeline: Pipeline) -> tuple[float, dict[str, float]]:
    """Seconds of the passes with all instruments, and those of each instrument."""
    costs = Costs()
    with tempfile.TemporaryDirectory() as folder:
        manager = PassManager([costs, *api.default_instruments(pipeline, Path(folder) / "ir", Path(folder) / "repro")])
        started = time.process_time()
        manager.run(program, pipeline, Context())
        return time.process_time() - started, costs.seconds


def main() -> None:
    args = options(__doc__ or "")
    count = 2 if args.quick else 5
    pipeline = api.load_pipeline(CONFIG)
    folder = assets.model_dir()
    meta, model = load_meta_model(folder), load_model(folder)
    tracing = best(1, lambda: trace(meta))

    def fresh() -> Program:
        return bind(trace(meta), model)

    bare, full, costs = [], [], Counter[str]()
    for _ in range(count):
        # A fresh program each time: hashes of weights are cached in its store.
        program = fresh()
        started = time.process_time()
        PassManager().run(program, pipeline, Context())
        bare.append(time.process_time() - started)
        seconds, parts = instrumented(fresh(), pipeline)
        full.append(seconds)
        costs = Counter(parts) if seconds == min(full) else costs
    compile_seconds = tracing + min(bare)
    extra = min(full) - min(bare)
    rows: list[dict[str, object]] = [
        {"what": "trace", "seconds": tracing, "share": tracing / compile_seconds},
        {"what": "passes", "seconds": min(bare), "share": min(bare) / compile_seconds},
        {"what": "all instruments", "seconds": extra, "share": extra / compile_seconds},
    ]
    rows += [{"what": f"  {name}", "seconds": s, "share": s / compile_seconds} for name, s in costs.most_common()]
    finish(rows, args.json)
    share = extra / compile_seconds
    print(f"overhead {share:.1%}, bar {BAR:.0%}: {'held' if share < BAR else 'MISSED'}")


if __name__ == "__main__":
    main()
