"""Norms and rotary embeddings in other spellings: raised without a changed bit, or reported."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.execute import execute
from mxfx.graph.trace import trace
from mxfx.passes import RaiseNorm, RaiseRope
from mxfx.rewrite import Pass, apply
from tests.architectures import build

#: Spelling → an architecture that has it, the pass that raises it, and how often it is there.
SPELLINGS: dict[str, tuple[str, Pass, int]] = {
    "gains that are cast before they are applied": ("helium", RaiseNorm(), 5),
    "a root that is a power, norms without a gain": ("gemma4_text", RaiseNorm(), 18),
    "halves that turn the other way round": ("nanochat", RaiseRope(), 4),
    "halves turned apart, one cosine a pair": ("gpt_oss", RaiseRope(), 4),
    "pairs that lie side by side, half of the cosines": ("ernie4_5", RaiseRope(), 4),
    "pairs of part of each head, behind the tokens, from a table": ("gptj", RaiseRope(), 4),
    "pairs that are put into halves": ("deepseek_v3", RaiseRope(), 4),
}


@pytest.mark.parametrize(("name", "one", "matches"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_another_spelling_is_raised_and_no_bit_changes(name: str, one: Pass, matches: int) -> None:
    program = trace(build(name), proven=False)
    applied = apply(one, program)
    assert len(applied.record.matches) == matches and applied.record.skips == []
    ids = torch.randint(3, 128, (2, 9))
    assert torch.equal(execute(applied.program, ids), execute(program, ids))
