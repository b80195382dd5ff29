"""A weight that is hashed and brought home beside the work is the same as one that is not."""

from __future__ import annotations

import pytest
import torch

from mxfx.graph.weights import WeightStore, hash_beside, tensor_hash

_W = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))


def _store() -> WeightStore:
    return WeightStore({"w": torch.ones(300, 1000), "v": torch.ones(4)})


def test_bytes_and_hash_come_together() -> None:
    home = torch.empty_like(_W)
    assert hash_beside(_W, home).result() == tensor_hash(_W)
    assert torch.equal(home, _W)


@pytest.mark.parametrize("columns", [1000, 2000])
def test_the_ledger_is_as_if_it_was_done_at_once(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, beside = _store(), _store()
    new = torch.cat([_W] * (columns // 1000), 1)
    plain.set("w", new, "a")
    monkeypatch.setattr("mxfx.graph.weights._beside_work", lambda tensor, kept_on: True)
    beside.set("w", new, "a", was=torch.ones(300, 1000))
    assert beside.hash("w") == plain.hash("w")
    assert beside.ledger == plain.ledger and beside.copy().ledger == plain.ledger
    assert torch.equal(beside["w"], new)


def test_a_tensor_on_its_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a device: another tensor stands behind the name at once, its bytes come later."""
    store = _store()
    before = store.behind("w")
    home = torch.zeros_like(_W)
    store._tensors["w"] = home
    store._arriving["w"] = hash_beside(_W, home)
    assert store.behind("w") is home is not before
    assert torch.equal(store["w"], _W)
    assert not store._arriving
