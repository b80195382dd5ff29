"""The emitted ``GraphModule``: one program in any precision, on any device, under ``torch.compile``."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mxfx.graph.execute import execute
from mxfx.graph.module import build
from mxfx.graph.program import Program, compute_dtype
from mxfx.graph.tiny import FAMILIES, tiny
from mxfx.graph.trace import trace
from mxfx.pipeline.emit import emitted as lower
from mxfx.runtime.causal_lm import emit
from tests.programs import RAISE, config_a, model, padded_batch, passed, raised, relative, traced

#: Families whose linears have the names that configuration A selects.
QUANTIZABLE = tuple(f for f in FAMILIES if f != "phi3-tiny")
SAMPLED = ("llama-tiny", "mistral-tiny", "gemma3-tiny")


def test_a_program_with_dialect_ops_is_not_built() -> None:
    with pytest.raises(ValueError, match="run the pass 'lower' first"):
        build(raised("llama-tiny"))


def test_parameters_carry_the_names_of_the_model() -> None:
    emitted = emit(raised("qwen2-tiny"))
    assert dict(emitted.named_parameters()).keys() == dict(model("qwen2-tiny").named_parameters()).keys()


def test_tied_weights_are_one_parameter() -> None:
    emitted = emit(raised("llama-tiny"))
    names = [n for n, _ in emitted.named_parameters(remove_duplicate=False) if "embed" in n or "lm_head" in n]
    tensors = {id(emitted.get_parameter(name)) for name in names}
    assert len(tensors) == 1
    assert sum(p.numel() for p in emitted.parameters()) == sum(p.numel() for p in model("llama-tiny").parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_run_in_the_dtype_of_the_program_and_frequencies_in_float32_or_better(dtype: torch.dtype) -> None:
    emitted = emit(raised("llama-tiny").twin(dtype))
    assert {p.dtype for p in emitted.parameters()} == {dtype}
    assert {b.dtype for b in emitted.buffers()} == {compute_dtype(dtype)}
    ids, mask, _ = padded_batch()
    assert emitted(ids, None, mask).dtype == dtype


def test_precision_is_what_separates_the_twins() -> None:
    ids, mask, _ = padded_batch()
    exact = emit(raised("qwen3-tiny").twin(torch.float64))(ids, None, mask)
    errors = [
        relative(emit(raised("qwen3-tiny").twin(dtype))(ids, None, mask), exact)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert errors[0] < 1e-5 < errors[1] < 1e-2 < errors[2] < 1e-1


@pytest.mark.parametrize("family", SAMPLED)
def test_the_lowered_module_gives_the_bits_of_the_dialect_run_op_by_op(family: str) -> None:
    ids, mask, _ = padded_batch()
    for program in (raised(family), passed(raised(family), config_a())):
        assert torch.equal(emit(program)(ids, None, mask), execute(program, ids, None, mask))


def test_a_lowered_program_runs_op_by_op_too() -> None:
    ids, mask, _ = padded_batch()
    program = lower(passed(raised("llama-tiny"), config_a()))
    assert torch.equal(build(program)(ids, None, mask), execute(program, ids, None, mask))


def test_the_module_moves_between_devices() -> None:
    ids, mask, _ = padded_batch()
    moved = emit(passed(raised("gemma3-tiny"), config_a())).to("meta")
    logits = moved(ids.to("meta"), None, mask.to("meta"))
    assert (logits.device.type, tuple(logits.shape)) == ("meta", (3, 13, 128))


def test_the_module_holds_no_gradient_and_is_in_eval_mode() -> None:
    emitted = emit(raised("llama-tiny"))
    assert not emitted.training
    assert not any(p.requires_grad for p in emitted.parameters())


def assert_one_graph_for_all_shapes(program: Program) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    emitted = emit(program)
    compiled = torch.compile(emitted, fullgraph=True, dynamic=True, backend=counter)
    ids, mask, _ = padded_batch()
    with torch.no_grad():
        for batch, length in ((3, 13), (2, 9), (3, 5)):
            given = ids[:batch, -length:].clone(), None, mask[:batch, -length:].clone()
            assert torch.equal(compiled(*given), emitted(*given))
    assert counter.frame_count == 1, "a new shape compiled the graph again"


def test_compiled_as_one_graph_it_gives_the_bits_of_eager() -> None:
    assert_one_graph_for_all_shapes(raised("gemma3-tiny"))


def test_compiled_with_quantizers_it_gives_the_bits_of_eager() -> None:
    assert_one_graph_for_all_shapes(passed(traced("llama-tiny"), (*RAISE, *config_a())))


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles_as_one_graph(family: str) -> None:
    assert_one_graph_for_all_shapes(passed(raised(family), config_a() if family in QUANTIZABLE else ()))


@pytest.mark.thorough
@pytest.mark.parametrize("family", SAMPLED)
def test_inductor_agrees_with_eager(family: str) -> None:
    torch._dynamo.reset()
    emitted = emit(raised(family))
    compiled = torch.compile(emitted, fullgraph=True, dynamic=True)
    ids, mask, _ = padded_batch()
    with torch.no_grad():
        assert relative(compiled(ids, None, mask), emitted(ids, None, mask)) < 1e-5


def test_building_does_not_touch_the_program() -> None:
    program = (
        lower(traced("llama-tiny").copy()) if "raised" in traced("llama-tiny").facts else lower(raised("llama-tiny"))
    )
    before = {name: program.weights.hash(name) for name in program.weights}
    with torch.no_grad():
        for parameter in build(program).to(torch.float32).parameters():
            parameter.data = parameter.data * 2
    assert {name: program.weights.hash(name) for name in program.weights} == before


def test_what_is_written_into_an_emitted_module_and_into_its_model_reaches_neither_the_other() -> None:
    source = tiny("llama-tiny")
    graph = emit(passed(trace(source), RAISE))
    ids = torch.randint(3, 128, (2, 9))
    before = graph(ids)
    with torch.no_grad():
        source.model.norm.weight.mul_(2)
        source.lm_head.weight.zero_()
    assert torch.equal(graph(ids), before)
    kept = source.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        graph.get_parameter("model.layers.0.mlp.up_proj.weight").zero_()
    assert torch.equal(source.model.layers[0].mlp.up_proj.weight, kept)
    assert not torch.equal(graph(ids), before)


def test_a_mask_of_queries_and_keys_needs_no_positions() -> None:
    ids = torch.randint(3, 128, (2, 9))
    graph = emit(passed(traced("llama-tiny"), RAISE))
    assert torch.allclose(graph(ids, None, torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()), graph(ids), atol=1e-5)
