"""What fused ops state of their results without computing them."""

from __future__ import annotations

import pytest
import torch

from mxfx.ops import fused
from mxfx.ops.dialect import all_ops

FORMAT = "mxint4@32/mse"
X, HEADS = torch.randn(2, 5, 64), torch.randn(2, 3, 5, 64)
GAIN, MATRIX, ANGLES = torch.ones(64, dtype=torch.float64), torch.eye(32), torch.randn(2, 5, 64)

GIVEN = {
    "transform_quantize": (X, MATRIX, FORMAT),
    "hadamard_quantize": (X, 32, FORMAT),
    "norm_quantize": (X, GAIN, MATRIX, FORMAT, 1e-6),
    "silu_mul_quantize": (X, X, None, FORMAT),
    "rope_quantize": (HEADS, ANGLES, ANGLES, None, FORMAT),
}


def _record(name: str):
    return all_ops()[f"mxfx.{name}.default"]


def test_every_fused_op_is_here() -> None:
    assert GIVEN.keys() == fused.FUSED


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stated_is_what_the_definition_gives(name: str, dtype: torch.dtype) -> None:
    given = [t.to(dtype) if isinstance(t, torch.Tensor) and t is not GAIN else t for t in GIVEN[name]]
    stated, found = _record(name).shape(*given), _record(name).definition(*given)
    assert (stated.shape, stated.dtype) == (found.shape, found.dtype)


@pytest.mark.parametrize("name", ["transform_quantize", "norm_quantize"])
def test_a_matrix_that_does_not_fit_is_refused(name: str) -> None:
    given = [torch.eye(48) if t is MATRIX else t for t in GIVEN[name]]
    with pytest.raises(ValueError, match="blocks of 48 do not divide"):
        _record(name).shape(*given)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="mxint99"):
        _record("transform_quantize").shape(X, MATRIX, "mxint99@32")
