"""``insert-kv-cache``: declared writes, one cache a pair of keys and values, nothing where no cache can be."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.mutation import written
from mxfx.graph.program import Program
from mxfx.graph.text import parse, to_text
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.graph.verify import VerifyError, verify
from mxfx.passes import FoldConstants, InsertKvCache, Lower
from mxfx.pipeline.probe import Probe
from mxfx.rewrite import apply
from mxfx.runtime.causal_lm import as_causal_lm
from tests.programs import RAISE, config_a, padded_batch, passed, raised, relative
from tests.runtime.feeding import steps


@pytest.fixture(scope="module")
def cached() -> Program:
    return passed(raised("llama-tiny"), (*config_a(), InsertKvCache()))


def test_a_cached_program_is_sound_and_reads_back_before_and_after_lowering(cached: Program) -> None:
    for program in (cached, passed(cached, (Lower(), FoldConstants()))):
        verify(program)
        text = to_text(program)
        assert to_text(parse(text, dict(program.weights.items()))) == text


def test_without_caches_it_computes_the_same_bits(cached: Program) -> None:
    before = passed(raised("llama-tiny"), config_a())
    assert torch.equal(Probe().logits(cached), Probe().logits(before))


def test_what_a_node_writes_is_declared_and_printed(cached: Program) -> None:
    (first, _) = cached.nodes("cached_attention")
    names = [node.name for node in written(first)]
    assert names == ["cache_0_keys", "cache_0_values", "cache_0_key_scales", "cache_0_value_scales"]
    line = next(line for line in to_text(cached).splitlines() if "mxfx.cached_attention(" in line)
    assert line.count("!") == 4


def test_two_writers_of_one_cache_are_refused(cached: Program) -> None:
    broken = cached.copy()
    first, second = broken.nodes("cached_attention")
    second.update_arg(5, first.args[5])
    with pytest.raises(VerifyError, match=r"it writes cache_0_keys, which .* writes too"):
        verify(broken)


def test_what_is_written_must_come_in_as_an_input(cached: Program) -> None:
    broken = cached.copy()
    first = next(broken.nodes("cached_attention"))
    first.update_arg(5, first.args[1])
    with pytest.raises(VerifyError, match="which is no cache that comes in as an input"):
        verify(broken)


def test_a_reader_stands_behind_the_writer(cached: Program) -> None:
    broken = cached.copy()
    first, second = broken.nodes("cached_attention")
    for position in range(5, 9):
        first.update_arg(position, second.args[position])
    first.update_arg(18, False)
    with pytest.raises(VerifyError, match=r"it reads cache_1_keys, which .* writes after it"):
        verify(broken)


def test_attention_with_the_same_keys_and_values_shares_a_cache() -> None:
    program = raised("llama-tiny").copy()
    first, second = program.nodes("attention")
    for position in (1, 2):
        second.update_arg(position, first.args[position])
    result = apply(InsertKvCache(), program).program
    writes = [node.args[18] for node in result.nodes("cached_attention")]
    inputs = [node.target for node in result.graph.nodes if node.op == "placeholder"]
    assert writes == [True, False] and "cache_1_keys" not in inputs


@pytest.mark.parametrize("lengths", [[12, 1], [4, 9], [1] * 13])
def test_a_shared_cache_is_no_ring_beside_one_under_the_same_window(lengths: list[int]) -> None:
    """As in Gemma 3n and 4: of three layers under one window the last two read the same keys and values."""
    program = passed(trace(tiny("mistral-tiny", layers=3)), RAISE)
    _, second, third = program.nodes("attention")
    for position in (1, 2):
        third.update_arg(position, second.args[position])
    lm = as_causal_lm(program)
    assert [spec.window for spec in lm.specs] == [5, 5, None, None]
    ids, mask, _ = padded_batch()
    whole = lm(ids, attention_mask=mask).logits
    assert relative(steps(lm, ids, mask, lengths)[mask.bool()], whole[mask.bool()]) < 1e-5


def test_a_model_that_is_no_causal_one_is_warned_of() -> None:
    """What tells each token the next one has a perplexity near 1."""
    program = raised("llama-tiny").copy()
    assert not apply(InsertKvCache(), program).record.warnings
    for node in program.nodes("attention"):
        node.args = (*node.args[:5], False)
    [warning] = apply(InsertKvCache(), program).record.warnings
    assert "sees later tokens" in warning and "neither perplexity nor generated text means anything" in warning


def test_a_model_that_mixes_tokens_elsewhere_gets_no_cache_and_is_told_why() -> None:
    program = raised("llama-tiny").copy()
    embedding = next(program.nodes("embedding"))
    with program.graph.inserting_after(embedding):
        summed = program.graph.call_function(torch.ops.aten.cumsum.default, (embedding, 1))
    summed.meta = dict(embedding.meta)
    embedding.replace_all_uses_with(summed, delete_user_cb=lambda user: user is not summed)
    applied = apply(InsertKvCache(), program)
    assert not applied.record.matches
    assert all("cumsum.default mixes tokens along axis 1" in skip.reason for skip in applied.record.skips)
    assert len(applied.record.skips) == 2
