"""What is kept on a device is made once, by a call that runs: not traced, not recorded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import mxfx.ops  # noqa: F401
from mxfx.formats import parse
from mxfx.formats.stored import store
from mxfx.ground.kept import Kept, RecordingError

CPU = torch.device("cpu")


@pytest.fixture
def ones() -> Kept[Tensor]:
    def ones_of(size: int, device: torch.device) -> Tensor:
        return torch.ones(size, device=device)

    return Kept(ones_of)


def test_one_is_made_for_a_key_by_however_many_threads(ones: Kept[Tensor]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda size: ones(size, CPU), [3, 4] * 50))
    assert len({id(one) for one in found}) == len(list(ones)) == 2


def test_what_is_first_asked_for_in_inference_serves_training(ones: Kept[Tensor]) -> None:
    with torch.inference_mode():
        assert not ones(3, CPU).is_inference()


def test_a_recording_may_read_what_is_kept_and_not_make_it(ones: Kept[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    before = ones(3, CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ones(3, CPU) is before
    with pytest.raises(RecordingError, match="ones_of of 4, cpu is first asked for while a CUDA graph is recorded"):
        ones(4, CPU)
    assert len(list(ones)) == 1


FOUR = parse("mxint4@32")
CODES, SCALES = store(FOUR.fake_quantize(torch.randn(24, 64)), FOUR)  # type: ignore[misc]


@pytest.mark.parametrize(
    "op",
    [
        # The derivatives read the signs of a matrix, and the numbers that codes stand for; they are traced.
        lambda x: torch.ops.mxfx_kernels.hadamard(x, 32),
        lambda x: torch.ops.mxfx.mx_linear(x, CODES, SCALES, None, "mxint4@32"),
    ],
    ids=["transform", "packed weight"],
)
def test_a_gradient_that_is_compiled_leaves_those_that_are_not_theirs(op: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    torch._dynamo.reset()
    for turn in (1.0, 2.0):
        compiled = torch.compile(lambda x, turn=turn: op(x * turn), backend="aot_eager", fullgraph=True)
        compiled(x).square().sum().backward()
        found, x.grad = x.grad, None
        op(x * turn).square().sum().backward()
        torch.testing.assert_close(found, x.grad)
        x.grad = None
