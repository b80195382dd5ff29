"""How long a saved model takes from a new process to its first logits, beside the float folder that it was made from.

    python -m tools.bench.opening SAVED --float DIR [--repeat 5] [--device cpu] [--tokens 32] [--json FILE]

Both are opened by `AutoModelForCausalLM.from_pretrained`, the float folder in float32 and in bfloat16, each time in a
new process, taking turns, files in the system's cache. Seconds are medians: `import` is the libraries, `open` is
`from_pretrained`, `first` the first logits of a prompt, `again` those of a second call; `peak MB` the most that the
process ever held in memory. `MB` is the folder on disk. Behind the seconds of the clock stand those of the processor,
which others' load disturbs least: `cpu open + first`, and `cpu all` with the imports.

What the emit stage makes of a folder is kept in the user's cache. `saved by mxfx` reads it; `saved by mxfx, the first
time` is given an empty cache in each run, but for the C kernels, which are built once a machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from mxfx.ground.files import cache_home
from tools.bench.measuring import arguments_of, machine, table, write

_OPENS = """
import json, resource, sys, time
folder, dtype, device, tokens, saved = sys.argv[1:]
start, busy = time.perf_counter(), time.process_time()
import torch, transformers
if saved == "True":
    import mxfx
imported, ready = time.perf_counter(), time.process_time()
options = {} if dtype == "-" else {"dtype": getattr(torch, dtype)}
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).to(device).eval()
opened = time.perf_counter()
ids = torch.arange(3, 3 + int(tokens), device=device)[None]
def run():
    with torch.no_grad():
        return float(model(ids).logits.float().sum())
run()
first, done = time.perf_counter(), time.process_time()
run()
again = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"import": imported - start, "open": opened - imported, "first": first - opened,
                  "again": again - first, "cpu open + first": done - ready, "cpu all": done - busy, "peak MB": peak}))
"""

_FIRST = "saved by mxfx, the first time"
_BUSY = "cpu open + first"


def main() -> None:
    args = _arguments()
    about = machine() | {"transformers": transformers.__version__}
    print("  ".join(f"{k}={v}" for k, v in about.items()), flush=True)
    ways = {
        "float folder, float32": (args.float, "float32", False),
        "float folder, bfloat16": (args.float, "bfloat16", False),
        "saved by mxfx": (args.saved, "-", True),
        _FIRST: (args.saved, "-", True),
    }
    _opened(args.saved, "-", True, args)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(args.repeat):
        for name, (folder, dtype, saved) in ways.items():
            if name != _FIRST:
                runs[name].append(_opened(folder, dtype, saved, args))
                continue
            with tempfile.TemporaryDirectory() as empty:
                if (cache_home() / "kernels").is_dir():
                    (Path(empty) / "kernels").symlink_to((cache_home() / "kernels").resolve())
                runs[name].append(_opened(folder, dtype, saved, args, os.environ | {"MXFX_CACHE": empty}))
    rows: list[dict[str, object]] = []
    for name, (folder, _, _) in ways.items():
        seconds = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
        ready = seconds["open"] + seconds["first"]
        base, busy = (
            float(rows[0][key]) if rows else own for key, own in (("open + first", ready), (_BUSY, seconds[_BUSY]))
        )  # type: ignore[arg-type]
        size = sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file()) / 1e6
        over = {"over float32": ready / base, "cpu over float32": seconds[_BUSY] / busy}
        rows.append({"model": name, **seconds, "open + first": ready, **over, "MB": size})
    print(table(rows))
    write({"rows": rows, "runs": runs}, args.json)


def _opened(
    folder: Path, dtype: str, saved: bool, args: argparse.Namespace, environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    call = [sys.executable, "-c", _OPENS, str(folder), dtype, args.device, str(args.tokens), str(saved)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{folder} does not open:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _arguments() -> argparse.Namespace:
    parser = arguments_of("Opening a saved model, from a new process to its first logits")
    parser.add_argument("saved", type=Path, help="folder that mxfx saved")
    parser.add_argument("--float", type=Path, required=True, help="folder of the model that it was made from")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
