"""``multiply-in-fp8`` gives linears to FP8 tensor cores where nothing is lost, and says why where it does not."""

from __future__ import annotations

import pytest
import torch

from mxfx.config import EmitConfig
from mxfx.formats import parse
from mxfx.formats.stored import store
from mxfx.graph.program import Program
from mxfx.graph.text import parse as read
from mxfx.graph.text import to_text
from mxfx.graph.verify import verify
from mxfx.ops.kernels import packed
from mxfx.passes import InsertFakeQuant, Lower, MultiplyInFp8, PackWeights, RoundWeights
from mxfx.passes.annotate import Annotate, Rule
from mxfx.pipeline.emit import emitted
from mxfx.rewrite import PassRecord, Selector, apply
from mxfx.runtime.causal_lm import build
from tests.programs import config_a, padded_batch, passed, raised


def lowered(family: str, weight: str = "mxint4@16", activation: str = "mxint4@16") -> Program:
    quantized = passed(raised(family), config_a(parse(weight), parse(activation), kv=None))
    return passed(quantized.twin(torch.bfloat16), (PackWeights(), Lower()))


def in_fp8(program: Program) -> tuple[Program, PassRecord]:
    applied = apply(MultiplyInFp8(), program)
    verify(applied.program)
    return applied.program, applied.record


def logits(program: Program) -> torch.Tensor:
    ids, mask, positions = padded_batch()
    with torch.no_grad():
        return build(program)(ids, positions, mask)


@pytest.mark.parametrize("family", ["llama-tiny", "qwen2-tiny"])
@pytest.mark.parametrize(
    "formats", [("mxint4@16", "mxint4@16/mse"), ("mxfp4_e2m1@32", "mxfp6_e2m3@32"), ("mxint3@16", "mxint2@16")]
)
def test_on_a_cpu_the_definitions_give_the_same_bits(family: str, formats: tuple[str, str]) -> None:
    before = lowered(family, *formats)
    after, record = in_fp8(before)
    assert len(record.matches) == 14 and not record.skips
    assert torch.equal(logits(after), logits(before))
    assert torch.equal(logits(read(to_text(after), after.weights)), logits(before))


@pytest.mark.parametrize(
    ("formats", "option", "sums"),
    [
        (("mxint4@32", "mxfp4_e2m1@64"), "exact", None),
        (("mxint4@16", "mxint4@32"), "exact", "wide"),
        (("mxint4@32", "mxint4@16"), "exact", "wide"),
        (("mxfp6_e3m2@32", "mxfp6_e3m2@32"), "exact", "wide"),
        # 32 · 12 · 60 units: one bit more than is kept.
        (("mxfp4_e2m1@32", "mxfp6_e2m3@32"), "exact", "wide"),
        (("mxint4@32", "mxfp6_e2m3@32"), "exact", None),
        (("mxint4@16", "mxint4@16"), "fast", "fast"),
    ],
)
def test_products_say_how_they_are_summed(formats: tuple[str, str], option: str, sums: str | None) -> None:
    """Two blocks in one instruction, and products that span more bits than it keeps, lose some."""
    applied = apply(MultiplyInFp8(sums=option), lowered("llama-tiny", *formats))
    products = [n for n in applied.program.graph.nodes if n.target is packed.LINEAR_E4M3]
    assert products and {n.kwargs.get("sums") for n in products} == {sums}
    assert all(("in the model's dtype" in match.note) == (sums == "wide") for match in applied.record.matches)


def test_fused_products_say_it_too() -> None:
    quantized = passed(raised("llama-tiny"), config_a(parse("mxint4@16"), parse("mxint4@16"), kv=None))
    program = emitted(quantized.twin(torch.bfloat16), "cpu", EmitConfig(device="cuda", packed=True, sums="fast"))
    calls = [n for n in program.graph.nodes if n.target in (*packed.MULTIPLYING.values(), packed.ADD_NORM_LINEAR)]
    assert len(calls) == 8 and {n.kwargs.get("sums") for n in calls} == {"fast"}
    exact = emitted(quantized.twin(torch.bfloat16), "cpu", EmitConfig(device="cuda", packed=True))
    again = read(to_text(program), program.weights)
    assert torch.equal(logits(again), logits(exact))


def test_linears_that_share_an_input_share_one_product() -> None:
    after, _ = in_fp8(lowered("llama-tiny"))
    products = [n for n in after.graph.nodes if n.target is packed.LINEAR_E4M3]
    assert [len(n.args[2]) for n in products] == [3, 1, 2, 1] * 2
    rows = (packed.E4M3_ROWS, *packed.ROUNDING.values())
    assert sum(1 for n in after.graph.nodes if n.target in rows) == 8


