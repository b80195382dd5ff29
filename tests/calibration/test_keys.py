"""Keys follow everything upstream of a node and nothing else, however often they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from mxfx.calibration.keys import Keys

aten = torch.ops.aten


def _graph() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """relu(x w) → sum, beside an add that nothing reads."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    w, v = graph.create_node("get_attr", "w"), graph.create_node("get_attr", "v")
    mm = graph.call_function(aten.mm.default, (x, w))
    relu = graph.call_function(aten.relu.default, (mm,))
    end = graph.call_function(aten.sum.default, (relu,))
    aside = graph.call_function(aten.add.Tensor, (mm, v))
    return graph, {"x": x, "w": w, "v": v, "mm": mm, "relu": relu, "end": end, "aside": aside}


def _target(nodes: dict[str, fx.Node]) -> None:
    nodes["relu"].target = aten.silu.default


def _operand(nodes: dict[str, fx.Node]) -> None:
    nodes["relu"].args = (nodes["x"],)


def _insert(nodes: dict[str, fx.Node]) -> None:
    with nodes["relu"].graph.inserting_before(nodes["relu"]):
        new = nodes["relu"].graph.call_function(aten.neg.default, (nodes["mm"],))
    nodes["relu"].replace_input_with(nodes["mm"], new)


def _keyword(nodes: dict[str, fx.Node]) -> None:
    nodes["end"].kwargs = {"dtype": torch.float64}


@pytest.mark.parametrize("edit", [_target, _operand, _insert, _keyword])
def test_an_edit_upstream_changes_the_key_and_taking_it_back_restores_it(edit: Callable) -> None:
    _, nodes = _graph()
    keys = Keys()
    before = keys.key([nodes["end"]], str, {})
    edit(nodes)
    after = keys.key([nodes["end"]], str, {})
    assert after != before
    assert after == Keys().key([nodes["end"]], str, {}), "remembered digests and fresh ones agree"


def test_an_edit_is_noticed_by_every_cone_that_holds_the_node() -> None:
    _, nodes = _graph()
    keys = Keys()
    first = [keys.key([nodes[name]], str, {}) for name in ("relu", "end")]
    _insert(nodes)
    second = [keys.key([nodes[name]], str, {}) for name in ("relu", "end")]
    assert all(old != new for old, new in zip(first, second, strict=True))
    hashes = {"w": "other", "v": "v"}
    third = [keys.key([nodes[name]], hashes.__getitem__, {}) for name in ("end", "relu")]
    assert third == [Keys().key([nodes[name]], hashes.__getitem__, {}) for name in ("end", "relu")]


def test_weights_upstream_count_and_no_other_is_looked_at() -> None:
    _, nodes = _graph()
    keys = Keys()
    asked: list[str] = []

    def hash_of(name: str) -> str:
        asked.append(name)
        return f"{name}, {version}"

    version = 1
    one = keys.key([nodes["end"]], hash_of, {})
    assert set(asked) == {"w"}
    version = 2
    assert keys.key([nodes["end"]], hash_of, {}) != one
    version = 1
    # Another cone has brought the shared nodes up to date meanwhile.
    keys.key([nodes["aside"]], hash_of, {})
    assert keys.key([nodes["end"]], hash_of, {}) == one


def test_edits_downstream_and_beside_change_nothing() -> None:
    graph, nodes = _graph()
    keys = Keys()
    before = keys.key([nodes["relu"]], str, {})
    nodes["end"].target = aten.mean.default
    graph.erase_node(nodes["aside"])
    assert keys.key([nodes["relu"]], str, {}) == before == Keys().key([nodes["relu"]], str, {})


def test_data_counts_and_the_order_of_targets_does_not() -> None:
    _, nodes = _graph()
    keys = Keys()
    both = [nodes["end"], nodes["aside"]]
    assert keys.key(both, str, {}) == keys.key(both[::-1], str, {})
    assert keys.key(both, str, {}) != keys.key(both[:1], str, {})
    assert keys.key(both, str, {"tokens": "1"}) != keys.key(both, str, {"tokens": "2"})
