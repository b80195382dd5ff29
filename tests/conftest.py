"""What every test sees: one thread a worker, long sweeps on request, the demo's model and articles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_DESELECTED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="also run the tests marked `thorough`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    thorough = [item for item in items if item.get_closest_marker("thorough")]
    if config.getoption("--thorough") or not thorough:
        return
    items[:] = [item for item in items if item not in thorough]
    config.hook.pytest_deselected(items=thorough)
    config.stash[_DESELECTED] = len(thorough)
    if hasattr(config, "workeroutput"):
        config.workeroutput["thorough"] = len(thorough)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """pytest-xdist collects in its workers only; each has the same tests."""
    node.config.stash[_DESELECTED] = getattr(node, "workeroutput", {}).get("thorough", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    count = config.stash.get(_DESELECTED, 0)
    if count:
        terminalreporter.write_line(f"{count} thorough tests did not run: add --thorough")


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