@pytest.mark.parametrize(
    ("weight", "activation", "reason"),
    [
        ("mxint8@16", "mxint4@16", "its weight is mxint8@16, of which E4M3 does not hold the significant bits"),
        ("mxint4@16", "mxint8@16", "its input is mxint8@16, of which E4M3 does not hold the significant bits"),
        (
            "mxint4@16",
            "mxfp8_e4m3@16",
            "its input is mxfp8_e4m3@16, of which a block may span more octaves than E4M3 has",
        ),
        ("mxint4@20", "mxint4@16", "no kernel expands rows of 64 in mxint4@20 to E4M3"),
    ],
)
def test_formats_that_do_not_fit_are_named(weight: str, activation: str, reason: str) -> None:
    _, record = in_fp8(lowered("llama-tiny", weight, activation))
    assert not record.matches and reason in {skip.reason for skip in record.skips}


def test_an_input_that_nobody_rounds_is_no_operand() -> None:
    rule = Rule(Selector(".*_proj"), weight=parse("mxint4@16"))
    before = passed(raised("llama-tiny"), (Annotate(rule=(rule,)), RoundWeights(), InsertFakeQuant(), PackWeights()))
    _, record = in_fp8(passed(before, (Lower(),)))
    assert {skip.reason for skip in record.skips} == {"its input is read unrounded"} and not record.matches


def test_a_weight_whose_rows_span_too_many_octaves_stays() -> None:
    quantized = passed(raised("llama-tiny"), config_a(parse("mxint4@16"), parse("mxint4@16"), kv=None)).copy()
    name = "model.layers.1.mlp.down_proj.weight"
    wide = quantized.weights[name].clone()
    wide[3, :16] *= 2.0**-20
    quantized.weights.set(name, wide, "test")
    before = passed(quantized.twin(torch.bfloat16), (PackWeights(), Lower()))
    after, record = in_fp8(before)
    assert [(s.path, s.reason) for s in record.skips] == [
        ("model.layers.1.mlp.down_proj", "1 of 64 rows of its weight span more octaves than E4M3 has")
    ]
    assert torch.equal(logits(after), logits(before))


def test_a_quantizer_that_only_they_read_and_what_is_added_to_them_are_one_op_with_them() -> None:
    quantized = passed(raised("llama-tiny"), config_a(parse("mxint4@16"), parse("mxint4@16"), kv=None))
    program = emitted(quantized.twin(torch.bfloat16), "cpu", EmitConfig(device="cuda", packed=True))
    calls = [n for n in program.graph.nodes if n.target in (*packed.MULTIPLYING.values(), packed.ADD_NORM_LINEAR)]
    layer = ("fake_quantize", "add_norm_quantize", "silu_mul_quantize")
    assert [str(n.target) for n in calls] == [
        f"mxfx_kernels.{name}_linear.default" for name in ("norm_quantize", *layer, "add_norm_quantize", *layer)
    ]
    # A norm that is fused adds what the linear before it gives; of the last sum the head's norm is not.
    assert [n.args[3] is None for n in calls] == [True, True, False, True, False, True, False, False]
    verify(program)
    again = read(to_text(program), program.weights)
    assert torch.equal(logits(again), logits(program))


def test_the_emit_stage_for_a_gpu_ends_with_it() -> None:
    quantized = passed(raised("llama-tiny"), config_a(parse("mxint4@16"), parse("mxint4@16"), kv=None))
    program = emitted(quantized.twin(torch.bfloat16), "cpu", EmitConfig(device="cuda", packed=True))
    ends = (*packed.MULTIPLYING.values(), packed.ADD_NORM_LINEAR)
    assert sum(1 for n in program.graph.nodes if n.target in ends) == 8
    expected = emitted(quantized.twin(torch.bfloat16), "cpu", EmitConfig(device="cuda"))
    assert torch.equal(logits(program), logits(expected))


def test_a_sum_its_norm_and_its_linears_state_their_shapes_and_compile_as_one_node() -> None:
    fmt = parse("mxint4@32")
    codes, scales = store(fmt.fake_quantize(torch.randn(48, 64)), fmt)  # type: ignore[misc]
    gain, rest = torch.rand(64).bfloat16(), (None, "mxint4@32", 1e-5)

    def step(x: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return packed.ADD_NORM_LINEAR([codes], [scales], [], branch, "mxint4@32", x, gain, *rest)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    for length in (3, 5):
        x, branch = (torch.randn(2, length, 64).bfloat16() for _ in range(2))
        given = ([codes], [scales], [], branch, "mxint4@32", x, gain, *rest)
        torch.library.opcheck(packed.ADD_NORM_LINEAR, given, test_utils=("test_schema", "test_faketensor"))
        total, y = step(x, branch)
        assert torch.equal(total, x + branch) and y.shape == (2, length, 48)
        assert torch.equal(y, packed.NORM_LINEAR([codes], [scales], [], None, "mxint4@32", total, gain, *rest))
        assert all(torch.equal(one, other) for one, other in zip(compiled(x, branch), (total, y), strict=True))
