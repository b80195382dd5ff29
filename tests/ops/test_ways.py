"""What is said of a product's way is what the kernels choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mxfx.formats import parse
from mxfx.formats.stored import store
from mxfx.ops.kernels import ways
from mxfx.ops.kernels.paths import Path, plan
from mxfx.ops.kernels.ways import Product, said, ways_on_cpu, ways_on_cuda

_BF16 = torch.bfloat16
_ROWS = (1, 2, 3, 8, 9, 16, 17, 40)
#: A function of `packed_cuda`, and the way that it is.
_CALLED = {
    "multiply_integers": ways.INTEGERS,
    "multiply_integer_tiles": ways.INTEGERS,
    "multiply_rows": ways.CODES,
    "multiply_some_rows": ways.TENSOR_CORES,
    "multiply_e4m3": ways.EXACT,
    "expand": "a GEMM in bfloat16, the weight decoded before",
}


def _at(found: list[ways.Way], rows: int) -> str:
    return next(how for last, how in found if last is None or rows <= last)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that `packed_cuda` goes, where all its kernels do nothing."""
    from mxfx.ops.kernels import packed_cuda

    found: list[str] = []

    def kernel(name: str) -> Any:
        def run(x: torch.Tensor, *others: Any) -> torch.Tensor:
            found.append(_CALLED[name])
            return torch.zeros(x.shape[0], sum(c.shape[0] for c in others[1])) if name == "multiply_e4m3" else x

        return run

    for name in _CALLED:
        monkeypatch.setattr(packed_cuda, name, kernel(name))
    monkeypatch.setattr(packed_cuda, "integers", lambda name, x, *rest, added=None: (x, x))
    return found


@pytest.mark.triton
@pytest.mark.parametrize(
    ("weight", "x", "width", "channels"),
    [
        ("mxint4@32", "mxint4@32", 64, 128),
        ("mxint4@32", "mxint4@32", 64, 64),
        ("mxint4@32", "mxint4@32", 64, 192),
        ("mxint4@16", "mxint4@16", 64, 128),
        ("mxint4@32", "mxfp4_e2m1@32", 64, 96),
        ("mxfp4_e2m1@32", "mxfp4_e2m1@32", 64, 128),
        ("mxint3@32", "mxint4@32", 64, 128),
    ],
)
def test_a_fused_product_goes_the_way_that_is_said(
    weight: str, x: str, width: int, channels: int, called: list[str]
) -> None:
    from mxfx.ops.kernels.packed_cuda import fake_quantize_linear, mx_linear

    fmt = parse(weight)
    codes, scales = store(fmt.fake_quantize(torch.randn(channels, width)), fmt)  # type: ignore[misc]
    fused = ways_on_cuda(Product(fmt, parse(x), width, channels, _BF16, "exact", True))
    alone = ways_on_cuda(Product(fmt, None, width, channels, _BF16))
    for rows in _ROWS:
        given = torch.randn(rows, width).to(_BF16)
        fake_quantize_linear([codes], [scales], [], None, weight, given, x, -1)
        mx_linear(given, codes, scales, None, weight)
        assert [_at(fused, rows), _at(alone, rows)] == called, rows
        called.clear()


@pytest.mark.triton
def test_weights_that_do_not_lie_as_kernels_read_them_are_left_to_the_definition(called: list[str]) -> None:
    """Kernels would read beyond them, or other codes."""
    from mxfx.ops.kernels.packed_cuda import fake_quantize_linear, mx_linear

    text = "mxint4@32"
    codes, scales = store(parse(text).fake_quantize(torch.randn(128, 64)), parse(text))  # type: ignore[misc]
    strided = torch.stack((codes, codes), -1)[..., 0]
    between = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:].view(codes.shape).copy_(codes)
    for rows in (1, 40):
        wide, x = torch.randn(rows, 128).to(_BF16), torch.randn(rows, 64).to(_BF16)
        for given, laid in ((wide, codes), (x, strided), (x, between)):
            assert mx_linear(given, laid, scales, None, text) is NotImplemented
            assert fake_quantize_linear([laid], [scales], [], None, text, given, text, -1) is NotImplemented
    assert not called


@pytest.mark.triton
def test_a_residual_of_another_shape_or_dtype_is_added_after(called: list[str]) -> None:
    from mxfx.ops.kernels.packed_cuda import fake_quantize_linear

    text = "mxint4@32"
    codes, scales = store(parse(text).fake_quantize(torch.randn(128, 64)), parse(text))  # type: ignore[misc]
    given = ([codes], [scales], [])
    x, row = torch.randn(40, 64).to(_BF16), torch.randn(128).to(_BF16)
    assert torch.equal(fake_quantize_linear(*given, row, text, x, text, -1), row.expand(40, 128))
    found = fake_quantize_linear(*given, row.expand(40, 128).double(), text, x, text, -1)
    assert found.dtype == torch.float64 and torch.equal(found, row.expand(40, 128).double())


