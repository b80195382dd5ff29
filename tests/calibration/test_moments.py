"""Moments and samples are those of the watched tensors, over all calibration tokens."""

from __future__ import annotations

import pytest
import torch

from mxfx.calibration import moments
from mxfx.calibration.moments import block_moments, samples, watch
from mxfx.graph.execute import execute
from mxfx.graph.node import path_of
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.passes import RaiseAttention, RaiseNorm, RaiseRope
from mxfx.rewrite import Context, MissingCalibration, apply

TOKENS = torch.randint(3, 128, (5, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def program():
    found = trace(tiny("llama-tiny"))
    for raising in (RaiseNorm(), RaiseRope(), RaiseAttention()):
        found = apply(raising, found).program
    return found.twin(torch.float64)


@pytest.fixture
def ctx():
    return Context(tokens=lambda: TOKENS)


def down(program):
    return next(n for n in program.nodes("linear") if path_of(n).endswith("down_proj")).args[0]


def values(program, watched):
    seen = []
    execute(program, TOKENS, observe=lambda node, value: seen.append(value) or value if node is watched else value)
    return seen[0]


def test_blocks_of_the_gram_matrix(program, ctx):
    rows = values(program, down(program)).flatten(0, 1)
    whole = rows.mT @ rows / len(rows)
    found = block_moments(program, {down(program): 32}, ctx)[down(program)]
    expected = torch.stack([whole[i : i + 32, i : i + 32] for i in range(0, 96, 32)])
    torch.testing.assert_close(found, expected)


def test_every_head_has_its_own_moments(program, ctx):
    keys = next(program.nodes("attention")).args[1]
    x = values(program, keys)
    found = block_moments(program, {keys: 8}, ctx)[keys]
    assert found.shape == (2, 2, 8, 8)
    torch.testing.assert_close(
        found[1, 0], torch.einsum("bsi,bsj->ij", x[:, 1, :, :8], x[:, 1, :, :8]) / TOKENS.numel()
    )


def test_unit_rows_have_trace_one_per_channel(program, ctx):
    found = block_moments(program, {down(program): 96}, ctx, unit_rows=True)[down(program)]
    assert float(found[0].trace()) == pytest.approx(96, rel=1e-6)


def test_samples_take_the_same_tokens_of_every_node(program, ctx):
    one, two = list(program.nodes("rms_norm"))[:2]
    seen = samples(program, {one: lambda x: x, two: lambda x: x}, ctx, 60, "test")
    assert 30 < len(seen[one]) == len(seen[two]) < 90
    everything = values(program, two).flatten(0, 1)
    assert all(bool((everything == row).all(-1).any()) for row in seen[two])


def test_nothing_behind_the_last_watched_node_runs(program, ctx, monkeypatch):
    def refuse(*operands, **options):
        raise AssertionError("attention ran")

    first, attention = next(program.nodes("rms_norm")), next(program.nodes("attention"))
    monkeypatch.setattr(attention, "target", refuse)
    rows = []
    watch(program, {first: lambda x: rows.append(len(x))}, ctx)
    assert sum(rows) == len(TOKENS)


def test_no_tokens_no_moments(program):
    with pytest.raises(MissingCalibration):
        block_moments(program, {down(program): 32}, Context())


def test_what_does_not_fit_is_watched_in_pieces(program, ctx, monkeypatch):
    whole = block_moments(program, {down(program): 32}, ctx)
    monkeypatch.setattr(moments, "free_bytes", lambda device: -1)
    monkeypatch.setattr(moments, "_on_device", None)
    pieces = block_moments(program, {down(program): 32}, ctx)
    assert all(torch.equal(whole[node], pieces[node]) for node in whole)


def test_moments_that_do_not_fit_together_are_measured_in_parts(program, ctx, monkeypatch):
    blocks = {node.args[0]: 32 for node in program.nodes("linear") if not node.args[0].meta["val"].shape[-1] % 32}
    together = block_moments(program, blocks, ctx)
    runs = []
    watched = moments.watch
    monkeypatch.setattr(moments, "watch", lambda *given: runs.append(list(given[1])) or watched(*given))
    each = moments.moment_bytes(dict(list(blocks.items())[:1]))
    monkeypatch.setattr(moments, "free_bytes", lambda device: 1e9)
    block_moments(program, blocks, ctx)
    assert len(runs) == 1
    monkeypatch.setattr(moments, "SHARE", 0.0)
    monkeypatch.setattr(moments, "free_bytes", lambda device: 4 * each)
    found = block_moments(program, blocks, ctx)
    assert len(runs) > 2 and [node for part in runs[1:] for node in part] == list(blocks)
    assert all(moments.moment_bytes({node: 32 for node in part}) <= 4 * each for part in runs[1:] if len(part) > 1)
    assert all(torch.equal(together[node], found[node]) for node in blocks)
