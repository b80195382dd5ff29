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


def spread(rows: int, width: int, octaves: int, seed: int, text: str) -> Tensor:
    """Rows on a grid whose blocks' exponents lie up to so many octaves apart."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-octaves, 1, (rows, width // 32, 1), generator=generator)
    x = torch.randn(rows, width // 32, 32, generator=generator) * torch.exp2(exponents)
    return parse(text).fake_quantize(x.view(rows, width)).to("cuda")


HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="its sums are another's"
)


@HOPPER
@pytest.mark.parametrize("text", ["mxint4@32", "mxfp4_e2m1@32"])
@pytest.mark.parametrize(
    ("rows", "width", "channels"), [(20, 2080, 520), (200, 576, 1536), (1000, 2048, 640), (5000, 2080, 2048)]
)
def test_results_of_many_rows_are_those_of_float64(rows: int, width: int, channels: int, text: str) -> None:
    x, weight = spread(rows, width, 5, 0, text), spread(channels, width, 5, 1, text)
    codes, scales = store(weight, parse(text))  # type: ignore[misc]
    payload, factors = torch.ops.mxfx_kernels.e4m3_rows(x)
    bias = random(channels).float()
    wanted = x.double() @ weight.double().t()

    def product(biases: list[Tensor], dtype: torch.dtype) -> Tensor:
        return packed.LINEAR_E4M3(payload, factors, [codes], [scales], biases, text, dtype)

    assert torch.equal(product([], torch.float32), wanted.float())
    assert torch.equal(product([], torch.bfloat16), wanted.float().bfloat16())
    assert torch.equal(product([bias.bfloat16()], torch.bfloat16), (wanted.float() + bias.bfloat16()).bfloat16())
    residual, op = random(rows, channels), torch.ops.mxfx_kernels.fake_quantize_linear
    found = op([codes], [scales], [], residual, text, x.bfloat16(), text, -1)
    # Of MXINT4 rounded once more a block whose least entry is -8 lies on another grid.
    again = parse(text).fake_quantize(x.bfloat16())
    assert torch.equal(found, residual + (again.double() @ weight.double().t()).float().bfloat16())
    half = channels // 2 // 8 * 8
    parts = ([codes[:half], codes[half:]], [scales[:half], scales[half:]])
    assert torch.equal(op(*parts, [], residual, text, x.bfloat16(), text, -1), found)


@HOPPER
def test_a_row_that_is_not_finite_gives_nan_and_no_other() -> None:
    x = spread(300, 2048, 3, 0, FORMAT)
    codes, scales = weights(2048, 512)
    x[7, 3] = float("inf")
    payload, factors = torch.ops.mxfx_kernels.e4m3_rows(x)
    found = packed.LINEAR_E4M3(payload, factors, codes, scales, [], FORMAT, torch.bfloat16)
    assert found.isnan().any(-1).nonzero().flatten().tolist() == [7] and found[7].isnan().all()


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
