"""``lower`` leaves no dialect op, gives the bits of their definitions, and knows no device."""

from __future__ import annotations

from functools import partial
from operator import getitem

import pytest
import torch
from torch import fx

import mxfx.ops
from mxfx.graph.execute import execute
from mxfx.graph.node import path_of
from mxfx.graph.program import Program
from mxfx.graph.tiny import FAMILIES, tiny
from mxfx.graph.trace import trace
from mxfx.graph.verify import verify
from mxfx.ops import RUNTIME_FUNCTIONS, find_op
from mxfx.ops.providers import _PROVIDERS, Provider, provide
from mxfx.passes import Lower, RotateQk, TransformInputs
from mxfx.rewrite import FactError, Rewriter, apply, find_fact
from tests.filecheck import check_printed
from tests.programs import RAISE, config_a, padded_batch, passed, raised, traced

aten = torch.ops.aten


pytestmark = pytest.mark.usefixtures("definitions")


def lowered(program: Program) -> Program:
    return apply(Lower(), program).program


@pytest.mark.parametrize("family", FAMILIES)
def test_only_aten_and_the_runtime_s_functions_are_left(family: str) -> None:
    program = lowered(raised(family))
    calls = {n.target for n in program.graph.nodes if n.op == "call_function"}
    strangers = [t for t in calls if not str(t).startswith("aten.") and t not in {*RUNTIME_FUNCTIONS, getitem}]
    assert strangers == []
    verify(program)


