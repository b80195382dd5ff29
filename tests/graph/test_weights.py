"""The weight store: copy on write, aware of ties, every change in the ledger."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mxfx.graph import weights as weights_module
from mxfx.graph.tiny import tiny
from mxfx.graph.trace import trace
from mxfx.graph.weights import UnknownWeight, WeightStore, tensor_hash
from mxfx.passes import FuseNorm
from mxfx.runtime.causal_lm import emit
from tests.programs import RAISE, config_a, padded_batch, passed, traced


def store(**tensors: torch.Tensor) -> WeightStore:
    given = tensors or {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    return WeightStore(given, {"alias": next(iter(given))})


def test_an_alias_reads_the_tensor_of_its_home() -> None:
    weights = store()
    assert weights["alias"] is weights["a"]
    assert weights.canonical("alias") == "a"
    assert weights.tied_to("a") == ("alias",) and weights.tied_to("alias") == ("a",)
    assert list(weights) == ["a", "b"] and "alias" in weights


def test_a_change_reaches_every_name_and_leaves_the_old_tensor_alone() -> None:
    original = torch.arange(4.0)
    weights = store(a=original)
    weights.set("alias", torch.zeros(4), by="test")
    assert torch.equal(weights["a"], torch.zeros(4)) and torch.equal(original, torch.arange(4.0))


def test_storing_the_old_tensor_written_in_place_is_a_copy() -> None:
    original = torch.arange(4.0)
    weights = store(a=original)
    weights.set("a", original, by="test")
    assert weights["a"].data_ptr() != original.data_ptr()


def test_the_ledger_tells_pass_name_hashes_and_relative_error() -> None:
    weights = store(a=torch.tensor([3.0, 4.0]))
    weights.set("alias", torch.tensor([3.0, 4.5]), by="round-weights")
    (entry,) = weights.ledger
    assert (entry.pass_name, entry.weight) == ("round-weights", "a")
    assert entry.before == tensor_hash(torch.tensor([3.0, 4.0])) != entry.after
    assert entry.error == pytest.approx(0.1)


def test_masters_are_kept_in_float32_or_better_and_never_drift_in_bfloat16() -> None:
    weights = store(a=torch.ones(2, dtype=torch.bfloat16))
    assert weights.master("a").dtype == torch.float32
    weights.set("a", torch.full((2,), 1.001, dtype=torch.float64), by="test")
    assert weights["a"].dtype == torch.float32
    assert weights["a"][0] != weights["a"].bfloat16()[0]


def test_the_twin_in_float64_keeps_masters_in_float64() -> None:
    twin = store(a=torch.ones(2)).cast(torch.float64)
    twin.set("a", torch.full((2,), 1 + 1e-12, dtype=torch.float64), by="test")
    assert twin["a"][0] == 1 + 1e-12


def test_untying_gives_the_alias_a_tensor_of_its_own() -> None:
    weights = store()
    weights.untie("alias", by="fuse-norm")
    weights.set("alias", torch.zeros(4), by="fuse-norm")
    assert torch.equal(weights["a"], torch.arange(4.0))
    assert weights.aliases == {} and weights.tied_to("a") == ()


def test_untying_the_home_leaves_its_aliases_together() -> None:
    weights = WeightStore({"a": torch.arange(4.0)}, {"b": "a", "c": "a"})
    weights.untie("a", by="test")
    weights.set("a", torch.zeros(4), by="test")
    assert torch.equal(weights["b"], torch.arange(4.0)) and weights["b"] is weights["c"]


def test_what_is_not_tied_cannot_be_untied() -> None:
    with pytest.raises(ValueError, match="'b' is not tied"):
        store().untie("b", by="test")


def test_a_copy_and_its_origin_do_not_see_each_other() -> None:
    weights = store()
    twin = weights.copy()
    twin.set("a", torch.zeros(4), by="test")
    twin.add("new", torch.ones(1), by="test", constant=True)
    twin.untie("alias", by="test")
    assert torch.equal(weights["a"], torch.arange(4.0))
    assert list(weights) == ["a", "b"] and weights.aliases == {"alias": "a"}
    assert weights.ledger == [] and weights.constants == frozenset()


def test_dropping_a_weight_drops_its_aliases() -> None:
    weights = store()
    weights.drop("alias")
    assert "a" not in weights and "alias" not in weights


def test_unknown_and_taken_names_are_refused() -> None:
    weights = store()
    with pytest.raises(UnknownWeight, match="no weight named 'nope' in a store of 2"):
        weights["nope"]
    with pytest.raises(UnknownWeight):
        weights.set("nope", torch.ones(1), by="test")
    with pytest.raises(ValueError, match="'alias' exists"):
        weights.add("alias", torch.ones(1), by="test")


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(6.0).reshape(2, 3).T, torch.tensor(2.5), torch.ones(3, dtype=torch.bfloat16), torch.zeros(0, 4)],
    ids=["strided", "scalar", "bfloat16", "empty"],
)
def test_the_hash_is_that_of_dtype_shape_and_values(tensor: torch.Tensor) -> None:
    assert tensor_hash(tensor) == tensor_hash(tensor.clone().contiguous())
    assert tensor_hash(tensor) != tensor_hash(tensor.to(torch.float64))
    assert tensor_hash(tensor) != tensor_hash(tensor[None])


def test_the_hash_is_the_same_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(3, 1 << 19, generator=torch.Generator().manual_seed(0))
    expected = tensor_hash(tensor)
    with ThreadPoolExecutor(1) as one:
        monkeypatch.setattr(weights_module, "_threads", lambda: one)
        assert tensor_hash(tensor) == expected
        changed = tensor.clone()
        changed[2, -1] = 0
        assert tensor_hash(changed) != expected


def test_the_store_keeps_no_tensor_alive_for_its_hash() -> None:
    weights = WeightStore({"a": torch.ones(2)})
    weights.set("a", torch.zeros(2), by="test")
    old = weakref.ref(weights["a"])
    weights.set("a", torch.ones(2), by="test")
    assert old() is None


def test_the_hash_sees_the_sign_of_zero_and_meta_has_none() -> None:
    assert tensor_hash(torch.tensor([0.0])) != tensor_hash(torch.tensor([-0.0]))
    assert tensor_hash(torch.empty(3, device="meta")) == "meta"


def test_a_whole_pipeline_leaves_the_bytes_of_the_model_alone() -> None:
    hf = tiny("llama-tiny", dtype=torch.bfloat16)
    before = {name: tensor_hash(tensor) for name, tensor in hf.state_dict().items()}
    program = passed(trace(hf), (*RAISE, FuseNorm(), *config_a()))
    emit(program)(*padded_batch()[:1])
    assert {name: tensor_hash(tensor) for name, tensor in hf.state_dict().items()} == before
    assert {change.pass_name for change in program.weights.ledger} == {"fuse-norm", "round-weights"}


def test_a_pipeline_leaves_the_program_that_it_started_from_alone() -> None:
    program = traced("llama-tiny")
    before = {name: program.weights.hash(name) for name in program.weights}
    passed(program, (*RAISE, *config_a()))
    assert {name: tensor_hash(program.weights[name]) for name in program.weights} == before
    assert program.weights.ledger == [] and program.facts == frozenset()
