"""GPTQ: its optimality conditions, its grid, its guards, and equality with a plain float64 reference."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from mxfx.algorithms import hessian_factor
from mxfx.algorithms.gptq import GptqResult, asymmetric_target, gptq_batch
from mxfx.algorithms.gptq_refine import refine_blocks
from mxfx.algorithms.gptq_solver import candidate_scales
from mxfx.algorithms.hessian_factor import factorize, permute_symmetric, revive_dead_columns, rounding_order
from mxfx.calibration.estimate import LiveBytes
from mxfx.formats import E8M0, Format, ScaleRule, parse
from mxfx.ground import ranks
from tests.algorithms.gptq_reference import gptq_reference
from tests.algorithms.one_weight import gptq
from tests.algorithms.synthetic_layer import correlated_inputs, correlated_layer

FORMATS = [
    "mxint4@32",
    "mxint4@32/mse",
    "mxint4@32/ceil",
    "mxint8@16",
    "mxfp4_e2m1@32",
    "mxfp4_e2m1@32/rceil",
    "mxfp6_e3m2@32",
    "mxfp6_e2m3@32/even",
    "mxfp8_e4m3@32",
    "mxfp8_e5m2@32",
    "minifloat_e3m4",
]


def loss_of(rounded: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """e H eᵀ per row, float64."""
    error = (rounded - weight).double()
    return ((error @ hessian.double()) * error).sum(-1)


def on_grid(result: GptqResult, fmt: Format) -> bool:
    """Whether every block, rounded again with the exponent reported for it, stays as it is."""
    if result.scales is None:
        return torch.equal(fmt.fake_quantize(result.weight), result.weight)
    assert fmt.block is not None
    padded = torch.nn.functional.pad(result.weight, (0, -result.weight.shape[1] % fmt.block))
    blocks = padded.unflatten(-1, (-1, fmt.block))
    return torch.equal(fmt.round_to_grid(blocks, result.scales[..., None]), blocks)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cols", [96, 80])
def test_every_block_lies_on_its_grid_and_loss_stays_below_rtn(name: str, cols: int) -> None:
    fmt = parse(name)
    weight, hessian = correlated_layer(24, cols)
    result = gptq(weight, hessian, fmt)
    assert on_grid(result, fmt)
    rtn = loss_of(fmt.fake_quantize(weight), weight, hessian)
    mine = loss_of(result.weight, weight, hessian)
    assert (mine <= rtn * (1 + 1e-5)).all()
    assert mine.sum() < 0.7 * rtn.sum()
    assert result.loss == pytest.approx(mine.sum().item(), rel=1e-4)
    assert result.rtn_loss == pytest.approx(rtn.sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in FORMATS if "@" in name])
@pytest.mark.parametrize("refine", [0, 2])
def test_the_values_alone_are_enough_to_pack_the_weight(name: str, refine: int) -> None:
    fmt = dataclasses.replace(parse(name), scale=E8M0(ScaleRule.MSE))
    weight, hessian = correlated_layer(64, 96)
    rounded = gptq(weight, hessian, parse(name), refine=refine).weight
    assert torch.equal(fmt.decode(fmt.encode(rounded)), rounded)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("order", ["block", "none"])
def test_diagonal_hessian_gives_exactly_rtn(name: str, order: str) -> None:
    fmt = parse(name)
    weight, hessian = correlated_layer(16, 80)
    result = gptq(weight, hessian.diagonal().diag(), fmt, order=order, exponents="rule")
    assert torch.equal(result.weight, fmt.fake_quantize(weight))


@pytest.mark.parametrize("name", ["mxint4@16", "mxfp4_e2m1@16", "mxint8@16", "minifloat_e3m4"])
@pytest.mark.parametrize("order", ["block", "none"])
def test_equals_the_plain_reference_in_float64(name: str, order: str) -> None:
    fmt = parse(name)
    weight, hessian = correlated_layer(12, 72, dtype=torch.float64)
    natural = torch.arange(72)[None]
    columns = rounding_order(hessian[None], fmt.block) if order == "block" else natural
    expected = gptq_reference(weight, hessian, fmt, 0.01, columns[0].tolist())
    result = gptq(weight, hessian, fmt, damping=0.01, order=order)
    kept = loss_of(expected, weight, hessian) <= loss_of(fmt.fake_quantize(weight), weight, hessian)
    torch.testing.assert_close(result.weight[kept], expected[kept], rtol=0, atol=1e-12)


def test_float32_loss_is_the_references_to_two_percent() -> None:
    fmt = parse("mxint4@32")
    weight, hessian = correlated_layer(16, 128)
    order = rounding_order(hessian[None], 32)[0].tolist()
    reference = loss_of(gptq_reference(weight, hessian, fmt, 0.01, order), weight, hessian).sum()
    assert gptq(weight, hessian, fmt).loss == pytest.approx(reference.item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_remaining_columns_satisfy_the_normal_equations_after_each_block(dtype: torch.dtype) -> None:
    """(W' - W)_R H_RR + (Q - W)_B H_BR = 0: what is left is the optimum given what was rounded."""
    fmt = parse("mxint4@16")
    weight, hessian = correlated_layer(8, 64, dtype=dtype)
    natural = torch.arange(64)[None]
    factor = factorize(hessian[None], natural, 0.01, dtype)
    damped = hessian.double() + factor.ridge[0] * torch.eye(64, dtype=torch.float64)
    rounded = gptq(weight, hessian, fmt, order="none")
    assert rounded.rtn_rows == 0
    for stop in (16, 32, 48):
        done, rest = slice(0, stop), slice(stop, 64)
        error = (rounded.weight[:, done] - weight[:, done]).double()
        moved = _continue_columns(error, factor.feedback[0].double(), stop)
        force = error @ damped[done, rest]
        assert ((moved @ damped[rest, rest] + force).norm() / force.norm()).item() < 1e-4


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_inverse_by_slabs_is_the_inverse_and_ranks_share_it(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_factor, "_SLAB", 16)
    x = torch.randn(2, 200, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lower = torch.linalg.cholesky(x.mT @ x)
    wanted = torch.linalg.inv(lower) * lower.diagonal(dim1=-2, dim2=-1)[:, :, None]
    parts = []
    for rank in range(world):
        monkeypatch.setattr(ranks, "_now", ranks._Together(rank, world, rank == 0))
        monkeypatch.setattr(ranks, "summed", lambda tensor: tensor)
        parts.append(hessian_factor._unit_inverse(lower, torch.float64, spread=True))
    assert torch.allclose(sum(parts), wanted, rtol=1e-12, atol=1e-12)
    assert all(part.any() for part in parts) and sum((part != 0).sum() for part in parts) <= (wanted != 0).sum()


def test_a_wide_inverse_copies_no_corner_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_factor, "_SLAB", 32)
    n = 256
    lower = torch.eye(n, dtype=torch.float64).expand(1, n, n).contiguous()
    with LiveBytes() as live:
        hessian_factor._unit_inverse(lower, torch.float32)
    # The matrix, which views of it bring in, the inverse, and slabs.
    assert 12 * n * n < live.peak <= 12 * n * n + 24 * 32 * n
    with LiveBytes() as corner:
        torch.linalg.solve_triangular(lower[:, 32:, 32:], torch.ones(1, n - 32, 1, dtype=torch.float64), upper=False)
    assert corner.peak >= 8 * (n - 32) ** 2


def _continue_columns(error: Tensor, feedback: Tensor, stop: int) -> Tensor:
    """Feedback that errors `(rows, stop)` of the first columns leave on the rest, by GPTQ's recursion."""
    shift = torch.zeros(len(error), len(feedback), dtype=torch.float64)
    for j in range(stop):
        residual = shift[:, j] - error[:, j]
        shift[:, j + 1 :] -= residual[:, None] * feedback[j, j + 1 :]
    return shift[:, stop:]


def test_sweeping_exponents_beats_the_rule() -> None:
    weight, hessian = correlated_layer(48, 128)
    sweep = gptq(weight, hessian, parse("mxint4@32"), exponents="sweep")
    rule = gptq(weight, hessian, parse("mxint4@32"), exponents="rule")
    assert sweep.loss < 0.95 * rule.loss


def test_result_does_not_depend_on_the_scale_of_the_hessian() -> None:
    weight, hessian = correlated_layer(8, 64)
    small, large = (gptq(weight, hessian * 2.0**k, parse("mxint4@32")).weight for k in (-40, 40))
    assert torch.equal(small, large)


@pytest.mark.parametrize("name", [name for name in FORMATS if "@" in name])
def test_candidates_are_the_formats_own(name: str) -> None:
    fmt = parse(name)
    columns = torch.randn(2, 32, 50, generator=torch.Generator().manual_seed(0))
    columns *= 2.0 ** torch.arange(-150, 100, 5)
    columns[:, :, 7] = 0
    columns[0, 3, :] = columns.abs().amax(1)[0].log2().ceil().exp2()
    expected = fmt.scale.candidates(columns.mT.contiguous(), fmt.element, None, sweep=True).movedim(0, 1)[:, :3]
    assert torch.equal(candidate_scales(columns, fmt, "sweep")[:, :3], expected)


class TestOrder:
    def test_blocks_stay_whole_and_fall_in_mass(self) -> None:
        hessian = correlated_layer(1, 80)[1][None]
        order = rounding_order(hessian, 16)[0]
        blocks = order.reshape(5, 16)
        mass = hessian[0].diagonal()[blocks].sum(-1)
        assert (blocks // 16 == blocks[:, :1] // 16).all()
        assert (mass.diff() <= 0).all()
        assert (hessian[0].diagonal()[blocks].diff(dim=-1) <= 0).all()

    def test_ragged_block_comes_last(self) -> None:
        hessian = torch.diag(torch.arange(1.0, 41.0))[None]
        order = rounding_order(hessian, 16)[0]
        assert sorted(order[-8:].tolist()) == list(range(32, 40))

    def test_permuted_problem_gives_the_permuted_solution(self) -> None:
        weight, hessian = correlated_layer(8, 64)
        order = rounding_order(hessian[None], 16)[0]
        here = gptq(weight, hessian, parse("mxint4@16")).weight
        there = gptq(weight[:, order], hessian[order][:, order], parse("mxint4@16"), order="none").weight
        assert torch.equal(here[:, order], there)


class TestBatch:
    def test_shared_hessian_equals_one_by_one(self) -> None:
        weight, hessian = correlated_layer(40, 64)
        parts = list(weight.split([24, 8, 8]))
        together = gptq_batch(parts, hessian, parse("mxint4@32"))
        for part, result in zip(parts, together, strict=True):
            alone = gptq(part, hessian, parse("mxint4@32"))
            assert torch.equal(result.weight, alone.weight)
            assert torch.equal(result.scales, alone.scales)
            assert result.loss == pytest.approx(alone.loss, rel=1e-5)

    @pytest.mark.parametrize("refine", [0, 1])
    def test_stacked_hessians_equal_one_by_one(self, refine: int) -> None:
        layers = [correlated_layer(16, 80, seed) for seed in range(3)]
        weights, hessians = zip(*layers, strict=True)
        fmt = parse("mxfp4_e2m1@32")
        together = gptq_batch(weights, torch.stack(hessians), fmt, refine=refine)
        for (weight, hessian), result in zip(layers, together, strict=True):
            alone = gptq(weight, hessian, fmt, refine=refine)
            torch.testing.assert_close(result.weight, alone.weight, rtol=0, atol=0)

    def test_one_bad_hessian_leaves_the_others_alone(self) -> None:
        weight, hessian = correlated_layer(8, 64)
        bad = torch.eye(64) + 1000.0 * (1 - torch.eye(64))
        good, fallen = gptq_batch([weight, weight], torch.stack([hessian, bad]), parse("mxint4@32"))
        assert not good.fell_back and fallen.fell_back
        assert torch.equal(good.weight, gptq(weight, hessian, parse("mxint4@32")).weight)


class TestDamping:
    @staticmethod
    def indefinite(least: float) -> Tensor:
        """Unit diagonal, smallest eigenvalue `least`."""
        hessian = torch.eye(64)
        hessian[0, 1] = hessian[1, 0] = 1.0 - least
        return hessian

    @pytest.mark.parametrize(("least", "used"), [(0.5, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
    def test_ladder_rises_tenfold_until_it_factorizes(self, least: float, used: float) -> None:
        result = gptq(torch.randn(4, 64), self.indefinite(least), parse("mxint4@32"))
        assert result.damping_used == pytest.approx(used)
        assert not result.fell_back

    def test_after_three_rises_the_weight_is_rounded_to_nearest_and_says_so(self) -> None:
        weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        result = gptq(weight, self.indefinite(-50.0), parse("mxint4@32"))
        assert result.fell_back and result.rtn_rows == 4
        assert torch.equal(result.weight, parse("mxint4@32").fake_quantize(weight))

    def test_ladder_from_zero_starts_at_one_percent(self) -> None:
        result = gptq(torch.randn(4, 64), self.indefinite(-0.005), parse("mxint4@32"), damping=0.0)
        assert result.damping_used == pytest.approx(0.01)


class TestDeadColumns:
    def test_they_are_rounded_to_nearest_and_counted(self) -> None:
        weight, hessian = correlated_layer(8, 64)
        hessian[[3, 40]] = 0
        hessian[:, [3, 40]] = 0
        fmt = parse("mxint4@32")
        result = gptq(weight, hessian, fmt)
        assert result.dead_columns == 2
        nearest = fmt.round_to_grid(weight.unflatten(1, (2, 32)), result.scales[..., None]).flatten(1)
        assert torch.equal(result.weight[:, [3, 40]], nearest[:, [3, 40]])

    def test_hessian_of_zeros_gives_a_rounded_weight(self) -> None:
        weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        result = gptq(weight, torch.zeros(64, 64), parse("mxint4@32"))
        assert (result.dead_columns, result.loss, result.fell_back) == (64, 0.0, True)
        assert torch.equal(result.weight, parse("mxint4@32").fake_quantize(weight))

    def test_living_matrix_is_untouched(self) -> None:
        hessian = correlated_layer(1, 16)[1][None]
        assert revive_dead_columns(hessian)[0] is hessian


class TestRefinement:
    @pytest.mark.parametrize("name", ["mxint4@32", "mxfp4_e2m1@32", "mxint4@24"])
    def test_each_sweep_lowers_the_loss(self, name: str) -> None:
        weight, hessian = correlated_layer(48, 128)
        losses = [gptq(weight, hessian, parse(name), refine=sweeps).loss for sweeps in (0, 1, 4)]
        assert losses[1] < 0.95 * losses[0]
        assert losses[2] < losses[1]

    def test_result_stays_on_the_grid(self) -> None:
        weight, hessian = correlated_layer(16, 80)
        assert on_grid(gptq(weight, hessian, parse("mxint4@32"), refine=2), parse("mxint4@32"))

    def test_gain_holds_on_unseen_inputs(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = correlated_inputs(8192, 96, generator).float()
        seen, unseen = (part.mT @ part / len(part) for part in x.chunk(2))
        weight = torch.randn(64, 96, generator=generator)
        plain, refined = (gptq(weight, seen, parse("mxint4@32"), refine=n).weight for n in (0, 2))
        assert loss_of(refined, weight, unseen).sum() < 0.95 * loss_of(plain, weight, unseen).sum()

    def test_no_row_gets_worse_in_the_damped_loss(self) -> None:
        fmt = parse("mxint4@16")
        weight, hessian = correlated_layer(16, 64, dtype=torch.float64)
        start = fmt.fake_quantize(weight)
        exponents = fmt.choose(weight.unflatten(1, (4, 16)))
        columns, rounded = weight.mT[None], start.mT[None]
        found, _ = refine_blocks(
            columns,
            rounded,
            exponents[None],
            hessian[None],
            fmt,
            16,
            lambda block: fmt.scale.candidates(block.mT, fmt.element, None, sweep=True).movedim(0, 1),
            1,
        )
        assert (loss_of(found[0].mT, weight, hessian) <= loss_of(start, weight, hessian) + 1e-12).all()


class TestTarget:
    def test_equal_inputs_leave_the_weight_as_it_is(self) -> None:
        weight, hessian = correlated_layer(8, 64, dtype=torch.float64)
        torch.testing.assert_close(asymmetric_target(weight, hessian, hessian, alpha=1.0), weight)

    def test_full_strength_is_the_least_squares_weight(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = correlated_inputs(500, 32, generator)
        noisy = x + 0.1 * torch.randn(500, 32, generator=generator, dtype=torch.float64)
        weight = torch.randn(8, 32, generator=generator, dtype=torch.float64)
        found = asymmetric_target(weight, noisy.mT @ noisy, noisy.mT @ x, alpha=1.0, lam=0.0)
        expected = torch.linalg.lstsq(noisy, x @ weight.mT).solution.mT
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)

    def test_loss_is_measured_against_the_target(self) -> None:
        weight, hessian = correlated_layer(16, 64)
        target = weight + 0.05 * torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
        result = gptq(weight, hessian, parse("mxint4@32"), target=target)
        assert result.loss == pytest.approx(loss_of(result.weight, target, hessian).sum().item(), rel=1e-4)
        assert result.loss < gptq(weight, hessian, parse("mxint4@32")).loss * 1.5 + result.rtn_loss * 0.5

    def test_inputs_of_zeros_leave_the_weight_as_it_is(self) -> None:
        weight, zeros = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(64, 64)
        assert torch.equal(asymmetric_target(weight, zeros, zeros), weight)

    @pytest.mark.parametrize(
        ("hessian", "said"),
        [(torch.eye(64) - 2 * torch.eye(64)[3].diag(), "raise the ridge"), (torch.eye(64) * math.nan, "check the cal")],
    )
    def test_what_is_no_gram_matrix_is_refused(self, hessian: Tensor, said: str) -> None:
        with pytest.raises(ValueError, match=rf"cannot be factorized with 0\.1 of its mean diagonal .*{said}"):
            asymmetric_target(torch.zeros(4, 64), hessian, hessian)

    def test_shapes_are_checked(self) -> None:
        with pytest.raises(ValueError, match=r"\(64, 64\)"):
            asymmetric_target(torch.zeros(4, 64), torch.zeros(64, 64), torch.zeros(32, 64))


class TestInput:
    def test_bfloat16_weight_comes_back_in_float32(self) -> None:
        weight, hessian = correlated_layer(4, 64)
        assert gptq(weight.bfloat16(), hessian, parse("mxint4@32")).weight.dtype == torch.float32

    @pytest.mark.parametrize(
        ("weight", "hessian", "options", "message"),
        [
            (torch.zeros(4, 32), torch.eye(64), {}, r"weights must be \(rows, 64\)"),
            (torch.zeros(4, 64), torch.zeros(32, 64), {}, "Hessian must be"),
            (torch.zeros(4, 64), torch.full((64, 64), torch.nan), {}, "Hessian holds NaN"),
            (torch.full((4, 64), torch.inf), torch.eye(64), {}, "weight holds NaN or Inf"),
            (torch.zeros(4, 64), -torch.eye(64), {}, "negative diagonal"),
            (torch.zeros(4, 64), torch.eye(64), {"order": "actorder"}, "'block' or 'none'"),
            (torch.zeros(4, 64), torch.eye(64), {"exponents": "search"}, "'sweep' or 'rule'"),
            (torch.zeros(4, 64), torch.eye(64), {"damping": -1.0}, "must not be negative"),
            (torch.zeros(4, 64), torch.eye(64), {"target": torch.zeros(4, 32)}, "do not match"),
        ],
    )
    def test_what_cannot_be_solved_is_refused(
        self, weight: Tensor, hessian: Tensor, options: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            gptq(weight, hessian, parse("mxint4@32"), **options)


def test_symmetric_permutation_is_undone_by_its_inverse() -> None:
    hessian = correlated_layer(1, 48)[1][None]
    order = rounding_order(hessian, 16)
    back = permute_symmetric(permute_symmetric(hessian, order), order.argsort(-1))
    assert torch.equal(back, hessian)
