"""A step that is played gives what the graph gives, whatever lies in its inputs, and in caches that grow."""

from __future__ import annotations

import pytest
import torch

from mxfx.ops.kernels.library import load_cpu
from mxfx.runtime.causal_lm import as_causal_lm
from tests.programs import config_a, passed, raised

pytestmark = pytest.mark.skipif(load_cpu() is not None, reason=str(load_cpu()))


@pytest.mark.parametrize("family", ["llama-tiny", "gemma3-tiny", "W4 A4 KV4"])
def test_played_steps_are_those_of_the_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = passed(raised("llama-tiny"), config_a()) if family.startswith("W4") else raised(family)
    lm = as_causal_lm(program)
    ids = torch.randint(3, 128, (2, 80), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    found = []
    for records in (True, False):
        if not records:
            monkeypatch.setattr("mxfx.runtime.causal_lm.records", lambda device: False)
        cache = lm.new_cache()
        with torch.no_grad():
            lm(ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
            # A cache of 64 places grows on the way.
            steps = [
                lm(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache).logits
                for at in range(50, 80)
            ]
        assert cache.storage is not None
        assert bool(cache.storage.attached) == records
        found.append(torch.cat(steps, 1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[0][:, 0], found[0][:, 1])
