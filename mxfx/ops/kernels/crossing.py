"""Up to how many rows this CPU multiplies packed codes as they lie: measured once a machine, and kept.

More rows pay for decoding the weight and a library's product. Where the two cross depends on the processor, its threads
and the library; so both are timed where a format first meets few rows, and what was found lies beside the C kernels in
the user's cache. `MXFX_CPU_ROWS=N` says it instead: the same on every machine, and nothing is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mxfx.formats import parse
from mxfx.formats.stored import store
from mxfx.ground.errors import MxfxError
from mxfx.ground.files import DamagedFile, cache_home, keep, read_json
from mxfx.ops.kernels.build import library, processor

VARIABLE = "MXFX_CPU_ROWS"
#: Rows that are tried; each is a step of decoding of so many texts.
TRIED = (1, 2, 4, 8, 16, 32)
#: The weight that is multiplied: (channels, width), and how often.
_SIZE = (1024, 1024)
_REPEATS = 5

#: A product of rows (m, 1, width) with packed codes and scales in a format, by the codes or by the decoded weight.
Product = Callable[[Tensor, Tensor, Tensor, str], Tensor]


class BadRows(MxfxError, ValueError):
    """`MXFX_CPU_ROWS` is no number of rows."""


@lru_cache(maxsize=256)
def rows_of(format: str, dtype: torch.dtype, by_codes: Product, decoded: Product) -> int:
    """The most rows at which `by_codes` is no slower than `decoded`; 0 if it never is.

    Raises `BadRows` for a variable that is no number.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        if not given.strip().isdigit():
            raise BadRows(f"{VARIABLE} is {given!r}; expected a number of rows, 0 or more, or unset it to measure")
        return int(given)
    path = kept_in(format, dtype)
    try:
        found = read_json(path)
        if isinstance(found, dict) and isinstance(found.get("rows"), int):
            return int(found["rows"])
    except (DamagedFile, OSError):
        pass  # not there yet, or cut short: measured anew
    rows, times = _measured(format, dtype, by_codes, decoded)
    about = {"format": format, "dtype": str(dtype).removeprefix("torch."), "rows": rows, "microseconds": times}
    keep(path, (json.dumps(about, indent=1) + "\n").encode())
    return rows


def kept_in(format: str, dtype: torch.dtype) -> Path:
    """Where the figure of a format lies: named after the processor, its threads, torch and the C kernels."""
    kernels = getattr(library(), "_name", "")
    about = (processor(), torch.get_num_threads(), torch.__version__, Path(kernels).name, format, dtype, _SIZE, TRIED)
    return cache_home() / "kernels" / f"rows-{hashlib.sha256(repr(about).encode()).hexdigest()[:24]}.json"


def _measured(
    format: str, dtype: torch.dtype, by_codes: Product, decoded: Product
) -> tuple[int, dict[str, dict[str, float]]]:
    fmt, generator = parse(format), torch.Generator().manual_seed(0)
    weight = fmt.fake_quantize(torch.randn(_SIZE, generator=generator))
    packed = store(weight, fmt)
    assert packed is not None
    most, times = 0, {}
    for rows in TRIED:
        x = fmt.fake_quantize(torch.randn(rows, 1, _SIZE[1], generator=generator)).to(dtype)
        taken = [_fastest(lambda way=way, x=x: way(x, *packed, format)) for way in (by_codes, decoded)]  # type: ignore[misc]
        times[str(rows)] = {"codes": round(taken[0] * 1e6, 1), "decoded": round(taken[1] * 1e6, 1)}
        if taken[0] > taken[1]:
            break
        most = rows
    return most, times


def _fastest(call: Callable[[], object]) -> float:
    """Seconds; the fastest of a few is what others' load disturbs least."""
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
