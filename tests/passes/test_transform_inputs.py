"""``transform-inputs`` puts T behind a tensor and its inverse into every linear that reads it."""

from __future__ import annotations

import pytest
import torch

from mxfx.calibration.fisher import gradient_moments
from mxfx.calibration.moments import block_moments
from mxfx.formats import parse
from mxfx.graph.node import info, kind, path_of
from mxfx.passes import Annotate, FuseNorm, Rule, TransformInputs, TransformKv, transform_inputs
from mxfx.rewrite import MissingCalibration, Selector, apply
from mxfx.rewrite.size import bits_per_weight

FAMILIES = ["llama-tiny", "qwen2-tiny", "qwen3-tiny", "mistral-tiny", "gemma3-tiny", "phi3-tiny", "olmo2-tiny"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["hadamard", "wush"])
def test_logits_stay_with_one_transform_for_siblings(family, kind, raised, preserved):
    program, record = preserved(TransformInputs(kind=kind, block=16), raised(family))
    assert len(record.matches) == 2 * 4
    by_path = {path_of(n): n.args[0] for n in program.nodes("linear")}
    if family != "phi3-tiny":
        layer = "model.layers.0"
        assert len({by_path[f"{layer}.self_attn.{p}_proj"] for p in "qkv"}) == 1
        assert len({by_path[f"{layer}.mlp.{p}_proj"] for p in ("gate", "up")}) == 1


@pytest.mark.parametrize("options", [{"block": 0}, {"block": 32, "signs": True}])
def test_whole_axis_and_signed_hadamards_preserve_too(options, raised, preserved):
    preserved(TransformInputs(**options), raised("llama-tiny"))


def test_wush_gives_activations_and_weights_the_same_second_moments(raised, ctx):
    fused = apply(FuseNorm(), raised("qwen2-tiny")).program
    program = apply(TransformInputs(kind="wush", block=16, damping=1e-10), fused, ctx).program
    linear = next(n for n in program.nodes("linear") if path_of(n).endswith("down_proj"))
    moment = block_moments(program, {linear.args[0]: 16}, ctx)[linear.args[0]]
    weight = program.weights[program.weight_of(linear)].unflatten(-1, (-1, 16)).transpose(0, 1)
    of_weight = weight.mT @ weight / weight.shape[1]
    torch.testing.assert_close(moment, of_weight, rtol=1e-4, atol=1e-6 * float(moment.abs().max()))


def test_against_gradients_activations_and_gradients_get_the_same_second_moments(raised, ctx, preserved):
    program, _ = preserved(
        TransformInputs(kind="wush", against="gradients", block=16, damping=1e-10), raised("llama-tiny")
    )
    linears = [n for n in program.nodes("linear") if path_of(n).endswith(("down_proj", "o_proj"))]
    blocks = {n.args[0]: 16 for n in linears}
    moments = block_moments(program, blocks, ctx)
    gradients = gradient_moments(program, blocks, ctx, ctx.tokens())
    for node in blocks:
        torch.testing.assert_close(
            moments[node], gradients[node], rtol=1e-3, atol=1e-4 * float(moments[node].abs().max())
        )


def test_an_input_that_no_gradient_reaches_is_told(raised, ctx, monkeypatch):
    monkeypatch.setattr(transform_inputs, "gradient_moments", lambda program, blocks, *rest, **how: {})
    after = apply(TransformInputs(kind="wush", against="gradients", block=16), raised("llama-tiny"), ctx)
    plain = apply(TransformInputs(kind="wush", block=16), raised("llama-tiny"), ctx)
    (said,) = after.record.warnings
    assert said.startswith("no gradient of the loss reaches model.layers.0") and said.endswith("against weights")
    weights = after.program.weights
    assert all(torch.equal(weights[name], plain.program.weights[name]) for name in weights)


def test_a_matrix_fits_the_models_dtype_and_its_inverse_is_that_of_the_rounded_one(raised, ctx, logits):
    before = raised("llama-tiny")
    narrow = before.copy()
    narrow.dtype = torch.bfloat16  # the weights in the store stay finer
    for kind_ in ("wush", "hadamard"):
        after = apply(TransformInputs(kind=kind_, block=32, signs=True), narrow, ctx).program
        name = next(n for n in after.weights if n.startswith("transforms."))
        assert name not in after.weights.constants
        assert torch.equal(after.weights[name].bfloat16().double(), after.weights[name].double())
        error = (logits(after.twin(torch.float64)) - logits(before)).norm() / logits(before).norm()
        assert error < 1e-9


def test_only_annotated_linears_are_transformed(raised, preserved):
    rule = Rule(Selector(r".*down_proj"), input=parse("mxint4@32"))
    annotated = apply(Annotate(rule=(rule,)), raised("llama-tiny")).program
    program, record = preserved(TransformInputs(block=32), annotated)
    assert [m.path for m in record.matches] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert sum(kind(n) == "hadamard" for n in program.graph.nodes) == 2


def test_a_tied_head_is_left_alone_with_a_reason(raised, preserved):
    rule = Rule(Selector("lm_head"), input=parse("mxint4@32"))
    annotated = apply(Annotate(rule=(rule,)), raised("llama-tiny")).program
    _, record = preserved(TransformInputs(), annotated)
    assert not record.matches
    assert "read by model.embed_tokens too" in record.skips[0].reason


def test_widths_that_no_hadamard_fits_are_skipped(raised, preserved):
    _, record = preserved(TransformInputs(block=12), raised("llama-tiny"))
    assert {s.path.rsplit(".")[-1] for s in record.skips} == {"q_proj", "o_proj", "gate_proj"}


def test_a_data_aware_transform_needs_data(raised):
    with pytest.raises(MissingCalibration, match="--data"):
        apply(TransformInputs(kind="wush"), raised("llama-tiny"))


def test_conditioning_is_reported_and_bad_blocks_fall_back(raised, preserved):
    _, record = preserved(TransformInputs(kind="wush", block=16, max_condition=1.0), raised("llama-tiny"))
    account = record.details["model.layers.0.self_attn.q_proj"]
    assert account["fallen_back_blocks"] == 4
    assert account["worst_condition"] > 1.0


def test_a_matrix_in_a_format_lies_on_its_grid_takes_its_bits_and_leaves_the_logits(raised, ctx, preserved):
    fmt = parse("mxint5@32/mse")
    before = raised("llama-tiny")
    plain, _ = preserved(TransformInputs(kind="wush", block=32), before)
    program, _ = preserved(TransformInputs(kind="wush", block=32, matrix=fmt), before)
    assert bits_per_weight(program) < bits_per_weight(plain)
    node = next(iter(program.nodes("block_transform")))
    assert info(node).formats["matrix"].format == fmt
    matrix = program.weights[str(node.args[1].target)]
    assert torch.equal(fmt.fake_quantize(matrix), matrix)


def test_hadamards_have_no_matrix_to_give_a_format():
    with pytest.raises(ValueError, match="'hadamard' stores none"):
        TransformInputs(matrix=parse("mxint5@32"))


@pytest.mark.parametrize("of", [TransformInputs, TransformKv])
def test_hadamards_balance_nothing(of):
    with pytest.raises(ValueError, match="'against'"):
        of(against="gradients")
