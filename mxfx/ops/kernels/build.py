"""The C kernels for CPUs, built once a machine and kept in the user's cache; without a compiler, definitions run."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import torch

from mxfx.formats import parse
from mxfx.ground.errors import reason_of
from mxfx.ground.files import cache_home, say_not_kept, temporary_folder
from mxfx.ops.kernels.structs import rule_of

_SOURCES = ("rows.c", "products.c", "divergence.c")
#: No contraction and no fast mathematics: a rounding step is what the source says.
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
#: The first that compiles and loads is taken. OpenMP's functions are those of the runtime that torch has loaded.
_TRIED = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
#: Seconds that a compiler may take.
_PATIENCE = 120
#: Whoever comes second finds the library built.
_BUILDING = threading.Lock()

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "mxfx_rows": (_P, _P, _L, _L, _I, _P, _P, _I),
    "mxfx_restore": (_P, _P, _P, _L, _L, _L, _I, _P, _I, _I),
    "mxfx_product": (_P, _P, _P, _P, _P, _L, _L, _L, _L, _P, _I, _I, _I, _I),
    "mxfx_linear": (_P, _P, _P, _P, _L, _L, _L, _I),
    "mxfx_attend": (_P, _P, _P, _P, _P, _P, ctypes.c_int64, _P, _P, _P, _L, _L, _L, _L, _F, _F, _I, _I, _I),
    "mxfx_divergence": (_P, _P, _P, _P, _P, _P, _P, _P, _L, _L, _I, _F, _I),
}


@cache
def library() -> ctypes.CDLL | str:
    """The kernels; else, as text, why there are none. ``MXFX_CPU_KERNELS=0`` goes without them."""
    with _BUILDING:
        return _library()


@cache
def _library() -> ctypes.CDLL | str:
    if os.environ.get("MXFX_CPU_KERNELS") == "0":
        return "MXFX_CPU_KERNELS=0 turns the C kernels off"
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if (found := _which(name))), None)
    if compiler is None:
        return "no C compiler is installed here"
    source = "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in _SOURCES)
    problem = ""
    for tried in _TRIED:
        flags = (*_FLAGS, *tried)
        try:
            return _built(compiler, flags, source)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            problem = str(said).strip().splitlines()[0] if str(said).strip() else type(error).__name__
    return f"{compiler} does not build the C kernels: {problem}"


def build_ahead() -> threading.Thread:
    """Begin to build the kernels beside what else there is to do: a compiler takes seconds, once a machine."""
    thread = threading.Thread(target=library)
    thread.start()
    return thread


def _which(name: str | None) -> str | None:
    return shutil.which(name) if name else None


def _built(compiler: str, flags: tuple[str, ...], source: str) -> ctypes.CDLL:
    """The shared library of a source, from the cache or compiled: where nothing can be kept, for this process alone.

    Raises ``OSError``, ``SubprocessError``.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_PATIENCE).stdout
    key = "\n".join((source, version, *flags, platform.machine(), processor()))
    target = cache_home() / "kernels" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if target.is_file():
        # One that a machine which lost its power left is built again.
        with contextlib.suppress(OSError, AttributeError):
            return _opened(target)
    with _place(target.parent) as folder:
        text, unit, made = (Path(folder) / name for name in ("kernels.c", "kernels.o", "kernels.so"))
        text.write_text(source, encoding="utf-8")
        for command in ([*flags, "-c", str(text), "-o", str(unit)], ["-shared", str(unit), "-o", str(made), "-lm"]):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=_PATIENCE)
        found = _opened(made)
        _prove(found)
        if Path(folder).parent == target.parent:
            # Whoever comes first: the files of two processes are the same.
            os.replace(made, target)
        return found


def _place(folder: Path) -> tempfile.TemporaryDirectory:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return temporary_folder("", folder)
    except OSError as error:
        say_not_kept(folder, reason_of(error))
        return temporary_folder("mxfx-kernels-")


def processor() -> str:
    """What `native` means: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _opened(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return found


def _prove(found: ctypes.CDLL) -> None:
    """Raise ``OSError`` for a library that does not round as the definition does: a compiler may know better."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 38, 64)[:, None]
    for text in ("mxint4@32/mse", "mxfp4_e2m1@32", "mxfp8_e4m3@16/even", "mxint8@32/ceil"):
        y = torch.empty_like(x)
        found.mxfx_rows(x.data_ptr(), y.data_ptr(), *x.shape, 0, None, rule_of(text, x.dtype), 1)
        if not torch.equal(y, parse(text).fake_quantize(x)):
            raise OSError(f"its results in {text} are not those of the definition")
