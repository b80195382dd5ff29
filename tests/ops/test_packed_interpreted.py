"""The kernels of packed weights, in Triton's interpreter: bits of the definitions, products to float32's rounding."""

from __future__ import annotations

import pytest

from tests.interpreter import IN_INTERPRETER, lines_at_once, numpy_scalars, passes_in_interpreter  # noqa: F401

FORMATS = ("mxint4@32", "mxint4@16", "mxfp4_e2m1@32", "mxint8@32", "mxfp8_e4m3@64", "mxfp8_e5m2@32")
ODD = ("mxint2@32", "mxint3@16", "mxint5@32", "mxfp6_e2m3@64", "mxfp6_e3m2@32", "mxint7@16")

if not IN_INTERPRETER:

    @pytest.mark.triton
    def test_all_of_this_file_passes_in_the_interpreter():
        passes_in_interpreter(__file__)

else:
    import itertools

    import torch
    import torch.nn.functional as F
    import triton
    import triton.language as tl

    from mxfx.algorithms.hadamard import hadamard_matrix
    from mxfx.formats import parse
    from mxfx.formats.stored import restore, store
    from mxfx.ops import fp8
    from mxfx.ops.kernels import cuda, limits, packed, packed_cuda
    from mxfx.ops.kernels.fp8_triton import rows_to_e4m3
    from mxfx.ops.kernels.integer_mma_triton import Tiling, multiply_integer_tiles
    from mxfx.ops.kernels.integer_triton import multiply_integers
    from mxfx.ops.kernels.nibbles_triton import nibbles
    from mxfx.ops.kernels.packed_triton import expand, expand_to_e4m3, multiply_rows
    from mxfx.ops.kernels.rounding_triton import grid_of
    from mxfx.ops.kernels.skinny_triton import multiply_some_rows

    HALVES = (torch.bfloat16, torch.float16)
    #: Rows, both operands' format, width, and whether more is added: words of scales and single ones, rows of a tile
    #: and more.
    PRODUCTS = (
        (2, "mxint4@16", 96, True),
        (3, "mxint4@32", 256, True),
        (9, "mxint4@32", 288, False),
        (40, "mxint4@32", 128, True),
        (5, "mxint4@64", 512, False),
        (5, "mxint4@128", 640, True),
    )
    TILINGS = (Tiling(16, 8, 8, 4, 2), Tiling(32, 16, 4, 4, 3), Tiling(64, 32, 2, 4, 1))

    @triton.jit
    def _nibbles_kernel(halfwords_ptr, scale_ptr, out_ptr, PART: tl.constexpr):
        at = tl.program_id(0) * 4096 + tl.arange(0, 4096)
        tl.store(out_ptr + at, nibbles(tl.load(halfwords_ptr + at), tl.load(scale_ptr + at), PART, tl.bfloat16))

    def _packed(text: str, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales, and the float32 weight behind them; a zero block, blocks of many sizes."""
        fmt, generator = parse(text), torch.Generator().manual_seed(rows)
        weight = torch.randn(rows, width, generator=generator)
        weight *= torch.exp2(torch.randint(-3, 3, (rows, width), generator=generator))
        weight[0, : fmt.block] = 0.0
        weight[-1] *= 2.0**-40
        codes, scales = store(fmt.fake_quantize(weight), fmt)  # type: ignore[misc]
        return codes, scales, restore(codes, scales, fmt, width, torch.float32)

    def _same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
        equal = (got == wanted) & (got.signbit() == wanted.signbit())
        return got.shape == wanted.shape and bool((equal | (got.isnan() & wanted.isnan())).all())

    # Every format is decoded in float32, which the last step alone rounds: to each dtype from integers and from floats.
    @pytest.mark.parametrize(
        ("text", "dtype"),
        [
            *((text, torch.float32) for text in FORMATS + ODD),
            *itertools.product(("mxint4@32", "mxint7@16", "mxfp4_e2m1@32", "mxfp8_e5m2@32"), HALVES),
        ],
    )
    def test_expanding_gives_the_bits_of_the_weight(text, dtype):
        codes, scales, weight = _packed(text, 6, 320)
        scales[2, 1] = 255
        weight = restore(codes, scales, parse(text), 320, dtype)
        out = torch.empty(6, 320, dtype=dtype)
        expand(codes, scales, parse(text), out)
        assert _same(out, weight) and out.isnan().sum() == parse(text).block

    @pytest.mark.parametrize(
        "text", ["mxint4@32", "mxint4@16", "mxint4@128", "mxfp4_e2m1@64", "mxint3@16", "mxfp6_e2m3@32"]
    )
    def test_expanding_to_e4m3_loses_nothing(text):
        codes, scales, weight = _packed(text, 6, 384)
        payload, row_scales = torch.empty(6, 384, dtype=torch.uint8), torch.empty(6)
        expand_to_e4m3(codes, scales, parse(text), payload, row_scales)
        assert fp8.octaves_beyond(codes, scales, parse(text), 384) == 0
        assert _same(fp8.from_rows(payload, row_scales[:, None], torch.float32), weight)

    @pytest.mark.parametrize("text", ["mxint4@32", "mxfp4_e2m1@32"])
    def test_rows_that_e4m3_does_not_hold_are_those_that_expanding_changes(text):
        codes, scales, _ = _packed(text, 12, 64)
        scales[:, 0], scales[:, 1] = torch.arange(120, 144, 2), 120
        weight = restore(codes, scales, parse(text), 64, torch.float32)
        payload, row_scales = torch.empty(12, 64, dtype=torch.uint8), torch.empty(12)
        expand_to_e4m3(codes, scales, parse(text), payload, row_scales)
        changed = (fp8.from_rows(payload, row_scales[:, None], torch.float32) != weight).any(-1).sum()
        assert 0 < changed < 12 and fp8.octaves_beyond(codes, scales, parse(text), 64) == changed

    def test_a_block_that_is_not_a_number_makes_its_row_none():
        codes, scales, _ = _packed("mxint4@32", 4, 96)
        scales[1, 2] = 255
        payload, row_scales = torch.empty(4, 96, dtype=torch.uint8), torch.empty(4)
        expand_to_e4m3(codes, scales, parse("mxint4@32"), payload, row_scales)
        back = fp8.from_rows(payload, row_scales[:, None], torch.float32)
        assert back[1].isnan().all()
        others = [0, 2, 3]
        assert _same(back[others], restore(codes, scales, parse("mxint4@32"), 96, torch.float32)[others])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("text", ["mxint4@32", "mxfp4_e2m1@16", "mxfp6_e2m3@32"])
    def test_rows_become_e4m3_as_their_definition_says(text, dtype):
        x = torch.randn(7, 160, generator=torch.Generator().manual_seed(2)).to(dtype)
        x[1] = 0.0
        x = parse(text).fake_quantize(x)
        x[3, 5] = float("nan")
        payload, row_scales = torch.empty(7, 160, dtype=torch.uint8), torch.empty(7)
        inexact = torch.zeros(1, dtype=torch.int64)
        rows_to_e4m3(x, payload, row_scales, inexact)
        wanted, scales = fp8.to_rows(x)
        finite = x.isfinite().all(-1)
        assert torch.equal(payload[finite], wanted[finite]) and torch.equal(row_scales[finite], scales[finite, 0])
        assert inexact.item() == 0
        assert _same(fp8.from_rows(payload, row_scales[:, None], dtype)[finite], x[finite])
        for found in (fp8.from_rows(payload, row_scales[:, None], dtype), fp8.from_rows(wanted, scales, dtype)):
            assert found[3].isnan().all() and found.isnan().sum() == 160

    def test_rows_that_span_too_many_octaves_are_counted():
        x = torch.ones(9, 64)
        x[4, 0], x[7, 3] = 2.0**-17, 1.0009765625
        payload, row_scales = torch.empty(9, 64, dtype=torch.uint8), torch.empty(9)
        inexact = torch.tensor([5])
        rows_to_e4m3(x, payload, row_scales, inexact)
        assert inexact.item() == 7
        assert torch.equal(payload, fp8.to_rows(x)[0])

    # Formats and what reads them meet in float32 sums: each of either is here with two of the other.
    @pytest.mark.parametrize(
        ("text", "rows", "dtype"),
        [
            *((text, 2, torch.float32) for text in FORMATS),
            *((text, 1, torch.float16) for text in ("mxint4@32", "mxfp8_e4m3@64")),
            *((text, 2, torch.bfloat16) for text in ("mxint4@16", "mxfp4_e2m1@32")),
        ],
    )
    def test_few_rows_meet_the_packed_codes(text, rows, dtype):
        fmt, width, channels = parse(text), 128, 3
        codes, scales, weight = _packed(text, channels, width)
        generator = torch.Generator().manual_seed(3)
        x = parse("mxint4@32").fake_quantize(torch.randn(rows, width, generator=generator).to(dtype))
        bias = torch.randn(channels, generator=generator).to(dtype)
        wide = torch.zeros(rows, channels + 5, dtype=dtype)
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        wanted = F.linear(x.double(), weight.double(), bias.double())
        for given, factors in ((x, None), fp8.to_rows(x)):
            for b in (bias, None):
                multiply_rows(given, codes, scales, b, fmt, wide[:, 2 : channels + 2], factors)
                expected = wanted if b is not None else wanted - bias.double()
                torch.testing.assert_close(wide[:, 2 : channels + 2].double(), expected, rtol=tolerance, atol=tolerance)
        assert not wide[:, :2].any() and not wide[:, channels + 2 :].any()

    def test_a_row_that_begins_within_a_word_meets_the_codes():
        codes, scales, _ = _packed("mxint4@32", 3, 64)
        x = parse("mxint4@32").fake_quantize(torch.randn(1, 64)).bfloat16()
        within = torch.cat((torch.zeros(1, 1, dtype=torch.bfloat16), x), 1)[:, 1:]
        assert within.is_contiguous()
        given = (codes, scales, None, "mxint4@32")
        assert torch.equal(packed_cuda.mx_linear(within, *given), packed_cuda.mx_linear(x, *given))

    # The interpreter multiplies tiles of bfloat16 as integers: `tools/bench/packed_gemm.py` has them on a device.
    @pytest.mark.parametrize(
        ("text", "rows", "width", "channels"),
        [*((text, 16, 128, 33) for text in FORMATS), ("mxint4@32", 3, 576, 40), ("mxfp8_e4m3@64", 3, 576, 40)],
    )
    def test_some_rows_meet_codes_that_are_decoded_as_they_arrive(text, rows, width, channels):
        fmt, dtype = parse(text), torch.float16
        codes, scales, weight = _packed(text, channels, width)
        weight = weight.half().float()
        generator = torch.Generator().manual_seed(3)
        x = parse("mxint4@32").fake_quantize(torch.randn(rows, width, generator=generator).to(dtype))
        bias = torch.randn(channels, generator=generator).to(dtype)
        wide = torch.zeros(rows, channels + 5, dtype=dtype)
        wanted = F.linear(x.double(), weight.double(), bias.double())
        for given, factors in ((x, None), fp8.to_rows(x)):
            for b in (bias, None):
                multiply_some_rows(given, codes, scales, b, fmt, wide[:, 2 : channels + 2], factors)
                expected = wanted if b is not None else wanted - bias.double()
                torch.testing.assert_close(wide[:, 2 : channels + 2].double(), expected, rtol=2e-3, atol=2e-3)
        assert not wide[:, :2].any() and not wide[:, channels + 2 :].any()

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("tokens", "per_choice"), [(1, False), (1, True), (5, False), (5, True)])
    def test_experts_meet_their_packed_codes(tokens, per_choice, bias):
        """Two choices of six experts: fewer than there are, or more."""
        codes, scales, _ = _packed("mxint4@32", 6 * 7, 64)
        codes, scales = codes.unflatten(0, (6, 7)), scales.unflatten(0, (6, 7))
        generator = torch.Generator().manual_seed(1)
        experts = torch.randint(0, 6, (tokens, 2), generator=generator)
        x = torch.randn(*((tokens, 2, 64) if per_choice else (tokens, 64)), generator=generator)
        given = (x, codes, scales, experts, torch.randn(6, 7, generator=generator) if bias else None, "mxint4@32")
        wanted = torch.ops.mxfx.mx_expert_linear(*given)
        torch.testing.assert_close(packed_cuda.mx_expert_linear(*given), wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("part", range(4))
    def test_four_codes_of_a_halfword_are_those_of_the_format(part):
        halfwords = torch.arange(-(2**15), 2**15).to(torch.int16)
        scale, out = torch.full_like(halfwords, 0.25, dtype=torch.bfloat16), torch.empty(2**16, dtype=torch.bfloat16)
        _nibbles_kernel[(16,)](halfwords, scale, out, part)
        codes = halfwords.view(torch.uint8)[part // 2 :: 2] >> (4 * (part % 2)) & 0xF
        assert torch.equal(out.float(), ((codes.int() ^ 8) - 8).float() / 4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_quantizers_give_rows_of_e4m3_themselves(dtype):
        x, gate = (torch.randn(2, 5, 96, dtype=torch.float32).to(dtype) for _ in range(2))
        x[0, 1], x[1, 2, :32] = x[0, 1] * 64, 0
        weight, shared, own = (
            torch.rand(96).to(dtype),
            hadamard_matrix(32, dtype),
            (torch.randn(3, 32, 32) / 6).to(dtype),
        )
        calls = [
            ("fake_quantize", (x, "mxint4@32/mse", -1)),
            ("fake_quantize", (x, "mxfp4_e2m1@16/even", -1)),
            ("transform_quantize", (x, own, "mxint4@16")),
            ("transform_quantize", (x, shared, "mxint4@32", True)),
            ("norm_quantize", (x, weight, None, "mxint4@32", 1e-5)),
            ("norm_quantize", (x, weight, shared, "mxint4@16", 1e-5, 1.0, True, True)),
            ("norm_quantize", (x, weight, own, "mxint4@32/mse", 1e-5)),
            ("silu_mul_quantize", (gate, x, None, "mxfp4_e2m1@32")),
            ("silu_mul_quantize", (gate, x, own, "mxint4@32")),
            ("hadamard_quantize", (torch.cat((x, gate), -1), 192, "mxint4@16")),
        ]
        before = int(packed.inexact_rows(x.device))
        for name, args in calls:
            wanted = getattr(cuda, name)(*args)
            payload, row_scales = getattr(packed_cuda, f"{name}_e4m3")(*args)
            assert payload.shape == wanted.shape and row_scales.shape == (2, 5, 1)
            assert _same(fp8.from_rows(payload, row_scales, dtype), wanted), (name, args[2:])
            expected, scales = fp8.to_rows(wanted)
            assert torch.equal(payload, expected) and torch.equal(row_scales, scales), (name, args[2:])
        assert int(packed.inexact_rows(x.device)) == before

    def _of_all_sizes(rows: int, width: int, block: int, dtype: torch.dtype) -> torch.Tensor:
        """Blocks of one size a row, from the least numbers to the largest, and beside each other; ties among them."""
        generator = torch.Generator().manual_seed(rows)
        size = torch.linspace(-149, 128, rows)[:, None] - torch.randint(
            0, 9, (rows, width // block), generator=generator
        )
        fraction = torch.randint(-255, 256, (rows, width), generator=generator).double() / 128
        x = (fraction * torch.exp2(size.double().floor()).repeat_interleave(block, 1)).to(dtype)
        x[1, :block], x[2, 3], x[3, block + 1], x[4, 0] = 0.0, float("nan"), float("-inf"), -0.0
        x[5, :block] = torch.arange(block).to(dtype) / 4  # codes, and halves of them
        return x

    @pytest.mark.parametrize("text", ["mxint4@32/mse", "mxint4@32", "mxfp4_e2m1@32"])
    def test_rounding_two_at_a_time_and_e4m3_in_one_have_the_bits_of_both(text):
        fmt = parse(text)
        x = _of_all_sizes(60, 160, fmt.block, torch.bfloat16)
        payload, row_scales = torch.empty(60, 160, dtype=torch.uint8), torch.empty(60)
        inexact = torch.zeros(1, dtype=torch.int64)
        rows_to_e4m3(x, payload, row_scales, inexact, fmt)
        wanted, scales = fp8.to_rows(fmt.fake_quantize(x))
        finite = scales[:, 0].isfinite()
        assert torch.equal(row_scales.isfinite(), finite) and 30 < finite.sum() < 59
        assert torch.equal(row_scales[finite], scales[finite, 0])
        assert torch.equal(payload[finite], wanted[finite])

    def test_few_bits_are_rounded_two_at_a_time():
        """Whose arithmetic in bfloat16 is exact, of all its numbers."""
        assert not any(grid_of(parse("mxint4@32"), dtype).pairs for dtype in (torch.float32, torch.float16))
        every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
        for text in ("mxint2@16/mse", "mxint4@32/mse", "mxint6@16/mse", "mxfp4_e2m1@32/mse"):
            assert grid_of(parse(text), torch.bfloat16).pairs
            element = parse(text).element
            scaled = every[every.isfinite() & (every.abs() <= element.max_value)].double()
            rounded, lower = element.round(scaled), element.round(scaled * 2) / 2
            apart = rounded != lower
            for term in (rounded - lower, rounded + lower, 2 * scaled - (rounded + lower)):
                assert torch.equal(term[apart].to(torch.bfloat16).double(), term[apart])

    def test_blocks_too_far_apart_for_one_row_are_counted():
        x = torch.ones(4, 64)
        x[1, 32:] = 2.0**-19
        before = int(packed.inexact_rows(x.device))
        payload, row_scales = packed_cuda.transform_quantize_e4m3(x, torch.eye(32).repeat(2, 1, 1), "mxint4@32")
        assert int(packed.inexact_rows(x.device)) == before + 1
        assert fp8.from_rows(payload, row_scales, torch.float32)[1].tolist() == [1.0] * 32 + [0.0] * 32

    def _values(codes: torch.Tensor, units: torch.Tensor, block: int) -> torch.Tensor:
        """What `multiply_integers` takes, as float64."""
        parts = codes.view(*units.shape, 2, block // 2).transpose(-1, -2).reshape(*units.shape, block).double()
        powers = torch.exp2(units.double() - 127).masked_fill(units == 255, float("nan"))
        return (parts * powers[..., None]).flatten(-2)

    def _calls(dtype: torch.dtype, rows: int) -> list[tuple[str, tuple]]:
        generator = torch.Generator().manual_seed(rows)
        x, gate = (torch.randn(rows, 2, 96, generator=generator).to(dtype) for _ in range(2))
        x[0, 1], x[-1, 0, :32] = x[0, 1] * 64, 0
        weight, shared = torch.rand(96, generator=generator).to(dtype), hadamard_matrix(32, dtype)
        own = (torch.randn(3, 32, 32, generator=generator) / 6).to(dtype)
        beside = torch.cat((gate, x), -1)[..., 96:]
        return [
            ("fake_quantize", (x, "mxint4@32/mse", -1)),
            ("fake_quantize", (beside, "mxfp4_e2m1@32/even", -1)),
            ("transform_quantize", (x, own, "mxint4@32")),
            ("transform_quantize", (x, shared, "mxint4@16", True)),
            ("norm_quantize", (x, weight, None, "mxint4@32", 1e-5)),
            ("norm_quantize", (x, weight, shared, "mxint4@16", 1e-5, 1.0, True, True)),
            ("norm_quantize", (x, weight, own, "mxint4@32/mse", 1e-5)),
            ("norm_quantize", (beside, None, own, "mxint4@32/mse", 1e-5)),
            ("silu_mul_quantize", (gate, x, None, "mxfp6_e2m3@32")),
            ("silu_mul_quantize", (gate, x, own, "mxint4@32")),
        ]

    @pytest.mark.parametrize("inside", [0, 8192])
    @pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.float16, 5)])
    def test_quantizers_give_few_rows_as_integers(rows, dtype, inside, monkeypatch):
        monkeypatch.setattr(packed_cuda, "FACTORS_INSIDE", inside)
        before = int(packed.inexact_rows(torch.device("cpu")))
        for name, args in _calls(dtype, rows):
            wanted = getattr(cuda, name)(*args)
            codes, units = packed_cuda.integers(name, *args)
            block = parse(next(a for a in args if isinstance(a, str))).block
            found = _values(codes, units, block)
            assert torch.equal(found, wanted.double().view(found.shape)), (name, args[2:])
        assert int(packed.inexact_rows(torch.device("cpu"))) == before

    def test_a_block_that_is_not_a_number_makes_its_rows_none_and_what_int8_does_not_hold_is_counted():
        x = torch.ones(3, 64)
        x[1, 40] = float("nan")
        codes, units = packed_cuda.integers("fake_quantize", x, "mxint4@32", -1)
        assert units.tolist() == [[121, 121], [121, 255], [121, 121]] and not codes[1, 32:].any()
        before = int(packed.inexact_rows(x.device))
        tiny = torch.full((1, 64), 2.0**-126)
        tiny[0, 3] = 2.0**-127
        packed_cuda.integers("fake_quantize", tiny, "mxint4@32", -1)
        assert int(packed.inexact_rows(x.device)) == before + 1

    # Two rows each: 2 and 6 meet codes as integers, 66 and, in blocks of 16, 14 as E4M3. Each way with a residual and
    # without.
    @pytest.mark.parametrize(
        ("dtype", "rows", "residual"),
        [
            *((torch.float32, 1, False), (torch.float16, 3, True)),
            *itertools.product((torch.float32,), (7,), (False, True)),
            *itertools.product((torch.float16,), (33,), (False, True)),
        ],
    )
    def test_a_quantizer_and_its_linears_are_one_op(dtype, rows, residual):
        for name, args in _calls(dtype, rows):
            given = parse(next(a for a in args if isinstance(a, str)))
            text = f"mxint4@{given.block}"
            weights = [_packed(text, n, 96)[:2] for n in (7, 4, 2, 5)]
            codes, scales = [w[0] for w in weights], [w[1] for w in weights]
            biases = [torch.randn(n).to(dtype) for n in (7, 4, 2, 5)] if name == "norm_quantize" else []
            added = torch.randn(rows, 2, 18).to(dtype) if residual else None
            got = getattr(packed_cuda, f"{name}_linear")(codes, scales, biases, added, text, *args)
            # Here, on a CPU, the op of a quantizer is not its kernel for a device.
            integers = limits.takes_integers(parse(text), given, 2 * rows, 96)
            x = getattr(cuda if integers else torch.ops.mxfx_kernels, name)(*args).double()
            parts = [
                F.linear(x, restore(c, s, parse(text), 96, torch.float64), biases[i].double() if biases else None)
                for i, (c, s) in enumerate(weights)
            ]
            wanted = torch.cat(parts, -1).to(dtype) + (0 if added is None else added)
            tolerance = 1e-5 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)

    def _norms(dtype: torch.dtype, rows: int) -> list[tuple[torch.Tensor, torch.Tensor, tuple]]:
        """Two summands, each with a walk of its own through memory, and the rest of `norm_quantize`'s operands."""
        generator = torch.Generator().manual_seed(rows)
        x, branch, twice = (torch.randn(rows, n, generator=generator).to(dtype) for n in (160, 160, 320))
        x[0], branch[0, 5] = 0, float("inf")
        weight, own = torch.rand(160).to(dtype), (torch.randn(5, 32, 32, generator=generator) / 6).to(dtype)
        norms = (
            (weight, None, "mxint4@32/mse", 1e-5),
            (weight, hadamard_matrix(32, dtype), "mxint4@16", 1e-5, 1.0, True, True),
            (weight, own, "mxint4@32/mse", 1e-5),
            (None, own, "mxint4@32", 1e-5),
        )
        summands = ((x, branch), (twice[:, 160:], branch), (twice[:, :160], twice[:, 160:]))
        return [(*pair, norm) for pair, norm in zip((*summands, summands[0]), norms, strict=True)]

    @pytest.mark.parametrize("inside", [0, 8192])
    @pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 2), (torch.float16, 3)])
    def test_a_norm_of_a_sum_has_the_bits_of_both(dtype, rows, inside, monkeypatch):
        monkeypatch.setattr(packed_cuda, "FACTORS_INSIDE", inside)
        for x, branch, given in _norms(dtype, rows):
            total = x + branch
            for quantizer in (
                cuda.norm_quantize,
                packed_cuda.norm_quantize_e4m3,
                lambda *args, **added: packed_cuda.integers("norm_quantize", *args, **added),
            ):
                written = torch.full((rows, 160), float("nan"), dtype=dtype)
                found, wanted = quantizer(x, *given, added=(branch, written)), quantizer(total, *given)
                assert _same(written, total), given[1:]
                pairs = [(found, wanted)] if isinstance(found, torch.Tensor) else list(zip(found, wanted, strict=True))
                assert all(_same(one, other) for one, other in pairs), given[1:]

    # 3 and 9 rows meet codes as integers and as floats, 33 as E4M3.
    @pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 3), (torch.float16, 9), (torch.float16, 33)])
    def test_a_sum_its_norm_and_its_linears_are_one_op(dtype, rows):
        for x, branch, given in _norms(dtype, rows):
            text, x = f"mxint4@{parse(given[2]).block}", x[1:]  # without the row that is no number
            weights = [_packed(text, n, 160)[:2] for n in (7, 4)]
            codes, scales = [w[0] for w in weights], [w[1] for w in weights]
            found = packed_cuda.add_norm_quantize_linear(codes, scales, [], branch[1:], text, x, *given)
            wanted = packed._add_norm_quantize_linear(codes, scales, [], branch[1:], text, x, *given)
            assert torch.equal(found[0], wanted[0]) and found[0].is_contiguous()
            assert found[1].shape == wanted[1].shape and found[1].dtype == wanted[1].dtype
            # A last place of a norm may move an entry by one code.
            assert (found[1] - wanted[1]).norm() <= 0.05 * wanted[1].norm(), given[1:]

    def test_blocks_that_do_not_divide_a_row_are_left_to_the_definition():
        codes, scales = ([part] for part in _packed("mxint4@64", 4, 160)[:2])
        x, branch = torch.randn(2, 160), torch.randn(2, 160)
        given = (codes, scales, [], branch, "mxint4@64", x, None, None, "mxint4@64", 1e-5)
        assert packed_cuda.add_norm_quantize_linear(*given) is NotImplemented

    def test_summands_that_differ_in_shape_or_dtype_are_left_to_the_definition():
        codes, scales = ([part] for part in _packed("mxint4@32", 4, 64)[:2])
        x, rest = torch.randn(2, 64), (None, None, "mxint4@32", 1e-5)
        for other in (torch.randn(64), torch.randn(2, 64).half()):
            given = (codes, scales, [], other, "mxint4@32", x, *rest)
            assert packed_cuda.add_norm_quantize_linear(*given) is NotImplemented
            total, y = packed._add_norm_quantize_linear(*given)
            assert torch.equal(total, x + other)
            assert torch.equal(y, packed.NORM_LINEAR(codes, scales, [], None, "mxint4@32", x + other, *rest))

    @pytest.mark.parametrize(("rows", "text", "width", "residual"), PRODUCTS)
    def test_products_in_integers_are_those_of_the_definition(rows, text, width, residual):
        """Every way of them, bit by bit: sums that float32 holds, so that no order of theirs may round."""
        fmt, generator, dtype = parse(text), torch.Generator().manual_seed(rows), torch.float32
        x = torch.randn(rows, width, generator=generator).clamp(-3, 3)
        x[0, : fmt.block], x[-1, -1] = 0.0, float("nan")
        found = packed_cuda.integers("fake_quantize", x, text, -1)
        x = _values(*found, fmt.block)
        sizes = (40, 7, 3, 18)
        weights = [fmt.fake_quantize(torch.randn(n, width, generator=generator).clamp(-3, 3)) for n in sizes]
        for weight in weights:
            weight[0, : fmt.block] = 0.0
        packed_weights = [store(weight, fmt) for weight in weights]
        codes, scales = [p[0] for p in packed_weights], [p[1] for p in packed_weights]
        scales[1][3, 0], weights[1][3] = 255, float("nan")
        biases = [torch.randn(n, generator=generator).round() for n in sizes] if residual else []
        added = torch.randn(rows, sum(sizes), generator=generator).round() if residual else None
        wanted = F.linear(x, torch.cat(weights).double(), torch.cat(biases).double() if biases else None)
        wanted = wanted.to(dtype) + (0 if added is None else added)
        assert wanted[-1].isnan().all() and wanted[:-1].isnan().sum() == rows - 1
        for tiling in (None, TILINGS[rows % 3]) if fmt.block >= 32 else ():
            out = torch.empty(rows, sum(sizes))
            multiply_integer_tiles(*found, codes, scales, biases, added, fmt, out, tiling)
            assert _same(out, wanted), tiling
        out = torch.empty(rows, sum(sizes))
        multiply_integers(*found, codes, scales, biases, added, fmt, out)
        assert _same(out, wanted)

    def test_scales_that_do_not_lie_on_a_word_are_read_one_by_one():
        x = parse("mxint4@32").fake_quantize(torch.randn(9, 256))
        codes, units = packed_cuda.integers("fake_quantize", x, "mxint4@32", -1)
        weight, powers, _ = _packed("mxint4@32", 16, 256)
        wanted, out = torch.empty(9, 16), torch.empty(9, 16)
        given = ([], None, parse("mxint4@32"))
        multiply_integer_tiles(codes, units, [weight], [powers], *given, wanted)
        moved = torch.empty(powers.numel() + 1, dtype=torch.uint8)[1:].view(powers.shape).copy_(powers)
        multiply_integer_tiles(codes, units, [weight], [moved], *given, out)
        assert torch.equal(out, wanted)

    def test_weights_of_more_bits_than_e4m3_holds_are_never_expanded_to_it():
        codes, scales, _ = _packed("mxint8@32", 16, 64)
        payload, factors = packed_cuda.fake_quantize_e4m3(torch.randn(20, 64), "mxint4@32")
        given = (payload, factors, [codes], [scales], [], "mxint8@32", torch.float32)
        assert packed_cuda.mx_linear_e4m3(*given) is NotImplemented
        few = (payload[:2], factors[:2], *given[2:])
        assert packed_cuda.mx_linear_e4m3(*few).shape == (2, 16)
