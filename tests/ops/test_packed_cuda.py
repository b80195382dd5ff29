"""Packed products on a GPU: a norm that adds, kernels that start early: both have the right bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxfx.formats import parse
from mxfx.formats.stored import store
from mxfx.ops.kernels import packed

pytestmark = pytest.mark.cuda
FORMAT, HIDDEN, INNER = "mxint4@32/mse", 2048, 8192


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to("cuda", torch.bfloat16)


def weights(width: int, *channels: int) -> tuple[list[Tensor], list[Tensor]]:
    stored = [
        store(parse(FORMAT).fake_quantize(random(n, width, seed=n) / width**0.5), parse(FORMAT)) for n in channels
    ]
    return [part[0] for part in stored], [part[1] for part in stored]  # type: ignore[index]


def transform(width: int) -> Tensor:
    return random(width // 32, 32, 32, seed=width) / 32**0.5


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 7, 9, 16, 40, 700])
def test_a_norm_of_a_sum_has_the_bits_of_both(rows: int, own: bool) -> None:
    x, branch = random(rows, 1, HIDDEN), random(rows, 1, HIDDEN, seed=1)
    codes, scales = weights(HIDDEN, 256, 128)
    rest = (None if own else random(HIDDEN), transform(HIDDEN) if own else None, FORMAT, 1e-5)
    total, y = packed.ADD_NORM_LINEAR(codes, scales, [], branch, FORMAT, x, *rest)
    assert torch.equal(total, x + branch)
    assert torch.equal(y, packed.NORM_LINEAR(codes, scales, [], None, FORMAT, x + branch, *rest))


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_kernels_that_start_early_read_what_is_written(rows: int) -> None:
    """Layers in a recorded graph, replayed, against the same ops one by one, each waited for."""
    ops = torch.ops.mxfx_kernels
    qkv, o = weights(HIDDEN, 2048, 512, 512), weights(HIDDEN, 2048)
    wide, down = weights(HIDDEN, INNER, INNER), weights(INNER, HIDDEN)
    of_hidden, of_inner = transform(HIDDEN), transform(INNER)
    x, branch = random(rows, 1, HIDDEN), random(rows, 1, HIDDEN, seed=1)

    def layers(waited: bool) -> list[Tensor]:
        total, given, kept = x, branch, []
        for _ in range(4):
            for linears, inner in ((qkv, HIDDEN), (wide, INNER)):
                found = packed.ADD_NORM_LINEAR(*linears, [], given, FORMAT, total, None, of_hidden, FORMAT, 1e-5)
                total, y = found
                if waited:
                    torch.cuda.synchronize()
                if inner == INNER:
                    parts = (y[..., :INNER], y[..., INNER:], of_inner, FORMAT)
                    given = ops.silu_mul_quantize_linear(*down, [], None, FORMAT, *parts)
                else:
                    y = y[..., :HIDDEN].contiguous()
                    given = ops.transform_quantize_linear(*o, [], None, FORMAT, y, of_hidden, FORMAT)
                if waited:
                    torch.cuda.synchronize()
                kept += [total, y, given]
        return kept

    wanted = layers(True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers(False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers(False)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
