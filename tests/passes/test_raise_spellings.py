"""Norms and rotary embeddings in other spellings: raised without a changed bit, or reported."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.execute import execute
from mxfx.graph.trace import trace
from mxfx.passes import RaiseNorm, RaiseRope
from mxfx.rewrite import Pass, apply
from tests.architectures import build

#: Gains that are cast before they are applied; halves that turn the other way round; pairs that lie side by side.
CAST_GAIN, TURNED_BACK, INTERLEAVED, CENTRED = "helium", "nanochat", "ernie4_5", "cohere"


@pytest.mark.parametrize(
    ("name", "one", "matches"), [(CAST_GAIN, RaiseNorm(), 5), (TURNED_BACK, RaiseRope(), 4)], ids=["gain", "turn"]
)
def test_another_spelling_is_raised_and_no_bit_changes(name: str, one: Pass, matches: int) -> None:
    program = trace(build(name), proven=False)
    applied = apply(one, program)
    assert len(applied.record.matches) == matches and applied.record.skips == []
    ids = torch.randint(3, 128, (2, 9))
    assert torch.equal(execute(applied.program, ids), execute(program, ids))
