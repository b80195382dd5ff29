"""How long a saved model takes from a new process to its first logits, beside the float folder that it was made from.

    python -m tools.bench.opening SAVED --float DIR [--repeat 5] [--device cpu cuda] [--tokens 32] [--json FILE]

Both are opened by `AutoModelForCausalLM.from_pretrained`, the float folder in float32 and in bfloat16, each time in a
new process, taking turns, files in the system's cache. Seconds are medians: `import` is the libraries, `open` is
`from_pretrained`, `first` the first logits of a prompt, `again` those of a second call; `peak MB` the most that the
process ever held in memory. `MB` is the folder on disk. Behind the seconds of the clock stand those of the processor,
which others' load disturbs least, compilers' included: `cpu open + first`, and `cpu all` with the imports.

Rows of a device, of the folder that mxfx saved (`--quick`: not the last, and not the float folder in bfloat16):

    saved by mxfx      opened there before
    the first time     by who saved it, with an empty cache, but for the kernels, which are built once a machine
    first, emitted     the same without what the folder has of the emit stage: as where somebody else saved it, and
                       where other code or kernels run
    first on a machine with nothing: kernels are built too, those in C, on CUDA those in Triton
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import transformers

from mxfx.ground.files import cache_home
from tools.bench.measuring import arguments_of, machine, table, write

#: A folder, the dtype asked for, whether mxfx saved it, and the environment that it is opened in.
Way = tuple[Path, str, bool, Callable[[], AbstractContextManager[Mapping[str, str] | None]]]

_OPENS = """
import importlib.util, json, resource, sys, time
folder, dtype, device, tokens, saved = sys.argv[1:]
def processor():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
start, busy = time.perf_counter(), processor()
import torch, transformers
if saved == "True":
    import mxfx
imported, ready = time.perf_counter(), processor()
options = {} if dtype == "-" else {"dtype": getattr(torch, dtype)}
if saved == "True" or importlib.util.find_spec("accelerate"):
    options["device_map"] = device
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).to(device).eval()
opened = time.perf_counter()
ids = torch.arange(3, 3 + int(tokens), device=device)[None]
def run():
    with torch.no_grad():
        return float(model(ids).logits.float().sum())
run()
first, done = time.perf_counter(), processor()
run()
again = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"import": imported - start, "open": opened - imported, "first": first - opened,
                  "again": again - first, "cpu open + first": done - ready, "cpu all": done - busy, "peak MB": peak}))
"""

_FLOAT, _SAVED = "float folder, float32", "saved by mxfx"
_BUSY = "cpu open + first"


def main() -> None:
    args = _arguments()
    about = machine() | {"transformers": transformers.__version__}
    print("  ".join(f"{k}={v}" for k, v in about.items()), flush=True)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        bare = Path(shutil.copytree(args.saved, Path(temporary) / "bare", ignore=shutil.ignore_patterns("emitted-*")))
        for device in args.device:
            # Kernels are built, files read.
            _opened(args.saved, "-", True, device, args)
        for _ in range(args.repeat):
            for device in args.device:
                for name, (folder, dtype, saved, environment) in _ways(args, bare).items():
                    with environment() as given:
                        found = _opened(folder, dtype, saved, device, args, given)
                    runs.setdefault((device, name), []).append(found)
                    print(f"{device}  {name}: {found[_BUSY]:.2f} s of the processor", file=sys.stderr, flush=True)
    rows: list[dict] = []
    for (device, name), times in runs.items():
        seconds = {key: statistics.median(run[key] for run in times) for key in times[0]}
        ready = seconds["open"] + seconds["first"]
        rows.append({"device": device, "model": name, **seconds, "open + first": ready})
        base = next(row for row in rows if (row["device"], row["model"]) == (device, _FLOAT))
        for key, over in (("open + first", "over float32"), (_BUSY, "cpu over float32")):
            rows[-1][over] = rows[-1][key] / base[key]
        folder = args.float if name.startswith("float") else args.saved
        rows[-1]["MB"] = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
    print(table(rows))
    write({"rows": rows, "runs": {" ".join(key): found for key, found in runs.items()}}, args.json)


def _ways(args: argparse.Namespace, bare: Path) -> dict[str, Way]:
    some: dict[str, Way] = {
        _FLOAT: (args.float, "float32", False, nullcontext),
        _SAVED: (args.saved, "-", True, nullcontext),
        f"{_SAVED}, the first time": (args.saved, "-", True, _no_emission),
        f"{_SAVED}, first, emitted": (bare, "-", True, _no_emission),
    }
    others: dict[str, Way] = {
        "float folder, bfloat16": (args.float, "bfloat16", False, nullcontext),
        f"{_SAVED}, first on a machine": (args.saved, "-", True, _nothing),
    }
    return some if args.quick else some | others


@contextmanager
def _no_emission() -> Iterator[Mapping[str, str]]:
    """A cache with the user's key and the kernels in C alone; Triton's stays."""
    with tempfile.TemporaryDirectory() as empty:
        if (cache_home() / "key").is_file():
            shutil.copy(cache_home() / "key", empty)
        if (cache_home() / "kernels").is_dir():
            (Path(empty) / "kernels").symlink_to((cache_home() / "kernels").resolve())
        yield os.environ | {"MXFX_CACHE": empty}


@contextmanager
def _nothing() -> Iterator[Mapping[str, str]]:
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as triton:
        yield os.environ | {"MXFX_CACHE": empty, "TRITON_CACHE_DIR": triton}


def _opened(
    folder: Path,
    dtype: str,
    saved: bool,
    device: str,
    args: argparse.Namespace,
    environment: Mapping[str, str] | None = None,
) -> dict[str, float]:
    call = [sys.executable, "-c", _OPENS, str(folder), dtype, device, str(args.tokens), str(saved)]
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
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", nargs="+", default=devices)
    return parser.parse_args()


if __name__ == "__main__":
    main()
