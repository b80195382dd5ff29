"""What a ring holds, and that any pieces of a text give what attention over all of it gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mxfx.formats import parse
from mxfx.ops import attention, cached_attention
from mxfx.ops.cache import slots_held


def test_a_ring_holds_the_last_slots() -> None:
    before_several, one = torch.arange(7, 10), torch.tensor([7])
    assert slots_held(before_several, 5).tolist() == [5, 6, 2, 3, 4]
    assert slots_held(one, 5).tolist() == [5, 6, 7, 3, 4]
    assert slots_held(torch.arange(2, 4), 5).tolist() == [0, 1, -3, -2, -1]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"window": 4},
        {"chunk": 4},
        {"softcap": 2.0, "window": 4},
        {"sinks": torch.linspace(-3, 1, 6).double()},
        {"sinks": torch.linspace(-3, 1, 2 * 6 * 13).double().reshape(2, 6, 13, 1)},
    ],
    ids=lambda given: "-".join(given) or "causal",
)
@pytest.mark.parametrize("chunks", [(13,), (5, 8), (1,) * 13, (3, 1, 1, 7, 1)])
def test_any_chunks_give_what_attention_over_everything_gives(chunks: tuple[int, ...], limits: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 13, 8, generator=generator, dtype=torch.float64) for heads in (6, 2))
    v = torch.randn(2, 2, 13, 12, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[1, :6] = 0
    expected = attention(q, k, v, mask, 0.3, **limits)
    window = limits.get("window") or limits.get("chunk")
    room = window or 13
    keys, values = k.new_zeros(2, 2, room, 8), v.new_zeros(2, 2, room, 12)
    start, parts = 0, []
    for length in chunks:
        new = slice(start, start + length)
        held = slice(None, start + length if window is None else None)
        caches = (keys[:, :, held], values[:, :, held], None, None)
        x = (q[:, :, new], k[:, :, new], v[:, :, new])
        own = {n: one[:, :, new] if n == "sinks" and one.dim() == 4 else one for n, one in limits.items()}
        parts.append(cached_attention(*x, mask[:, : new.stop], torch.arange(start, new.stop), *caches, 0.3, **own))
        start = new.stop
    real = mask.bool()[:, None, :, None].expand_as(expected)
    torch.testing.assert_close(torch.cat(parts, 2)[real], expected[real], rtol=1e-12, atol=1e-12)


def test_on_a_device_the_kernels_are_found() -> None:
    """No CI has a device, and a name that was moved would be missed there first."""
    from types import SimpleNamespace

    from mxfx.ops.cache import _kernels

    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 2, 1, 64))
    found = _kernels(x, x, x, parse("mxint4@32"), None)  # type: ignore[arg-type]
    assert found is not None and [one.__name__ for one in found] == ["write_tokens", "attend_token"]
    assert _kernels(x, x, x, parse("mxint3@32"), None) is None  # type: ignore[arg-type]


@pytest.mark.triton
def test_the_tokens_of_a_long_text_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its axes the first is as long as that; the others end at 65535."""
    from mxfx.ops.kernels import cache_rows_triton

    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **constants: None

    monkeypatch.setattr(cache_rows_triton, "_write_kernel", Recorder())
    x = torch.empty(1, 2, 1, 8).expand(1, 2, 70_000, 8)
    cache_rows_triton.write_tokens((x, x, None, None), x, x, torch.arange(1).expand(70_000), None, None)
    assert grids == [(70_000, 2, 2)]
