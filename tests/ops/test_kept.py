"""What kernels keep on a device is made once, by a call that runs: not traced, not recorded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import mxfx.ops  # noqa: F401
from mxfx.ops.kernels.kept import Kept, RecordingError

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


def test_a_gradient_that_is_compiled_leaves_those_that_are_not_theirs() -> None:
    """The derivative of a transform reads the signs of its matrix, and is traced with fake tensors."""
    op, x = torch.ops.mxfx_kernels.hadamard, torch.randn(3, 48, requires_grad=True)
    torch._dynamo.reset()
    for turn in (1.0, 2.0):
        compiled = torch.compile(lambda x, turn=turn: op(x * turn, 24), backend="aot_eager", fullgraph=True)
        compiled(x).square().sum().backward()
        found, x.grad = x.grad, None
        op(x * turn, 24).square().sum().backward()
        torch.testing.assert_close(found, x.grad)
        x.grad = None
