"""What the instruments that stand around every run cost, on configuration A of the tutorial and SmolLM2.

    python -m tools.bench.instruments [--json FILE] [--quick]

Runs the same passes bare and with all instruments of `mxfx run --out` (dump, reproducer, ledger, numbers, verifier,
timing), emit stage and a probe of 2 x 64 tokens as in a run, best of five each (two with --quick), in turns. Figures
are seconds of processor time, which other processes hardly change. What the instruments cost is how much longer the
run is; the bar is 15 % of the passes, and the share of trace and passes together stands beside it. The rows below are
their hooks, whose sum may be larger: a weight that the dump hashes first is not hashed again by the pass that changes
it.
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
from mxfx.pipeline.manager import PASSES, PassManager
from mxfx.pipeline.probe import Probe
from mxfx.rewrite import Context
from tools import assets
from tools.bench.measuring import finish, options

CONFIG = Path(__file__).parents[2] / "passes_configs" / "tutorial_a_rtn.toml"
BAR = 0.15


def best(count: int, call: Callable[[], object]) -> float:
    def once() -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    return min(once() for _ in range(count))


def instrumented(program: Program, pipeline: Pipeline) -> tuple[float, dict[str, float]]:
    """Seconds of the passes with all instruments, and those of each instrument."""
    with tempfile.TemporaryDirectory() as folder:
        around = api.default_instruments(pipeline, Path(folder) / "ir", Path(folder) / "repro")
        started = time.process_time()
        time_of = PassManager(around).run(program, pipeline, Context(), probe=Probe(length=64)).time
        seconds = time.process_time() - started
    return seconds, {name: spent.processor_seconds for name, spent in time_of.items() if name != PASSES}


def main() -> None:
    args = options(__doc__ or "")
    count = 2 if args.quick else 5
    pipeline = api.load_pipeline(CONFIG).emitted()
    folder = assets.model_dir()
    meta, model = load_meta_model(folder), load_model(folder, pipeline.model.dtype)
    # The first trace imports much: an honest one is the second.
    tracing = best(2, lambda: trace(meta))
    traced = trace(meta)

    def fresh() -> Program:
        return bind(traced, model)

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
        {"what": "trace", "seconds": tracing, "of passes": "", "of both": tracing / compile_seconds},
        {"what": "passes", "seconds": min(bare), "of passes": 1.0, "of both": min(bare) / compile_seconds},
        *(
            {"what": what, "seconds": s, "of passes": s / min(bare), "of both": s / compile_seconds}
            for what, s in [("all instruments", extra), *((f"  {name}", s) for name, s in costs.most_common())]
        ),
    ]
    finish(rows, args.json)
    share = extra / min(bare)
    print(f"overhead {share:.1%} of the passes, bar {BAR:.0%}: {'held' if share < BAR else 'MISSED'}")


if __name__ == "__main__":
    main()
