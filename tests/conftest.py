"""What every test sees: one thread a worker, long sweeps on request, the demo's model and articles."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Not what this machine happens to be faster with.
os.environ.setdefault("MXFX_CPU_ROWS", "16")

import torch

from tests.commands import finished as finished  # a fixture
from tests.commands import mxfx as mxfx  # a fixture

_DESELECTED = pytest.StashKey[dict[str, int]]()

#: Marker: what its tests need, and how to have them run.
_NEEDS = {
    "thorough": "add --thorough",
    "cuda": "they need a CUDA device",
    "triton": "they need the package triton",
    "browser": "they need chromium",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="also run the tests marked `thorough`")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "triton: needs the package triton, but no device")
    config.addinivalue_line(
        "markers", "browser: looks at a page in chromium; runs, and fails without it, where CI is set"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    present = {
        "thorough": config.getoption("--thorough"),
        "cuda": torch.cuda.is_available(),
        "triton": importlib.util.find_spec("triton") is not None,
        "browser": shutil.which("chromium") is not None or bool(os.environ.get("CI")),
    }
    missing = [marker for marker, found in present.items() if not found]
    kept: list[pytest.Item] = []
    left_out: dict[str, list[pytest.Item]] = {marker: [] for marker in missing}
    for item in items:
        reason = next((marker for marker in missing if item.get_closest_marker(marker)), None)
        (kept if reason is None else left_out[reason]).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=[item for group in left_out.values() for item in group])
    counts = {marker: len(group) for marker, group in left_out.items() if group}
    config.stash[_DESELECTED] = counts
    if hasattr(config, "workeroutput"):
        config.workeroutput["deselected"] = counts


def pytest_collection_finish() -> None:
    """Modules are there to the end, and no collection looks at them again: a tenth of the time was theirs."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """pytest-xdist collects in its workers only; each has the same tests."""
    node.config.stash[_DESELECTED] = getattr(node, "workeroutput", {}).get("deselected", {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for marker, count in config.stash.get(_DESELECTED, {}).items():
        terminalreporter.write_line(f"{count} tests marked {marker} did not run: {_NEEDS[marker]}")


#: Tests of tracing itself, and those that change how a trace is taken.
_TRACE_ANEW = (
    *(f"tests/graph/test_{name}.py" for name in ("functional", "prove", "trace", "verify")),
    "tests/test_faults.py",
)
_ANEW = pytest.StashKey[bool]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[_ANEW] = item.nodeid.startswith(_TRACE_ANEW)


@pytest.fixture(scope="session", autouse=True)
def exports(pytestconfig: pytest.Config) -> Iterator[None]:
    """One export a structure, in a session whose tests trace at all."""
    if "mxfx.graph.trace" not in sys.modules:
        yield
        return
    from tests.exports import exported_once

    with exported_once(lambda: not pytestconfig.stash[_ANEW]):
        yield


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of the real SmolLM2-135M-Instruct; fetched and converted at first use."""
    from tools import assets

    return assets.model_dir()


@pytest.fixture(scope="session")
def calibration_articles() -> Path:
    """Folder of the articles for calibration; fetched and parsed at first use."""
    from tools import assets

    return assets.calibration_dir()


@pytest.fixture(scope="session")
def evaluation_articles() -> Path:
    """Folder of the articles for evaluation; none of them is among the calibration articles."""
    from tools import assets

    return assets.evaluation_dir()


@pytest.fixture
def definitions() -> Iterator[None]:
    """How a CPU lowers where no C kernel can be built: what is printed there is the same on every machine."""
    from mxfx.ops.kernels.library import load_cpu, load_cuda
    from mxfx.ops.providers import _PROVIDERS

    load_cpu()
    # What a test loaded would be lost behind it: modules are imported once.
    load_cuda()
    held = list(_PROVIDERS)
    _PROVIDERS[:] = [one for one in held if not one.name.startswith("c-")]
    yield
    _PROVIDERS[:] = held
