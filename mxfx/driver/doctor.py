"""``mxfx doctor``: what is here, and what that means for mxfx."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from mxfx.ground.files import cache_home
from mxfx.ground.versions import version

#: Optional package → what it is for.
_OPTIONAL = {
    "triton": "kernels on CUDA",
    "fast_hadamard_transform": "Hadamard transforms of orders that no kernel here takes",
    "compressed_tensors": "export --to compressed-tensors, import",
    "gguf": "export --to gguf",
    "model_explorer": "export --to model-explorer",
    "fastapi": "serve",
    "uvicorn": "serve",
    "openai": "serve",
}
_REQUIRED = ("torch", "transformers", "safetensors", "networkx", "lm-eval", "datasets")


def lines() -> Iterator[str]:
    """One line a finding."""
    import torch

    from mxfx.ops.kernels.library import load_cpu

    yield f"mxfx {version('mxfx')}, Python {platform.python_version()}, {platform.platform()}"
    for name in _REQUIRED:
        yield f"{name} {version(name)}"
    yield f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {_instructions()}"
    missing = load_cpu()
    yield "C kernels for decoding on the CPU: " + ("built" if missing is None else f"none, definitions run ({missing})")
    if missing is None:
        yield f"packed products on the CPU: {few_rows()}"
    if not torch.cuda.is_available():
        yield "cuda: no device; definitions and CPU kernels run"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = (found.major, found.minor)
        yield (
            f"cuda:{index}: {found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}; "
            f"{_products(index, capability)}"
        )
    for name, purpose in _OPTIONAL.items():
        yield f"{name}: {'present' if find_spec(name) is not None else 'absent'} ({purpose})"
    theirs = (("HF_HOME", "~/.cache/huggingface"), ("TRITON_CACHE_DIR", "~/.triton/cache"))
    for folder in (cache_home(), *(Path(os.environ.get(name, default)).expanduser() for name, default in theirs)):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
        yield f"cache {folder}: {size / 1e9:.2f} GB"


def _products(index: int, capability: tuple[int, int]) -> str:
    """What products of MX operands run on."""
    if capability < (8, 9):
        return "no FP8 tensor cores: products in the model's dtype"
    if find_spec("triton") is not None:
        import torch

        from mxfx.ops.kernels.e4m3_product import sums_in_float32

        if sums_in_float32(torch.device("cuda", index)):
            return "FP8 tensor cores, with exact sums"
    return 'FP8 tensor cores without exact sums: products in the model\'s dtype but for `[emit] sums = "fast"`'


def few_rows(format: str = "mxint4@32") -> str:
    """How many rows of a step meet packed codes as they lie on this CPU; more meet the decoded weight."""
    import torch

    from mxfx.ops.kernels.cpu import few_rows as rows
    from mxfx.ops.kernels.crossing import VARIABLE, kept_in

    dtypes = (torch.bfloat16, torch.float32)
    said = ", ".join(f"{rows(format, dtype)} in {str(dtype).removeprefix('torch.')}" for dtype in dtypes)
    source = (
        f"{VARIABLE} says so" if VARIABLE in os.environ else f"measured, kept in {kept_in(format, dtypes[0]).parent}"
    )
    return f"rows of {format} that meet the codes at once: {said} ({source}); more are decoded first"


def _instructions() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()