@pytest.mark.parametrize("family", ["llama-tiny", "gemma3-tiny", "olmo2-tiny"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_inlined_definitions_give_the_bits_of_the_eager_ops(family: str, dtype: torch.dtype) -> None:
    program = passed(raised(family), config_a()).twin(dtype)
    ids, mask, _ = padded_batch()
    assert torch.equal(execute(lowered(program), ids, None, mask), execute(program, ids, None, mask))


def test_a_norm_becomes_its_formula_and_roles_become_dtypes() -> None:
    check_printed(
        lowered(raised("llama-tiny").twin(torch.bfloat16)),
        """
        CHECK: model.layers.0.input_layernorm:
        CHECK-NEXT: %[[W:.+]] = aten._to_copy(%embedding, dtype=dtype.f32) : f32[batch, seq, 64] <lower>
        CHECK-NEXT: %[[P:.+]] = aten.pow.Tensor_Scalar(%[[W]], 2)
        CHECK-NEXT: %[[M:.+]] = aten.mean.dim(%[[P]], [-1], True)
        CHECK-NEXT: %[[E:.+]] = aten.add.Tensor(%[[M]], 1e-06)
        CHECK-NEXT: %[[R:.+]] = aten.rsqrt(%[[E]])
        CHECK-NEXT: %[[N:.+]] = aten.mul.Tensor(%[[W]], %[[R]])
        CHECK-NEXT: %[[B:.+]] = aten._to_copy(%[[N]], dtype=dtype.bf16)
        CHECK-NEXT: aten.mul.Tensor(@model.layers.0.input_layernorm.weight, %[[B]]) : bf16[batch, seq, 64]
        CHECK-NOT: mxfx.
        CHECK: return
        """,
    )


def test_all_layers_share_one_mask() -> None:
    check_printed(
        lowered(raised("qwen2-tiny")),
        """
        CHECK: %[[BIAS:.+]] = runtime.attention_bias(%attention_mask, %{{.+}}, True, None, None) : b1[batch, 1,
        CHECK: runtime.attend(%{{.+}}, %[[BIAS]], 0.25, True)
        CHECK-NOT: attention_bias(
        CHECK: runtime.attend(%{{.+}}, %[[BIAS]], 0.25, True)
        """,
    )


def test_layers_with_different_windows_have_a_mask_each_kind() -> None:
    model = tiny("gemma3-tiny", layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    program = lowered(passed(trace(model), RAISE))
    biases = [n for n in program.graph.nodes if n.target is mxfx.ops.attention_bias]
    assert len(biases) == 2 and {n.args[4] for n in biases} == {5, None}


def test_every_inlined_node_stays_in_its_module() -> None:
    program = lowered(raised("llama-tiny"))
    roots = [path_of(n) for n in program.graph.nodes if n.target is aten.rsqrt.default]
    assert roots == [path_of(n) for n in raised("llama-tiny").nodes("rms_norm")]


def test_a_float32_program_has_no_cast_that_changes_nothing() -> None:
    targets = (aten.to.dtype, aten._to_copy.default)
    casts = [n for n in lowered(raised("llama-tiny")).graph.nodes if n.target in targets]
    assert all(n.args[0].meta["val"].dtype != n.meta["val"].dtype for n in casts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fake_values_have_the_dtypes_of_the_run(dtype: torch.dtype) -> None:
    check_dtypes(lowered(raised("llama-tiny").twin(dtype)))


def check_dtypes(program: Program) -> None:
    ids, mask, _ = padded_batch()

    def observe(node: fx.Node, value: object) -> object:
        if isinstance(value, torch.Tensor):
            assert node.meta["val"].dtype == value.dtype, node.name
            assert node.meta["val"].dim() == value.dim(), node.name
        return value

    execute(program, ids, None, mask, observe=observe)


def test_in_float64_numbers_made_of_integers_and_of_two_parts_are_stated_as_they_are() -> None:
    """A length times a factor is float32 in ATen (RoPE "dynamic"); a pair of float64 is complex128 (Llama 4)."""
    program = raised("llama-tiny").twin(torch.float64)
    rw, (output,) = Rewriter(program, "test"), program.graph.find_nodes(op="output")
    call = partial(rw.call, like=output)
    (logits,), (ids, *_) = output.args, program.graph.find_nodes(op="placeholder")
    scaled = call(aten.mul.Tensor, ids, 0.5)
    cosine = call(aten.cos.default, call(torch.ops.mxfx.cast.default, scaled, "compute"))
    # Outside of a trace the fake result of polar has the sizes of the example.
    pair = call(aten.polar.default, cosine, scaled, val=cosine.meta["val"] + 0j)
    rw.replace(logits, call(aten.add.Tensor, logits, call(aten.unsqueeze.default, call(aten.real.default, pair), -1)))
    after = lowered(program)
    verify(after)
    check_dtypes(after)


def test_no_device_is_named() -> None:
    for node in lowered(passed(raised("gemma3-tiny"), config_a())).graph.nodes:
        assert not [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.device)], node.name


def test_a_hadamard_transform_becomes_a_product_with_its_stored_matrix() -> None:
    program = passed(raised("llama-tiny"), (RotateQk(),))
    after = lowered(program)
    matrices = [name for name in after.weights if name.startswith("hadamard.")]
    assert len(matrices) == 1 and matrices[0] in after.weights.constants
    ids, mask, _ = padded_batch()
    expected = execute(program, ids, None, mask)
    assert (execute(after, ids, None, mask) - expected).norm() < 1e-5 * expected.norm()


def test_a_hadamard_transform_of_high_order_becomes_products_with_two_small_matrices() -> None:
    model = tiny("llama-tiny", dtype=torch.float64, hidden_size=192, intermediate_size=256)
    program = passed(trace(model).twin(torch.float64), RAISE)
    program = passed(program, (TransformInputs(block=0),))
    after = lowered(program)
    shapes = {name: tuple(after.weights[name].shape) for name in after.weights if name.startswith("hadamard.")}
    assert shapes == {
        "hadamard.64": (64, 64),  # the attention's output: four heads of 16
        "hadamard.192.left": (12, 12),
        "hadamard.192.right": (16, 16),
        "hadamard.256.left": (16, 16),
        "hadamard.256.right": (16, 16),
    }
    ids, mask, _ = padded_batch()
    expected = execute(program, ids, None, mask)
    assert (execute(after, ids, None, mask) - expected).norm() < 1e-12 * expected.norm()


def test_a_provider_serves_its_device_and_its_nodes_alone() -> None:
    def wide_norm(x, weight, eps, offset=0.0, gain_first=False):
        return mxfx.ops.rms_norm(x, weight, eps, offset, gain_first)

    takes = lambda x, weight, eps, *rest: None if eps == 0.5 else f"eps is {eps}, not 0.5"  # noqa: E731
    try:
        provide(Provider("test", "rms_norm", "cpu", wide_norm, takes))
        provide(Provider("elsewhere", "rope", "cuda", wide_norm))
        given = raised("llama-tiny").copy()
        last = next(n for n in given.nodes("rms_norm") if path_of(n) == "model.norm")
        last.args = (*last.args[:2], 0.5)
        applied = apply(Lower(), given)
        assert [path_of(n) for n in applied.program.graph.nodes if n.target is wide_norm] == ["model.norm"]
        ids, _, _ = padded_batch()
        assert torch.equal(execute(applied.program, ids), execute(given, ids))
        told = {row["path"]: (row["provider"], row["reason"]) for row in applied.record.details["providers"]}
        assert told["model.norm"] == ("test", "")
        assert told["model.layers.0.input_layernorm"] == (None, "test: eps is 1e-06, not 0.5")
    finally:
        del _PROVIDERS[-2:]


def test_it_needs_a_raised_program_that_is_not_lowered() -> None:
    with pytest.raises(FactError, match="requires 'raised'"):
        lowered(traced("llama-tiny"))
    with pytest.raises(FactError, match="before 'lowered' holds"):
        lowered(lowered(raised("llama-tiny")))


def test_the_fact_names_what_is_left() -> None:
    assert "is not lowered" in str(find_fact("lowered").check(raised("llama-tiny")))


def test_each_op_is_a_match() -> None:
    program = raised("llama-tiny")
    ops = [n for n in program.graph.nodes if n.op == "call_function" and find_op(n.target)]
    assert len(apply(Lower(), program).record.matches) == len(ops)
