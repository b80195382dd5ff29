"""The CUDA kernel gives what the vectorized CPU path gives, and `solve_block` takes it for CUDA tensors."""

import pytest
import torch

from mxfx.algorithms.block_solver import solve_block
from mxfx.algorithms.gptq_solver import candidate_scales
from mxfx.formats import parse
from tests.algorithms.one_weight import gptq
from tests.algorithms.synthetic_layer import correlated_layer

pytestmark = pytest.mark.cuda

CASES = [
    ("mxint4@32", 32),
    ("mxint4@32/ceil", 32),
    ("mxint8@16", 16),
    ("mxfp4_e2m1@32", 32),
    ("mxfp6_e3m2@100", 100),
    ("mxfp8_e4m3@32", 20),
    ("minifloat_e3m4", 128),
]


@pytest.mark.parametrize(("name", "width"), CASES)
def test_kernel_equals_the_cpu_path(name: str, width: int) -> None:
    fmt = parse(name)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(2, width, width, generator=generator) / width**0.5 + 2 * torch.eye(width)
    feedback = mixed.triu() / mixed.diagonal(dim1=1, dim2=2)[:, :, None]
    precision = torch.rand(2, width, generator=generator) + 0.5
    columns = torch.randn(2, width, 700, generator=generator)
    searched = "@" in name and "ceil" not in name
    candidates = None if searched else candidate_scales(columns, fmt, "sweep")
    expected = solve_block(columns, candidates, feedback, precision, fmt)
    given = [None if tensor is None else tensor.cuda() for tensor in (columns, candidates, feedback, precision)]
    found = solve_block(*given, fmt)
    # A fused multiply-add may move a value across a rounding boundary once in a while.
    assert (found.values.cpu() != expected.values).float().mean() < 1e-3
    assert (found.scales.cpu() != expected.scales).float().mean() < 1e-3


@pytest.mark.parametrize("refine", [0, 2])
def test_whole_solve_has_the_loss_of_the_cpu(refine: int) -> None:
    weight, hessian = correlated_layer(64, 160)
    fmt = parse("mxint4@32")
    expected = gptq(weight, hessian, fmt, refine=refine)
    found = gptq(weight.cuda(), hessian.cuda(), fmt, refine=refine)
    assert found.loss == pytest.approx(expected.loss, rel=0.02)
