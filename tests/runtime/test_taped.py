"""A step that is played gives what the graph gives, whatever lies in its inputs, and in caches that grow."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from mxfx.ops.kernels.library import load_cpu
from mxfx.passes import PackWeights
from mxfx.runtime.causal_lm import as_causal_lm
from mxfx.runtime.taped import Tape
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


def test_what_a_kernel_refuses_of_a_later_step_goes_the_graph_s_way() -> None:
    """Packed codes meet a row of NaN: it lies on no grid."""
    lm = as_causal_lm(passed(raised("llama-tiny"), (*config_a(), PackWeights())))
    table = next(weight for weight in lm.parameters() if weight.shape[0] == 128)
    with torch.no_grad():
        cache = lm.new_cache()
        for token in (5, 6):
            lm(torch.tensor([[token], [token]]), past_key_values=cache, phase="decode")
        table[7] = float("nan")
        logits = lm(torch.tensor([[7], [8]]), past_key_values=cache).logits
    assert cache.storage is not None and cache.storage.attached
    # The head is the same table.
    assert logits[0].isnan().all() and logits[1].isnan().nonzero().tolist() == [[0, 7]]


def test_a_recording_that_was_interrupted_begins_anew() -> None:
    graph = fx.symbolic_trace(lambda x: torch.ops.aten.exp.default(torch.ops.aten.neg.default(x)))
    tape, x = Tape(graph), torch.zeros(2)
    run_node, left = tape.run_node, iter([True, True, False])

    def interrupted(n: fx.Node) -> object:
        if not next(left, True):
            raise KeyboardInterrupt
        return run_node(n)

    tape.run_node = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        tape.record(x)
    found = tape.record(x)
    assert len(tape.played) == 2
    x.fill_(1)
    tape.play()
    assert torch.equal(found, torch.full((2,), -1.0).exp())


def test_a_cache_that_was_filled_for_inference_is_read_on_outside_of_it() -> None:
    lm = as_causal_lm(raised("llama-tiny"))
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = lm(ids).logits
    cache = lm.new_cache()
    with torch.inference_mode():
        lm(ids[:, :5], past_key_values=cache)
        lm(ids[:, 5:6], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0, 1]))
    with torch.no_grad():
        step = lm(ids[:, 6:7], past_key_values=cache).logits
        chunk = lm(ids[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((step, chunk), 1), expected[:, 6:], rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_reset_forgets_the_nan_of_a_text() -> None:
    """A step by definition multiplies what lies behind its token by zero."""
    lm = as_causal_lm(raised("llama-tiny"))
    table = next(weight for weight in lm.parameters() if weight.shape[0] == 128)
    cache = lm.new_cache()
    with torch.no_grad():
        table[7] = float("nan")
        lm(torch.tensor([[7, 7]]), past_key_values=cache)
    assert cache.storage is not None and any(t.isnan().any() for t in cache.storage.tensors.values())
    cache.reset()
    assert not any(t.isnan().any() for t in cache.storage.tensors.values())
