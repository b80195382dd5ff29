"""The stub passes are registered while the tests of this room run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.pipeline.stubs import STUBS, registered

from mxfx.config.pipeline import register_passes


@pytest.fixture(scope="module", autouse=True)
def stub_passes() -> Iterator[None]:
    register_passes()
    with registered(*STUBS):
        yield
