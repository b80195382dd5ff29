"""NVFP4: torchao's bits, and the promises of every format where torchao makes none."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mxfx.algorithms.gptq import gptq_batch
from mxfx.formats import E4M3, BlockRule, FloatElement, Format, FormatError, IntElement, parse
from mxfx.formats.chunks import fits_in_cache
from mxfx.ops.kernels.limits import takes_format
from tests.algorithms.one_weight import gptq
from tests.algorithms.synthetic_layer import correlated_layer
from tests.formats.reference import same_bits

NVFP4 = parse("nvfp4")
RULES = ["nvfp4", "nvfp4/four-over-six"]


def rows(seed: int = 0) -> torch.Tensor:
    """(400, 64): Gaussian rows of many sizes, cubes, powers of two, exact ties, sparse rows, zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(80, 64, generator=generator)
    sizes = torch.randint(-12, 6, (80, 1), generator=generator).float().exp2()
    powers = torch.randint(-8, 4, (80, 64), generator=generator).float().exp2() * normal.sign()
    ties = torch.randint(-48, 49, (80, 64), generator=generator).float() / 8
    sparse = torch.where(
        torch.rand(80, 64, generator=generator) < 0.95, torch.copysign(torch.zeros(()), normal), normal
    )
    return torch.cat([normal * sizes, normal**3, powers, ties, sparse])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 2.0**-60, 3e20, 2.0**-110])
def test_codes_scales_and_values_are_torchaos(dtype: torch.dtype, size: float) -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    x = (rows() * size).to(dtype)
    unit = per_tensor_amax_to_scale(x.abs().amax())
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=unit)
    ours = NVFP4.encode(x)
    assert ours.scales is not None and ours.common is not None
    assert torch.equal(ours.common, unit)
    assert torch.equal(ours.scales, theirs.scale.view(torch.uint8))
    assert torch.equal(NVFP4.pack(ours.codes), theirs.qdata.view(torch.uint8))
    assert same_bits(NVFP4.decode(ours, dtype), theirs.dequantize(dtype))
    assert same_bits(NVFP4.fake_quantize(x), theirs.dequantize(dtype))


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_fake_quantize_is_decode_of_encode_along_every_axis_ragged_or_not(text, dtype, axis) -> None:
    fmt = parse(text)
    x = rows()[:30, :42].reshape(6, 5, 42).to(dtype)
    encoded = fmt.encode(x, axis)
    assert same_bits(fmt.decode(encoded, dtype), fmt.fake_quantize(x, axis))
    length = x.shape[axis]
    assert torch.equal(fmt.unpack(fmt.pack(encoded.codes.movedim(axis, -1)), length), encoded.codes.movedim(axis, -1))


@pytest.mark.parametrize("text", RULES)
def test_rows_in_chunks_share_the_scale_of_the_whole_tensor(text: str) -> None:
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 3000, 2.0)[:, None]
    assert not fits_in_cache(x)
    fmt = parse(text)
    at_once = fmt.decode(fmt.encode(x))
    assert same_bits(fmt.fake_quantize(x), at_once)
    alone = torch.cat([fmt.fake_quantize(part) for part in x.split(500)])
    assert not torch.equal(alone, at_once)
    together = torch.cat([fmt.fake_quantize(part, common=fmt.common(x)) for part in x.split(500)])
    assert same_bits(together, at_once)


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_block(text: str, poison: float) -> None:
    fmt, x = parse(text), rows()[:4].clone()
    expected = fmt.fake_quantize(torch.cat((x[:, :16], torch.zeros(4, 16), x[:, 32:]), dim=1))
    x[:, 16:32] = 0.0
    x[1, 20] = poison
    expected[1, 16:32] = float("nan")
    assert same_bits(fmt.fake_quantize(x), expected)
    encoded = fmt.encode(x)
    assert encoded.scales is not None and encoded.scales[1, 1] == 0x7F
    assert not encoded.codes[1, 16:32].any()
    assert same_bits(fmt.decode(encoded), expected)


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_stay_zeros_and_finite_stays_finite(text: str, dtype: torch.dtype) -> None:
    fmt, largest = parse(text), torch.finfo(dtype).max
    zeros = torch.tensor([0.0, -0.0] * 8, dtype=dtype)
    assert same_bits(fmt.fake_quantize(zeros), zeros)
    assert fmt.fake_quantize(torch.zeros(0, 16, dtype=dtype)).shape == (0, 16)
    ends = torch.tensor([largest, -largest, largest * 0.51, torch.finfo(dtype).smallest_normal] * 4, dtype=dtype)
    assert fmt.fake_quantize(ends).isfinite().all()
    assert fmt.fake_quantize(torch.full((16,), torch.finfo(dtype).smallest_normal, dtype=dtype)).isfinite().all()