def _path(rows: int, **other: Any) -> tuple[Path, str]:
    four = parse("mxint4@32")
    given = {"weight": four, "x": four, "fused": True, "rows": rows, "width": 64, "channels": 96, "dtype": _BF16}
    found = plan(**(given | {"sums": "exact", "exact_sums": True} | other))
    return found.path, found.reason


def test_a_path_follows_from_facts() -> None:
    assert [_path(rows)[0] for rows in (1, 8, 9, 16, 17)] == [
        *[Path.INTEGERS] * 2, *[Path.INTEGER_TILES] * 2, Path.EXACT
    ]  # fmt: skip
    assert [_path(rows, fused=False)[0] for rows in (2, 3, 17)] == [Path.CODES, Path.TENSOR_CORES, Path.EXACT]
    assert [_path(9, channels=channels)[0] for channels in (64, 65, 128, 129)] == [
        Path.TENSOR_CORES, Path.INTEGER_TILES, Path.INTEGER_TILES, Path.TENSOR_CORES
    ]  # fmt: skip
    assert _path(9, x=parse("mxint4@16"), weight=parse("mxint4@16"))[0] is Path.TENSOR_CORES
    assert _path(3, fused=False, dtype=torch.float32)[0] is Path.EXACT


@pytest.mark.parametrize(
    ("path", "reason", "other"),
    [
        (Path.DEFINITION, "kernels compute in up to float32, not torch.float64", {"dtype": torch.float64}),
        (Path.DEFINITION, "there is nothing to multiply", {"rows": 0}),
        (Path.DEFINITION, "no kernel decodes rows of 72 in mxint4@32", {"width": 72}),
        (Path.DEFINITION, "its weight is mxint8@32, of which E4M3", {"weight": parse("mxint8@32")}),
        (Path.DECODED, "its rows are not E4M3", {"sums": None}),
        (Path.DECODED, "FP8 does not sum mxint4@32 by mxint4@32 exactly", {"sums": "wide"}),
        (Path.DECODED, "this GPU does not sum FP8 products exactly", {"exact_sums": False}),
        (Path.DECODED, "this GPU has no FP8", {"sums": "fast", "has_e4m3": False}),
        (Path.DECODED, "an FP8 GEMM takes sizes", {"weight": parse("mxint4@8"), "width": 72}),
        (Path.DECODED, "an FP8 GEMM takes sizes", {"sums": "fast", "channels": 24}),
        (Path.EXACT, "this GPU adds", {"channels": 24}),
        (Path.FAST, "cuBLAS's sums", {"sums": "fast"}),
    ],
)
def test_a_path_of_many_rows_says_why(path: Path, reason: str, other: dict[str, Any]) -> None:
    found = _path(**({"rows": 40} | other))
    assert found[0] is path and found[1].startswith(reason)


def test_where_sums_are_not_exact_the_weight_is_decoded() -> None:
    given = (parse("mxint4@32"), parse("mxint4@32"), 64, 64, _BF16)
    last = {
        (sums, exact): ways_on_cuda(Product(*given, sums, True), exact)[-1][1]
        for sums in ("exact", "wide", "fast")
        for exact in (True, False)
    }
    wide = "a GEMM in bfloat16, the weight decoded before"
    assert last.pop(("exact", True)) == ways.EXACT
    assert {last.pop(("fast", exact)) for exact in (True, False)} == {ways.FAST}
    assert set(last.values()) == {wide}


def test_a_weight_that_is_held_as_numbers_is_one_gemm() -> None:
    for found in (ways_on_cuda, ways_on_cpu):
        assert found(Product(None, None, 64, 64, _BF16)) == [(None, "a GEMM in bfloat16")]


def test_on_a_cpu_a_step_of_few_texts_meets_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "load_cpu", lambda: "no compiler")
    four = parse("mxint4@32")
    assert len(ways_on_cpu(Product(four, four, 64, 64, _BF16))) == 1
    monkeypatch.undo()
    if ways.load_cpu() is not None:
        return
    assert [rows for rows, _ in ways_on_cpu(Product(four, four, 64, 64, _BF16))] == [16, None]
    assert len(ways_on_cpu(Product(four, None, 64, 64, _BF16))) == 1, "rows off a grid of integers"
    assert len(ways_on_cpu(Product(parse("mxint8@32"), four, 64, 64, _BF16))) == 1


def test_ways_are_told_by_rows() -> None:
    assert list(said([(1, "a"), (8, "b"), (None, "c")])) == ["1 row: a", "2 to 8 rows: b", "from 9 rows: c"]
    assert list(said([(None, "c")])) == ["c"]
