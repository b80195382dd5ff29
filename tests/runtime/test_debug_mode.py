"""Emitted models under PyTorch's DebugMode: every op with a hash of its result, and where two runs part."""

from __future__ import annotations

import torch
from torch.utils._debug_mode import DebugMode

from mxfx.config import loads
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.pipeline.manager import PassManager
from mxfx.runtime.causal_lm import as_causal_lm

_IDS = torch.arange(3, 11).unsqueeze(0)
_RULE = "[[pass]]\nname = 'annotate'\n[[pass.rule]]\nmatch = '.*layers.1.*down_proj'\nweight = 'WEIGHT'\n"


def logs(weight: str) -> list:
    text = _RULE.replace("WEIGHT", weight) + "[[pass]]\nname = 'round-weights'\n"
    model = as_causal_lm(PassManager().run(trace(tiny("llama-tiny")), loads(text).completed()).program)
    with torch.no_grad(), DebugMode() as mode, DebugMode.log_tensor_hashes():
        model(_IDS)
    return mode.logs


def test_hashes_tell_where_two_formats_part() -> None:
    four, again, eight = (logs(weight) for weight in ("mxint4@32", "mxint4@32", "mxint8@32"))
    assert DebugMode.check_hash_mismatches(four, again) == []
    found = DebugMode.check_hash_mismatches(four, eight)
    products = [call for call in four if "linear" in str(call) or "mm" in str(call)]
    # The last layer's last product, the head and the few ops around them.
    assert len(products) > 10 and 0 < len(found) < len(four) / 4
