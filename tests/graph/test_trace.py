"""A trace computes what the Hugging Face model computes, bit for bit, and owes nothing to how it was taken."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from torch import fx
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mxfx.graph.execute import execute
from mxfx.graph.node import kind, op_name, path_of
from mxfx.graph.program import Program
from mxfx.graph.text import to_text
from mxfx.graph.tiny import FAMILIES, shaken, tiny
from mxfx.graph.trace import TraceError, bind, trace
from mxfx.graph.verify import verify
from mxfx.runtime.causal_lm import emit
from tests.architectures import build
from tests.exports import exported_once
from tests.programs import RAISE, model, padded_batch, passed, raised, relative, traced

SAMPLED = ("llama-tiny", "qwen3-tiny", "gemma3-tiny")
HALF = (torch.float32, torch.bfloat16, torch.float16)


def logits_of(hf: torch.nn.Module, ids, mask=None, positions=None) -> torch.Tensor:
    with torch.no_grad():
        return hf(input_ids=ids, attention_mask=mask, position_ids=positions).logits


def graph_of(family: str, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    return emit(bind(raised(family), model(family, dtype)))


@pytest.mark.parametrize("family", FAMILIES)
def test_raised_and_lowered_logits_are_those_of_the_model_bit_for_bit(family: str) -> None:
    ids, mask, positions = padded_batch()
    for dtype in HALF:
        graph, hf = graph_of(family, dtype), model(family, dtype)
        assert torch.equal(graph(ids), logits_of(hf, ids)), dtype
        padded = graph(ids, None, mask)[mask.bool()]
        assert torch.equal(padded, logits_of(hf, ids, mask, positions)[mask.bool()]), dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64_the_program_differs_from_the_model_by_its_float32_casts_alone(family: str) -> None:
    """Read with casts to float32, as the model's source has them, the float64 program gives the model's bits."""
    ids, _, _ = padded_batch()
    hf = model(family, torch.float64)
    expected = logits_of(hf, ids)
    assert relative(graph_of(family, torch.float64)(ids), expected) < 1e-6
    literal = CastsToFloat32(bind(traced(family), hf)).run(ids, None, None)
    assert relative(literal, expected) < 1e-14


class CastsToFloat32(fx.Interpreter):
    """Runs a float64 program with ``compute`` read as float32: what the Hugging Face modules write literally."""

    def __init__(self, program: Program) -> None:
        super().__init__(torch.nn.Module(), graph=program.graph)
        self.weights = program.weights

    def fetch_attr(self, target: str) -> torch.Tensor:
        tensor = self.weights[target]
        return tensor.float() if self.weights.canonical(target) in self.weights.constants else tensor

    def call_function(self, target, args, kwargs):
        if target is torch.ops.mxfx.cast.default:
            return args[0].to(torch.float32 if args[1] == "compute" else torch.float64)
        return super().call_function(target, args, kwargs)


def test_a_padded_row_has_the_logits_that_it_has_alone() -> None:
    ids, mask, _ = padded_batch()
    graph = graph_of("mistral-tiny")
    together = graph(ids, None, mask)
    for row in range(len(ids)):
        real = mask[row].bool()
        assert relative(together[row, real], graph(ids[row : row + 1, real])[0]) < 1e-5


def test_given_positions_count_and_counted_positions_skip_padding() -> None:
    ids, mask, positions = padded_batch()
    graph, hf = graph_of("llama-tiny"), model("llama-tiny")
    assert torch.equal(graph(ids, positions, mask), graph(ids, None, mask))
    sparse = positions * 3 + 5
    assert torch.equal(graph(ids, sparse, mask)[mask.bool()], logits_of(hf, ids, mask, sparse)[mask.bool()])
    assert not torch.equal(graph(ids, sparse, mask), graph(ids, None, mask))


@pytest.mark.parametrize("family", SAMPLED)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 33), (5, 7)])
def test_batch_and_length_are_free(family: str, shape: tuple[int, int]) -> None:
    ids = torch.randint(3, 128, shape)
    expected = logits_of(model(family), ids)
    actual = graph_of(family)(ids)
    assert actual.shape == expected.shape
    assert relative(actual, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_graph_does_not_know_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    program = trace(tiny("qwen3-tiny", dtype=dtype))
    assert program.dtype == dtype
    assert graph_text(program) == graph_text(traced("qwen3-tiny"))


def test_the_graph_does_not_know_the_device_of_the_model() -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model("gemma3-tiny").config)
    assert graph_text(trace(empty)) == graph_text(traced("gemma3-tiny"))


def graph_text(program: Program) -> str:
    return to_text(program, header=False)


def test_a_trace_on_the_meta_device_takes_no_memory_for_weights() -> None:
    """Three layers of 240 GB each would not fit: nothing of their size may ever be allocated."""
    with torch.device("meta"):
        config = copy.deepcopy(model("llama-tiny").config)
        config.update({"hidden_size": 1 << 17, "intermediate_size": 1 << 18, "num_hidden_layers": 3})
        giant = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    program = trace(giant)
    assert sum(t.numel() for t in program.weights.values()) * 2 > 600e9
    assert {t.device.type for t in program.weights.values()} == {"meta"}


@pytest.mark.parametrize("family", SAMPLED)
def test_a_program_traced_on_meta_takes_the_weights_of_a_model(family: str) -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model(family).config)
    program = bind(trace(empty), model(family))
    ids, _, _ = padded_batch()
    assert to_text(program) == to_text(traced(family))
    assert torch.equal(emit(passed(program, RAISE))(ids), logits_of(model(family), ids))


def test_weights_of_another_shape_are_not_bound() -> None:
    other = tiny("llama-tiny", intermediate_size=64)
    with pytest.raises(TraceError, match=r"no weight model\.layers\.0\.mlp\.gate_proj\.weight of shape \(96, 64\)"):
        bind(traced("llama-tiny"), other)


def test_an_untied_program_is_not_bound_to_a_tied_model() -> None:
    untied = trace(tiny("llama-tiny", tie_word_embeddings=False))
    with pytest.raises(TraceError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        bind(untied, model("llama-tiny"))


def test_a_tied_program_is_not_bound_to_an_untied_model() -> None:
    untied = tiny("llama-tiny", tie_word_embeddings=False)
    with pytest.raises(TraceError, match="tied"):
        bind(traced("llama-tiny"), untied)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_assert_device_or_float_dtype_is_left_in_the_graph(family: str) -> None:
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for node in traced(family).graph.nodes:
        assert "assert" not in op_name(node)
        literals = [*node.args, *node.kwargs.values()]
        assert not any(isinstance(a, torch.device) or a in floats for a in literals if not isinstance(a, fx.Node))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_node_is_dead_and_no_cast_changes_nothing(family: str) -> None:
    for node in traced(family).graph.nodes:
        assert node.users or node.op in ("placeholder", "output"), node.name
        if kind(node) == "cast":
            assert node.args[0].meta["val"].dtype != node.meta["val"].dtype, node.name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_of_a_module_knows_its_path_in_the_model(family: str) -> None:
    modules = {name for name, _ in model(family).named_modules()}
    for node in traced(family).graph.nodes:
        assert path_of(node) in modules, f"{node.name} claims to be in {path_of(node)!r}"
    for node in traced(family).nodes("linear", "embedding"):
        named = (f"{path_of(node)}.weight", *traced(family).weights.tied_to(f"{path_of(node)}.weight"))
        assert traced(family).weight_of(node) in named
    attentions = [path_of(n) for n in traced(family).nodes("attention")]
    assert attentions == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_tied_weights_are_one_tensor_with_two_names() -> None:
    tied, untied = traced("llama-tiny").weights, traced("qwen2-tiny").weights
    assert tied.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert untied.aliases == {}


def test_tracing_leaves_the_model_as_it_was() -> None:
    hf = tiny("qwen3-tiny").train()
    state = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    config, attention = hf.config.to_json_string(), hf.config._attn_implementation
    trace(hf)
    assert hf.training
    assert (hf.config.to_json_string(), hf.config._attn_implementation) == (config, attention)
    assert all(torch.equal(tensor, state[name]) for name, tensor in hf.state_dict().items())
    assert all(p.device.type == "cpu" and p.requires_grad for p in hf.parameters())


def test_the_program_shares_the_weights_of_the_model() -> None:
    hf, program = model("llama-tiny"), traced("llama-tiny")
    assert program.weights["model.norm.weight"].data_ptr() == hf.model.norm.weight.data_ptr()


def test_something_else_than_a_causal_lm_is_refused() -> None:
    with pytest.raises(TraceError, match=r"expected a transformers causal LM with a \.config, got Linear"):
        trace(torch.nn.Linear(2, 2))


def test_a_loop_over_what_the_data_says_is_refused_with_its_line() -> None:
    """Experts that are not behind transformers' interface for them ask each tensor which of them it chose."""
    with pytest.raises(TraceError, match=r"in model\.layers\.0\.mlp\.experts: .* at \(.*:\d+ in forward\): what it"):
        trace(build("longcat_flash"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_that_a_product_meets_beside_weights_has_their_dtype(dtype: torch.dtype) -> None:
    """A mask of ones and zeros that scores are multiplied by: in float32 they would not meet the values."""
    model = build("openai-gpt").to(dtype)
    with exported_once(lambda: True):
        program = trace(model)
    verify(program)
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(execute(program, ids), model(input_ids=ids).logits) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_blocks_that_a_loop_counts_are_refused_with_its_line() -> None:
    with pytest.raises(TraceError, match=r"does not hold for every batch and length: .* at \(.*modeling_minimax\.py:"):
        trace(build("minimax"))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_that_branches_on_its_implementation_is_traced_on_its_own_branch(dtype, implementation: str) -> None:
    """Falcon's eager branch adds its linear biases twice: in bfloat16 a proof may take that for the other one."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131, "alibi": True}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(T.FalconConfig(**sizes), attn_implementation=implementation)
    model = shaken(model).eval().to(dtype)
    # Which export is taken hangs on the numbers, no export does.
    with exported_once(lambda: True):
        program = trace(model)
    for ids, mask in [(torch.randint(3, 131, (2, 19)), None), padded_batch()[:2]]:
        real = torch.ones_like(ids) if mask is None else mask
        with torch.no_grad():
            expected = model(ids, attention_mask=real, use_cache=False).logits
        assert torch.equal(execute(program, ids, None, mask)[real.bool()], expected[real.bool()])
    for interface in (ALL_MASK_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS):
        assert interface["sdpa"].__module__.startswith("transformers."), "what a trace put there is gone"
