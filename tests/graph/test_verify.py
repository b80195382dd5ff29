"""The verifier accepts every healthy program and catches every damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from mxfx.formats import parse
from mxfx.graph.node import META_KEY, Annotation, info, set_info
from mxfx.graph.program import Program, Symbol
from mxfx.graph.trace import trace
from mxfx.graph.verify import VerifyError, verify
from mxfx.rewrite import Rewriter
from mxfx.rewrite.rewriter import clean
from tests.mixtures import mixture

aten = torch.ops.aten
Damage = Callable[[Program], None]
_DAMAGES: list[tuple[str, str, Damage, str]] = []


def damage(stage: str, message: str) -> Callable[[Damage], Damage]:
    def add(function: Damage) -> Damage:
        _DAMAGES.append((function.__name__, stage, function, message))
        return function

    return add


def node(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


def first(program: Program, target: object) -> fx.Node:
    return next(n for n in program.graph.nodes if n.target == target)


def called(program: Program, like: fx.Node, target: object, *args: object, val: object = None) -> fx.Node:
    """A node with a record and a value, read by whoever read ``like``."""
    with program.graph.inserting_after(like):
        new = program.graph.call_function(target, args)
    new.meta = {META_KEY: info(like), "val": like.meta["val"] if val is None else val}
    like.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


# structure


@damage("raised", "opcode")
def a_call_module_node(program):
    linear = node(program, "linear")
    with program.graph.inserting_after(linear):
        program.graph.create_node("call_method", "relu", (linear,))


@damage("raised", "comes later")
def a_read_before_the_definition(program):
    node(program, "linear").append(node(program, "rms_norm_default"))


@damage("raised", "not in this graph")
def a_read_from_another_graph(program):
    node(program, "linear").update_arg(0, node(program.copy(), "rms_norm_default"))


@damage("raised", "does not list it as a reader")
def a_reader_that_is_not_listed(program):
    del node(program, "rms_norm_default").users[node(program, "linear")]


@damage("raised", "does not read it")
def a_listed_reader_that_reads_something_else(program):
    node(program, "embedding").users[node(program, "linear_13")] = None


@damage("raised", "are named")
def two_nodes_of_one_name(program):
    node(program, "linear_1").name = "linear_2"


@damage("raised", "nobody reads it")
def a_dead_node(program):
    linear = node(program, "linear")
    with program.graph.inserting_after(linear):
        dead = program.graph.call_function(aten.neg.default, (linear,))
    dead.meta = dict(linear.meta)


@damage("raised", "0 outputs")
def a_missing_output(program):
    program.graph.erase_node(node(program, "output"))


@damage("raised", "as its last node")
def a_node_behind_the_output(program):
    node(program, "output").append(node(program, "linear_14"))
    node(program, "output").args = (node(program, "linear_13"),)


@damage("raised", "return the node of the logits")
def an_output_that_returns_a_tuple(program):
    output = node(program, "output")
    output.args = ((output.args[0],),)


@damage("raised", "first three must be")
def inputs_in_another_order(program):
    node(program, "input_ids").target = "attention_mask"


@damage("raised", "no default")
def an_input_without_default(program):
    node(program, "position_ids").args = ()


@damage("raised", "empty range")
def a_symbol_with_an_empty_range(program):
    program.symbols = (Symbol("batch", 4, 2), program.symbols[1])


# metadata


@damage("raised", "no provenance record")
def a_node_without_record(program):
    del node(program, "linear").meta[META_KEY]


@damage("raised", "no fake value")
def a_node_without_value(program):
    del node(program, "linear").meta["val"]


@damage("raised", "real tensor")
def a_real_tensor_as_value(program):
    node(program, "linear").meta["val"] = torch.zeros(2, 17, 64)


# weights


@damage("raised", "no weight 'model.nowhere.weight'")
def a_dangling_get_attr(program):
    first(program, "model.norm.weight").target = "model.nowhere.weight"


@damage("raised", "read by no node")
def an_orphan_weight(program):
    program.weights.add("forgotten", torch.zeros(3), "test")


@damage("raised", "read by no node")
def an_orphan_constant_of_a_pass(program):
    program.weights.add("matrix", torch.eye(3), "test", constant=True)


@damage("raised", "no weight 'lm_head.weight'")
def a_tie_forgotten(program):
    program.weights._aliases.clear()


@damage("raised", "which is no weight")
def an_alias_that_leads_nowhere(program):
    program.weights._aliases["lm_head.weight"] = "model.nowhere.weight"


@damage("raised", "a weight of its own")
def an_alias_that_is_also_a_weight(program):
    program.weights._tensors["lm_head.weight"] = program.weights["model.embed_tokens.weight"].clone()


@damage("raised", "share memory")
def a_tie_that_the_alias_table_lost(program):
    program.weights._aliases.clear()
    program.weights._tensors["lm_head.weight"] = program.weights["model.embed_tokens.weight"]
    first(program, "lm_head.weight").meta["val"]
    linear = node(program, "linear_14")
    with program.graph.inserting_before(node(program, "embedding")):
        other = program.graph.create_node("get_attr", "model.embed_tokens.weight")
    other.meta = dict(linear.args[1].meta)
    node(program, "embedding").update_arg(0, other)


@damage("raised", "states the shape")
def a_weight_reshaped_behind_its_node(program):
    program.weights.set("model.norm.weight", torch.ones(65), "test")


@damage("raised", "runs in torch.bfloat16")
def a_weight_node_of_another_dtype(program):
    read = first(program, "model.norm.weight")
    read.meta["val"] = read.meta["val"].to(torch.float32)


@damage("quantized", "not what the ledger says")
def a_weight_changed_behind_the_ledger(program):
    name = "model.layers.0.mlp.up_proj.weight"
    program.weights._tensors[name] = program.weights[name] * 2


# schema


@damage("raised", "operand 'weight' is missing")
def too_few_operands(program):
    linear = node(program, "linear")
    linear.args = linear.args[:1]


@damage("raised", "the op takes 3")
def too_many_operands(program):
    linear = node(program, "linear")
    linear.args = (*linear.args, None, 1)


@damage("raised", "no operand 'wait'")
def an_unknown_keyword(program):
    node(program, "linear").kwargs = {"wait": 1}


@damage("raised", "given twice")
def an_operand_given_twice(program):
    linear = node(program, "linear")
    linear.kwargs = {"input": linear.args[0]}


@damage("raised", "expected Tensor")
def a_string_for_a_tensor(program):
    node(program, "linear").update_arg(0, "x")


@damage("raised", "expected float")
def a_tensor_for_a_number(program):
    norm = node(program, "rms_norm_default")
    norm.update_arg(2, norm.args[0])


@damage("raised", "names the device")
def a_device_literal(program):
    linear = node(program, "linear")
    called(program, linear, aten.zeros_like.default, linear).kwargs = {"device": torch.device("cpu")}


@damage("raised", "names the dtype")
def a_dtype_literal(program):
    linear = node(program, "linear")
    called(program, linear, aten.to.dtype, linear, torch.float32)


@damage("raised", "writes its operands")
def an_op_in_place(program):
    linear = node(program, "linear")
    called(program, linear, aten.relu_.default, linear)


@damage("raised", "the role 'half' is unknown")
def a_cast_to_no_role(program):
    first(program, torch.ops.mxfx.cast.default).update_arg(1, "half")


@damage("raised", "Python function")
def a_python_function(program):
    linear = node(program, "linear")
    called(program, linear, torch.nn.functional.relu, linear)


@damage("lowered", "operands do not fit")
def a_runtime_function_without_operands(program):
    attend = next(n for n in program.graph.nodes if n.name == "attend")
    attend.args = attend.args[:4]


@damage("raised", "tensor as a literal")
def a_tensor_literal(program):
    linear = node(program, "linear")
    called(program, linear, aten.add.Tensor, linear, torch.ones(1))


# types


@damage("raised", "the op gives")
def a_stale_shape(program):
    linear = node(program, "linear")
    linear.meta["val"] = node(program, "linear_1").meta["val"]


@damage("raised", "the op gives")
def a_stale_dtype(program):
    linear = node(program, "linear")
    linear.meta["val"] = linear.meta["val"].to(torch.float32)


@damage("raised", "refuses its operands")
def a_weight_of_another_layer_shape(program):
    node(program, "linear_6").update_arg(1, node(program, "linear_3").args[1])


@damage("raised", "cannot share")
def heads_that_cannot_be_grouped(program):
    attention = first(program, torch.ops.mxfx.attention.default)
    attention.update_arg(2, attention.args[0])


@damage("raised", "token inputs are int64")
def float_token_ids(program):
    ids = node(program, "input_ids")
    ids.meta["val"] = ids.meta["val"].to(torch.float32)


@damage("raised", "return floating logits")
def an_output_that_is_no_logits(program):
    node(program, "output").args = (node(program, "positions_default"),)
    clean(program)


# formats


def _annotate(program: Program, name: str, operand: str, fmt: object) -> None:
    target = node(program, name)
    set_info(target, info(target).with_format(operand, Annotation(fmt, "test")))


@damage("raised", "has no operand 'probs'")
def an_annotation_on_no_operand(program):
    _annotate(program, "linear", "probs", parse("mxint4@32"))


@damage("raised", "no operand of this op can carry")
def an_annotation_on_a_sum(program):
    _annotate(program, "add_3", "input", parse("mxint4@32"))


@damage("raised", "has no such operand")
def an_annotation_on_an_absent_bias(program):
    _annotate(program, "linear", "bias", parse("mxint4@32"))


@damage("raised", "is no format")
def an_annotation_that_is_text(program):
    _annotate(program, "linear", "weight", "mxint4@32")


def _quantizer(program: Program) -> fx.Node:
    return first(program, torch.ops.mxfx.fake_quantize.default)


@damage("quantized", "sums over axis -1")
def blocks_along_the_wrong_axis(program):
    rw = Rewriter(program, "test")
    heads, reader = node(program, "view"), node(program, "transpose")
    across = rw.call(
        torch.ops.mxfx.fake_quantize.default, heads, "mxint4@4", 2, like=heads, after=heads, val=heads.meta["val"]
    )
    weight = rw.add_weight("mixer", torch.eye(16), like=reader)
    rw.set_operand(reader, 0, rw.call(aten.linear.default, across, weight, like=reader))


@damage("quantized", "whose length is not fixed")
def blocks_along_the_sequence(program):
    quantizer = next(
        n for n in program.graph.nodes if n.target is torch.ops.mxfx.fake_quantize.default and n.meta["val"].dim() == 4
    )
    quantizer.update_arg(2, 2)


@damage("quantized", "does not exist in")
def an_axis_that_does_not_exist(program):
    _quantizer(program).update_arg(2, 7)


@damage("quantized", "mxint4")
def a_format_that_does_not_exist(program):
    _quantizer(program).update_arg(1, "mxint4@thirtytwo")


@damage("quantized", "annotated mxint4@32 and quantized to mxint8@32")
def a_quantizer_of_another_format(program):
    node(program, "linear").args[0].update_arg(1, "mxint8@32")


@damage("quantized", "quantize floating values only")
def quantized_token_ids(program):
    ids = node(program, "input_ids")
    quantizer = _quantizer(program)
    with program.graph.inserting_before(node(program, "embedding")):
        new = program.graph.call_function(quantizer.target, (ids, "mxint4@32", -1))
    new.meta = {META_KEY: info(quantizer), "val": ids.meta["val"]}
    node(program, "embedding").update_arg(1, new)


# lowering


@damage("lowered", "counts as lowered and this op is not")
def a_dialect_op_left(program):
    linear = node(program, "linear")
    called(program, linear, torch.ops.mxfx.hadamard.default, linear, 16)


@damage("quantized", "counts as lowered")
def a_program_that_only_says_that_it_is_lowered(program):
    program.facts |= {"lowered"}
    program.dtype = torch.bfloat16


@damage("lowered", "nominal dtype")
def a_nominal_dtype_left(program):
    linear = node(program, "linear")
    narrow = called(program, linear, aten.to.dtype, linear, torch.bfloat16, val=linear.meta["val"].to(torch.bfloat16))
    called(program, narrow, aten.to.dtype, narrow, torch.float32, val=linear.meta["val"])


@pytest.mark.parametrize(("name", "stage", "apply_damage", "message"), _DAMAGES, ids=[d[0] for d in _DAMAGES])
def test_damage_is_caught(program, name, stage, apply_damage, message):
    broken = program("llama-tiny", stage).copy()
    verify(broken)
    apply_damage(broken)
    with pytest.raises(VerifyError) as caught:
        verify(broken)
    assert message in str(caught.value)


def test_there_are_more_than_thirty_kinds_of_damage():
    assert len(_DAMAGES) > 30


@pytest.mark.parametrize("stage", ["traced", "raised", "quantized", "lowered"])
@pytest.mark.parametrize("family", ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "gemma-tiny"])
def test_healthy_programs_are_accepted(program, family, stage):
    assert verify(program(family, stage)) > 50


def test_only_touched_nodes_and_their_readers_are_executed(program):
    healthy = program("llama-tiny", "raised")
    readers = 3
    assert verify(healthy, touched={"rms_norm_default"}) == 1 + readers
    assert verify(healthy, touched=set()) == 0


def test_an_untouched_stale_shape_is_left_to_the_full_check(program):
    broken = program("llama-tiny", "raised").copy()
    a_stale_shape(broken)
    assert verify(broken, touched={"linear_6"}) == 2
    with pytest.raises(VerifyError):
        verify(broken, touched={"linear"})


def test_an_error_names_node_path_and_remedy(program):
    broken = program("llama-tiny", "raised").copy()
    too_few_operands(broken)
    with pytest.raises(
        VerifyError, match=r"linear = aten.linear.default in model.layers.0.self_attn.q_proj: .*; see aten::linear"
    ):
        verify(broken)


def test_a_real_untie_is_no_damage(program):
    untied = program("llama-tiny", "raised").copy()
    untied.weights.untie("lm_head.weight", "test")
    with untied.graph.inserting_before(node(untied, "embedding")):
        own = untied.graph.create_node("get_attr", "model.embed_tokens.weight")
    own.meta = dict(node(untied, "linear_14").args[1].meta)
    set_info(own, replace(info(own), path=""))
    node(untied, "embedding").update_arg(0, own)
    assert verify(untied) > 50


def test_a_number_that_only_the_data_knows_keeps_its_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run again, ``item`` makes a new symbol: its readers, and two that read tensors alike, state their own."""
    monkeypatch.setattr("mxfx.graph.trace.join_pieces", lambda program: None)
    program = trace(mixture("jetmoe"))
    assert len({str(n.meta["val"]) for n in program.nodes() if n.target is torch.ops.aten.item.default}) > 1
    verify(program)
