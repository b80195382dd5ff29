"""No file can make mxfx run code: nothing is unpickled, but for tensors by the reader that resolves no names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mxfx

_PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickling(source: str) -> list[int]:
    """Lines that import a pickler, or call ``torch.load`` otherwise than with ``weights_only=True``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bad = any(name.name.split(".")[0] in _PICKLERS for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            named = {name.name for name in node.names}
            bad = (node.module or "").split(".")[0] in _PICKLERS or (node.module == "torch" and "load" in named)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            bad = not any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
        else:
            bad = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
        if bad:
            found.append(node.lineno)
    return found


def test_nothing_is_unpickled() -> None:
    root = Path(mxfx.__file__).parent
    found = [f"{path}:{line}" for path in sorted(root.rglob("*.py")) for line in unpickling(path.read_text())]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "from torch import load",
        "torch.load(p)",
        "torch.load(p, weights_only=flag)",
        "numpy.load(p, allow_pickle=True)",
    ],
)
def test_what_would_unpickle_is_seen(source: str) -> None:
    assert unpickling(source) == [1]
