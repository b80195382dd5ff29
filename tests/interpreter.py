"""Kernels in Triton's interpreter, without a device: a test file runs itself again in a process that has it.

The interpreter is chosen when Triton is first imported, so that process finds `TRITON_INTERPRET=1` from the start.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def passes_in_interpreter(file: str) -> None:
    """Assert that all tests of a file pass there."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.fixture(autouse=IN_INTERPRETER)
def numpy_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps a scalar as an array of one element, which NumPy 2.5 no longer takes for an index."""
    from triton.runtime import interpreter

    patched = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture(autouse=IN_INTERPRETER)
def lines_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a reduction by a kernel's own function the interpreter calls that for every element: minutes for one test.

    In the same order it is called for all lines of a tile at once.
    """
    import numpy as np
    from triton.runtime import interpreter

    def generic_reduce(self, given):
        given, axis = self.unravel(given, self.axis)
        assert not self.keep_dims and self.axis is not None, "no kernel has it"

        def at(index: int) -> tuple:
            return tuple(self.to_tensor(np.take(one.handle.data, index, axis), one.dtype) for one in given)

        found = at(0)
        for index in range(1, given[0].handle.data.shape[axis]):
            combined = self.combine_fn.fn(*found, *at(index))
            found = combined if isinstance(combined, tuple) else (combined,)
        return list(found)

    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", generic_reduce)