def test_four_over_six_takes_a_sixth_off_the_error_of_gaussian_blocks() -> None:
    x = torch.randn(20000, 32, generator=torch.Generator().manual_seed(0))
    six, four = ((parse(text).fake_quantize(x) - x).square().mean().item() for text in RULES)
    assert six == pytest.approx(0.00904, rel=0.01) and four == pytest.approx(0.00756, rel=0.01)


def test_four_over_six_never_loses_to_mapping_to_six_under_the_same_unit() -> None:
    x, fmt = rows().double(), parse("nvfp4/four-over-six")
    unit = fmt.common(x)
    six = NVFP4.fake_quantize(x, common=unit)
    errors = [(y - x).square().unflatten(-1, (-1, 16)).sum(-1) for y in (fmt.fake_quantize(x), six)]
    assert (errors[0] <= errors[1] * (1 + 1e-12)).all() and (errors[0] < errors[1]).float().mean() > 0.2


class TestGptq:
    @pytest.mark.parametrize("text", RULES)
    @pytest.mark.parametrize("refine", [0, 2])
    def test_every_block_lies_on_the_grid_of_its_scale_and_loss_falls(self, text: str, refine: int) -> None:
        fmt = parse(text)
        weight, hessian = correlated_layer(32, 88)
        result = gptq(weight, hessian, fmt, refine=refine)
        assert result.scales is not None
        padded = torch.nn.functional.pad(result.weight, (0, 8)).unflatten(-1, (-1, 16))
        again = fmt.round_to_grid(padded, result.scales[..., None], fmt.common(weight))
        assert torch.allclose(again, padded, rtol=1e-6, atol=0.0)
        assert result.loss < 0.7 * result.rtn_loss
        nearest = fmt.fake_quantize(weight) - weight
        assert result.rtn_loss == pytest.approx(((nearest @ hessian) * nearest).sum().item(), rel=1e-4)

    def test_weights_that_share_an_input_keep_the_unit_of_their_own_tensor(self) -> None:
        weight, hessian = correlated_layer(40, 64)
        parts = [weight[:24], weight[24:32] * 7.3, weight[32:] * 0.01]
        for part, result in zip(parts, gptq_batch(parts, hessian, NVFP4), strict=True):
            alone = gptq(part, hessian, NVFP4)
            assert torch.equal(result.weight, alone.weight) and torch.equal(result.scales, alone.scales)

    def test_the_sweep_beats_the_rule(self) -> None:
        weight, hessian = correlated_layer(64, 128)
        sweep, rule = (gptq(weight, hessian, NVFP4, exponents=how).loss for how in ("sweep", "rule"))
        assert sweep < 0.95 * rule


def test_text_bits_and_refusals() -> None:
    assert str(parse("nvfp4@16")) == str(parse("nvfp4/six")) == "nvfp4"
    assert str(parse("nvfp4@16/four-over-six")) == "nvfp4/four-over-six"
    assert parse("nvfp4") == Format(FloatElement(2, 1), 16, E4M3(BlockRule.SIX))
    assert NVFP4.bits_per_element == 4.5 and NVFP4.is_four_bit
    with pytest.raises(FormatError, match=r"blocks of 16; did you mean 'nvfp4'"):
        parse("nvfp4@32")
    with pytest.raises(FormatError, match=r"no scale rule 'mse' \(there are six, four-over-six"):
        parse("nvfp4/mse")
    with pytest.raises(FormatError, match="did you mean 'nvfp4'"):
        parse("nvfp")
    with pytest.raises(FormatError, match="int4 in blocks of 32"):
        Format(IntElement(4), 32, E4M3())


def test_kernels_leave_it_to_the_definition() -> None:
    assert not takes_format(NVFP4) and takes_format(parse("mxfp4_e2m1@16"))


@pytest.mark.parametrize("text", RULES)
def test_its_program_is_functional_and_keeps_no_size(text: str) -> None:
    fmt = parse(text)
    traced = make_fx(lambda x: fmt.fake_quantize(x), tracing_mode="symbolic")(rows()[:14, :42].reshape(2, 7, 42))
    calls = [node.target for node in traced.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert calls and all(call.namespace == "aten" and not call._schema.is_mutable for call in calls)
    x = rows()[:15, :42].reshape(3, 5, 42)
    assert same_bits(traced(x), fmt.fake_quantize(x))
