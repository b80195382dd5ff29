"""The stub passes are registered while the tests of this room run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mxfx.config.pipeline import register_passes
from tests.config.stubs import STUBS, registered


@pytest.fixture(scope="module", autouse=True)
def stub_passes() -> Iterator[None]:
    register_passes()
    with registered(*STUBS):
        yield
