"""The C kernels: rounding equal to the definition to the bit, products equal to float64, steps close to definitions."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mxfx.formats import FormatError, parse
from mxfx.formats.stored import codes_length, restore, scales_length, store
from mxfx.ops import cached_attend, mx_linear, rms_norm, rope
from mxfx.ops.cache import cache_bias, write_cache
from mxfx.ops.fused import norm_quantize, rope_quantize, silu_mul_quantize, transform_quantize
from mxfx.ops.kernels import build, structs
from mxfx.ops.kernels.build import library
from mxfx.ops.kernels.calls import recorded

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))

FORMATS = (
    *("mxint4@32", "mxint4@32/mse", "mxint8@16/ceil", "mxint2@32/rceil", "mxint4@24/mse", "mxint8@32/mse"),
    *("mxfp4_e2m1@32", "mxfp4_e2m1@32/mse", "mxfp6_e3m2@32/even", "mxfp6_e2m3@16/mse", "mxfp8_e4m3@32/rceil"),
    *("mxfp8_e5m2@32/mse", "mxfp4_e1m2@128/mse", "mxfp8_e3m4@32"),
)
DTYPES = (torch.float32, torch.bfloat16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    nan = wanted.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(bits(found)[~nan], bits(wanted)[~nan])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", FORMATS)
def test_rounding_is_the_definition_to_the_bit(text: str, dtype: torch.dtype) -> None:
    from mxfx.ops.kernels import cpu

    generator = torch.Generator().manual_seed(1)
    x = random(200, 166) * torch.exp2(torch.randint(-150, 128, (200, 1), generator=generator).float())
    x[3], x[4, 5], x[5, 40], x[7] = 0, float("nan"), float("inf"), -0.0
    x[8], x[9] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    x[10:40] = torch.randint(-9, 10, (30, 166), generator=generator) * 0.5
    x[40:60] = random(20, 166) * torch.exp2(torch.randint(-9, 9, (20, 166), generator=generator).float())
    x = x.to(dtype)
    assert same_bits(cpu.fake_quantize(x, text), parse(text).fake_quantize(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_weight", ["mxint4@32/mse", "mxfp4_e2m1@32", "mxint4@16"])
@pytest.mark.parametrize("of_input", ["mxint4@32/mse", "mxfp4_e2m1@32", "mxint8@32", "mxfp6_e2m3@32"])
def test_products_of_codes_are_those_of_float64_rounded_once(of_weight: str, of_input: str, dtype: torch.dtype) -> None:
    from mxfx.ops.kernels import cpu

    fmt = parse(of_weight)
    w = fmt.fake_quantize(random(101, 160))
    codes, scales = store(w, fmt)
    x = parse(of_input).fake_quantize(random(3, 1, 160, seed=2).to(dtype))
    with recorded() as calls:
        found = cpu.mx_linear(x, codes, scales, None, of_weight)
    assert [call.function.__name__ for call in calls] == ["mxfx_product"]
    assert torch.equal(found, (x.double() @ w.double().T).float().to(dtype))


def test_a_row_that_lies_on_no_grid_and_a_broken_block_go_their_old_way() -> None:
    from mxfx.ops.kernels import cpu

    fmt = parse("mxint4@32")
    w = fmt.fake_quantize(random(8, 64))
    w[5, 40] = float("nan")
    w = fmt.fake_quantize(w)
    codes, scales = store(w, fmt)
    for x in (random(1, 1, 64), fmt.fake_quantize(random(1, 1, 64)), fmt.fake_quantize(random(1, 5, 64))):
        found, wanted = (f(x, codes, scales, None, "mxint4@32") for f in (cpu.mx_linear, mx_linear))
        assert torch.equal(found.isnan(), wanted.isnan())
        assert found[..., 5].isnan().all()
        assert torch.allclose(found, wanted, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["mxint4@32", "mxfp4_e2m1@32", "mxint8@16", "mxfp8_e4m3@32"])
def test_decoded_weights_are_those_of_the_definition_to_the_bit(text: str, dtype: torch.dtype) -> None:
    from mxfx.ops.kernels import cpu

    fmt = parse(text)
    codes, scales = store(fmt.fake_quantize(random(40, 101)), fmt)
    assert same_bits(cpu.restored(codes, scales, text, 101, dtype), restore(codes, scales, fmt, 101, dtype))


def _close(found: Tensor, wanted: Tensor, text: str | None, share: float = 0.02) -> None:
    """Equal but for rounding: of a quantized tensor a few codes may fall to the other side."""
    assert found.shape == wanted.shape
    differ = (found.float() - wanted.float()).abs() > 2e-2 * wanted.float().abs().amax()
    assert differ.float().mean() <= (share if text else 0), differ.float().mean()


def test_operands_that_do_not_fit_are_refused_and_not_read_beyond() -> None:
    """C asks for no shape: a matrix, a gain or codes that are too short were read beyond, one divided by zero."""
    from mxfx.ops.kernels import cpu, few_rows

    x, gain, four, heads = random(1, 1, 64), random(32), random(4, 8, 8), random(2, 8, 8, 8)
    for wrong in (
        lambda: cpu.block_transform(x, four),
        lambda: cpu.block_transform(x, heads),
        lambda: torch.ops.mxfx_kernels.block_transform(x, four),
        lambda: torch.ops.mxfx_kernels.block_transform(random(1, 1, 60), four[0]),
        lambda: torch.ops.mxfx_kernels.transform_quantize(x, four, "mxint4@8"),
        lambda: torch.ops.mxfx_kernels.norm_quantize(x, gain, None, "mxint4@32", 1e-5),
        lambda: torch.ops.mxfx_kernels.rms_norm(x, gain, 1e-5),
        lambda: torch.ops.mxfx_kernels.silu_mul_quantize(x, x, four, "mxint4@8"),
    ):
        try:
            assert wrong() is NotImplemented
        except (ValueError, RuntimeError) as error:
            assert any(words in str(error) for words in ("block_transform: ", "must match the size"))
    stored = store(parse("mxint4@32").fake_quantize(random(8, 64)), parse("mxint4@32"))
    assert stored is not None
    for shape in ((1, 1, 128), (1, 1, 32), (3, 128)):
        x = parse("mxint4@32").fake_quantize(random(*shape))
        with pytest.raises(ValueError, match=r"rows of (32|128) in mxint4@32 are .* got \(8, 32\) and \(8, 2\)"):
            torch.ops.mxfx_kernels.mx_linear(x, *stored, None, "mxint4@32")
    with pytest.raises(RuntimeError, match="size"):
        torch.ops.mxfx_kernels.mx_linear(random(1, 1, 64), *stored, random(4), "mxint4@32")
    codes, scales = stored
    for short in (scales[:, :1], scales[:4]):
        with pytest.raises(ValueError, match=r"rows of 64 in mxint4@32 are .* 2 scales each"):
            torch.ops.mxfx_kernels.mx_linear(x[..., :64], codes, short.contiguous(), None, "mxint4@32")
    with pytest.raises(FormatError, match="needs a tensor that has it"):
        torch.ops.mxfx_kernels.fake_quantize(torch.tensor(1.0), "mxint4@32")
    assert few_rows.linear(random(1, 1, 128).bfloat16(), random(8, 64).bfloat16()) is NotImplemented


def _token_over_eight(allowed: Tensor | None, keys: Tensor) -> Tensor:
    q, k, v = random(1, 4, 1, 16), random(1, 2, 1, 16, seed=1), random(1, 2, 1, 16, seed=2)
    rest = (random(1, 2, 8, 16, seed=3), None, None, 0.25, True, None, None, None, None, None, None, None, True)
    return cached_attend(q, k, v, allowed, torch.tensor([7]), keys, *rest)


def test_a_mask_of_other_numbers_or_of_fewer_places_is_not_read_as_bytes() -> None:
    keys, shown = random(1, 2, 8, 16), torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1]).view(1, 1, 1, 8)
    wanted = _token_over_eight(shown.bool(), keys.clone())
    torch.testing.assert_close(_token_over_eight(shown.log(), keys.clone()), wanted)
    with pytest.raises(RuntimeError, match="must match"):
        _token_over_eight(shown[..., :6].bool(), keys.clone())


def test_a_key_of_nan_is_not_passed_over() -> None:
    keys = random(1, 2, 8, 16)
    keys[0, 0, 2] = torch.nan
    found = _token_over_eight(None, keys)
    assert found[:, :2].isnan().all() and found[:, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_through_fused_kernels_is_close_to_the_definitions(dtype: torch.dtype) -> None:
    from mxfx.ops.kernels import cpu

    text, width = "mxint4@32/mse", 96
    x, up, gain = (random(2, 1, width, seed=seed).to(dtype) for seed in (1, 2, 3))
    for matrix in (None, random(32, 32).to(dtype) / 6, random(3, 32, 32).to(dtype) / 6, random(6, 16, 16) / 4):
        for eps, offset, first in ((1e-5, 0.0, False), (1e-6, 1.0, True)):
            given = (x, gain[0, 0], matrix, text, eps, offset, first)
            _close(cpu.norm_quantize(*given), norm_quantize(*given), text)
        _close(cpu.silu_mul_quantize(x, up, matrix, text), silu_mul_quantize(x, up, matrix, text), text)
        _close(cpu.transform_quantize(x, matrix, text), transform_quantize(x, matrix, text), text)
    given = (x, gain[0, 0], 1e-5)
    _close(cpu.norm(*given), rms_norm(*given), None)
    heads = random(2, 6, 1, 64).to(dtype)
    cos, sin = random(2, 1, 64, seed=5).to(dtype), random(2, 1, 64, seed=6).to(dtype)
    assert torch.equal(cpu.rope(heads, cos, sin), rope(heads, cos, sin))
    for matrix in (None, random(3, 2, 32, 32).to(dtype) / 6):
        given = (heads, cos, sin, matrix, text)
        _close(cpu.rope_quantize(*given), rope_quantize(*given), text)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "formats", [(None, None), ("mxint4@32", "mxint4@32"), ("mxint8@16", None), ("mxfp4_e2m1@32",) * 2]
)
@pytest.mark.parametrize(
    ("window", "softcap", "sinks", "padded"),
    [(None, None, False, False), (None, 20.0, True, True), (7, None, False, True)],
)
def test_a_token_over_a_cache_is_written_and_attends_as_by_definition(
    formats: tuple, window: int | None, softcap: float | None, sinks: bool, padded: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip

    room, past = (7 if window else 24), 20
    k, v = (random(2, 3, past + 1, 64, seed=seed).to(dtype) for seed in (1, 2))
    found = [x if f is None else parse(f).fake_quantize(x) for x, f in zip((k, v), formats, strict=True)]
    q, slots = random(2, 6, 1, 64, seed=3).to(dtype), torch.arange(past + 1)
    mask = (torch.arange(24)[None] >= torch.tensor([[0], [15]])).long() if padded else torch.ones(2, 24).long()
    results = []
    for ours in (True, False):
        caches = []
        for x, text in zip(found, formats, strict=True):
            fmt = None if text is None else parse(text)
            sizes = (64, 0) if fmt is None else (codes_length(64, fmt), scales_length(64, fmt))
            kind = dtype if fmt is None else torch.uint8
            codes = torch.zeros(2, 3, room, sizes[0], dtype=kind)
            scales = None if fmt is None else torch.zeros(2, 3, room, sizes[1], dtype=torch.uint8)
            write_cache(codes, scales, x[:, :, :past], slots[:past], fmt)
            caches.append((codes, scales))
        (keys, of_keys), (values, of_values) = caches
        new = [x[:, :, past:] for x in found]
        allowed = cache_bias(mask, q, new[0], slots[past:], keys, True, window, None)
        sink = random(6, seed=4) if sinks else None
        given = (allowed, slots[past:], keys, values, of_keys, of_values)
        if not ours:
            monkeypatch.setattr("mxfx.ops.cache.load_cpu", lambda: "not here")
        with recorded() as calls:
            out = cached_attend(q, *new, *given, 0.125, True, window, None, softcap, sink, None, *formats, True)
        assert len(calls) == int(ours)
        results.append((out, *given[2:]))
    _close(results[0][0], results[1][0], None)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def test_how_many_rows_meet_codes_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxfx.ops.kernels import crossing

    monkeypatch.setenv("MXFX_CACHE", str(tmp_path))
    monkeypatch.delenv(crossing.VARIABLE)
    taken, clock = {"codes": 0, "decoded": 0}, [0.0]
    monkeypatch.setattr(crossing.time, "perf_counter", lambda: clock[0])

    def way(name: str, seconds: float) -> crossing.Product:
        def run(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str) -> torch.Tensor:
            taken[name] += 1
            clock[0] += seconds * (x.shape[0] if name == "codes" else 1)
            return x

        return run

    def found(dtype: torch.dtype = torch.float32) -> int:
        crossing.rows_of.cache_clear()
        return crossing.rows_of("mxint4@32", dtype, way("codes", 0.001), way("decoded", 0.006))

    assert found() == 4 and taken["codes"] == 20
    assert found() == 4 and taken["codes"] == 20, "it was measured again"
    (kept,) = (tmp_path / "kernels").glob("rows-*.json")
    assert json.loads(kept.read_text())["rows"] == 4
    kept.write_text('{"rows": ')
    assert found() == 4 and taken["codes"] == 40, "a damaged file is measured anew"
    assert found(torch.bfloat16) == 4 and len(list((tmp_path / "kernels").glob("rows-*.json"))) == 2
    monkeypatch.setenv(crossing.VARIABLE, "3")
    assert found() == 3
    monkeypatch.setenv(crossing.VARIABLE, "few")
    with pytest.raises(crossing.BadRows, match="MXFX_CPU_ROWS is 'few'; expected a number of rows"):
        found()
    crossing.rows_of.cache_clear()


@pytest.mark.parametrize("rows", [0, 2])
def test_more_rows_than_this_cpu_is_faster_with_meet_the_decoded_weight(rows: int, monkeypatch) -> None:
    from mxfx.ops.kernels import crossing

    monkeypatch.setenv(crossing.VARIABLE, str(rows))
    crossing.rows_of.cache_clear()
    fmt = parse("mxint4@32")
    codes, scales = store(fmt.fake_quantize(random(24, 64)), fmt)  # type: ignore[misc]
    for batch in (1, 2, 3):
        with recorded() as calls:
            y = torch.ops.mxfx_kernels.mx_linear(
                fmt.fake_quantize(random(batch, 1, 64, seed=1)), codes, scales, None, "mxint4@32"
            )
        assert len(calls) == int(batch <= rows) and y.shape == (batch, 1, 24)
    crossing.rows_of.cache_clear()


def test_without_a_compiler_the_definitions_run_and_the_reason_is_said(tmp_path: Path) -> None:
    program = "from mxfx.ops.kernels.build import library; print(library())"
    for given, said in (
        ({"PATH": str(tmp_path / "none")}, "no C compiler is installed here"),
        ({"MXFX_CPU_KERNELS": "0"}, "turns the C kernels off"),
        ({"CC": _failing(tmp_path), "MXFX_CACHE": str(tmp_path)}, "does not build the C kernels: it is Sunday"),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | given, capture_output=True, text=True, check=True
        )
        assert said in ran.stdout


def test_a_cache_that_cannot_be_written_to_leaves_the_kernels_to_the_process_and_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    program = "from mxfx.ops.kernels.build import library; print(library())"
    environment = os.environ | {"MXFX_CACHE": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("<CDLL") and ran.stderr.count("cannot be written to") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_damaged_library_in_the_cache_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFX_CACHE", str(tmp_path))
    source = "\n".join((Path(build.__file__).parent / name).read_text(encoding="utf-8") for name in build._SOURCES)
    quick = "cc", ("-std=gnu11", "-O0", "-fPIC"), source
    build._built(*quick)
    (kept,) = tmp_path.glob("kernels/*.so")
    kept.unlink()
    kept.write_bytes(b"")
    build._built(*quick)
    assert kept.stat().st_size


def test_formats_stay_where_c_was_told_they_are() -> None:
    given = ("mxint4@32", torch.float32)
    place = structs.rule_of(*given)
    for block in range(1, 300):
        structs.rule_of(f"mxint5@{block}", torch.float32)
        assert structs.rule_of(*given) == place
    assert ctypes.addressof(structs._rule(*given)) == place


def _failing(folder: Path) -> str:
    script = folder / "cc"
    script.write_text("#!/bin/sh\necho it is Sunday >&2\nexit 1\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 13])
@pytest.mark.parametrize("width", [64, 100])
def test_a_plain_linear_of_few_rows_is_that_of_float64_rounded_once(rows: int, width: int) -> None:
    from mxfx.ops.kernels import few_rows

    x, weight, bias = (
        random(*shape, seed=i).bfloat16() for i, shape in enumerate(((rows, 1, width), (37, width), (37,)))
    )
    found = few_rows.linear(x, weight, bias)
    if found is NotImplemented:
        pytest.skip("this CPU has no products of bfloat16")
    wanted = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-4)
    plain = few_rows.linear(x, weight)
    assert not torch.equal(plain, found)


def test_a_plain_linear_leaves_whole_prompts_and_float32_to_the_library() -> None:
    from mxfx.ops.kernels import few_rows

    weight = random(8, 64)
    assert few_rows.linear(random(2, 1, 64), weight) is NotImplemented
    assert few_rows.linear(random(2, 5, 64).bfloat16(), weight.bfloat16()) is NotImplemented
    assert few_rows.linear(random(17, 1, 64).bfloat16(), weight.bfloat16()) is NotImplemented


def test_who_asks_while_the_kernels_are_built_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def built(*_: object) -> str:
        time.sleep(0.05)
        made.append("kernels")
        return made[-1]

    monkeypatch.setattr(build, "_built", built)
    for cached in (build.library, build._library):
        cached.cache_clear()
    try:
        thread = build.build_ahead()
        assert build.library() == "kernels"
        thread.join()
        assert made == ["kernels"]
    finally:
        for cached in (build.library, build._library):
            cached.cache_clear()


def test_calls_of_other_threads_are_not_written_down() -> None:
    """A step that was recorded makes its calls again: those of another model's would write where its results were."""
    from mxfx.ops.kernels import cpu

    x = random(4, 64)
    with recorded() as calls:
        cpu.fake_quantize(x, "mxint4@32")
        other = threading.Thread(target=cpu.fake_quantize, args=(x, "mxint8@32"))
        other.start()
        other.join()
    assert len(calls) == 1
