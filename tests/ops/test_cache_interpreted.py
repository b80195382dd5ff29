"""Decode kernels in Triton's interpreter: what is stored has the bits of the definition, what is read is attention."""

from __future__ import annotations

import pytest

from tests.interpreter import IN_INTERPRETER, lines_at_once, numpy_scalars, passes_in_interpreter  # noqa: F401

if not IN_INTERPRETER:

    @pytest.mark.triton
    def test_all_of_this_file_passes_in_the_interpreter():
        passes_in_interpreter(__file__)

else:
    import torch
    from torch import Tensor

    from mxfx.formats import parse
    from mxfx.formats.stored import codes_length, restore, scales_length
    from mxfx.ops.attention import attend
    from mxfx.ops.cache import write_cache
    from mxfx.ops.kernels import cache_triton
    from mxfx.ops.kernels.cache_rows_triton import takes, write_tokens
    from mxfx.ops.kernels.cache_triton import attend_token

    BF16 = torch.bfloat16
    FORMATS = ("mxint4@32/mse", "mxint8@16", "mxfp4_e2m1@16/ceil", "mxfp8_e4m3@32", "mxfp8_e5m2@32", None)

    def _grid(text: str | None, *shape: int, seed: int = 0) -> Tensor:
        """Rows on a format's grid, over many binades, one of them zero, one with −8 codes."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(*shape, generator=generator) * torch.exp2(torch.randn(*shape[:-1], 1, generator=generator) * 3)
        x[0, 0, 0], x[0, -1, 0, :3] = 0.0, torch.tensor([-7.9, 3.0, -1.0])
        return x if text is None else parse(text).fake_quantize(x)

    def _empty(text: str | None, room: int, width: int) -> tuple[Tensor, Tensor | None]:
        if text is None:
            return torch.zeros(2, 2, room, width), None
        fmt = parse(text)
        sizes = (codes_length(width, fmt), scales_length(width, fmt))
        codes, scales = (torch.zeros(2, 2, room, size, dtype=torch.uint8) for size in sizes)
        return codes, scales

    def _filled(text: str | None, room: int, width: int, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
        cache, scales = _empty(text, room, width)
        rows = _grid(text, 2, 2, count, width, seed=seed)
        write_cache(cache, scales, rows, torch.arange(count), None if text is None else parse(text))
        return cache, scales

    @pytest.mark.parametrize("value", FORMATS)
    @pytest.mark.parametrize("slots", [[8], [3, 4, 5]])
    def test_tokens_are_stored_as_the_definition_stores_them(value, slots):
        key = "mxint4@32/mse"
        fmts = [parse(key), None if value is None else parse(value)]
        slots = torch.tensor(slots)
        k, v = _grid(key, 2, 2, len(slots), 64), _grid(value, 2, 2, len(slots), 96, seed=1)
        got, wanted = ([*_empty(key, 5, 64), *_empty(value, 5, 96)] for _ in range(2))
        write_tokens((got[0], got[2], got[1], got[3]), k, v, slots, *fmts)
        write_cache(wanted[0], wanted[1], k, slots, fmts[0])
        write_cache(wanted[2], wanted[3], v, slots, fmts[1])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert wanted[0].any(-1).sum() > 0

    # A device's products take at least 16 channels; the interpreter would take fewer.
    @pytest.mark.parametrize(("width", "text"), [(8, None), (12, None), (16, "mxint8@16"), (32, "mxint4@16")])
    def test_narrow_heads_are_as_wide_as_a_product_takes(width, text):
        fmt = None if text is None else parse(text)
        keys, key_scales = _filled(text, 20, width, 20, 2)
        values, value_scales = _filled(text, 20, width, 20, 3)
        q = torch.randn(2, 4, 1, width, generator=torch.Generator().manual_seed(4))
        assert takes(width, fmt)
        got = attend_token(q, (keys, values, key_scales, value_scales), None, torch.tensor([19]), 0.3, width, fmt, fmt)
        k, v = keys, values
        if key_scales is not None and value_scales is not None and fmt is not None:
            k, v = (restore(c, s, fmt, width, torch.float32) for c, s in ((keys, key_scales), (values, value_scales)))
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert not takes(16, parse("mxint4@16"))

    @pytest.mark.parametrize(("masked", "warps"), [(False, 1), (True, 2)])
    @pytest.mark.parametrize(("key", "value"), [(f, f) for f in FORMATS] + [("mxint4@32/mse", None)])
    def test_attention_over_the_cache_is_that_of_the_definition(key, value, masked, warps, monkeypatch):
        monkeypatch.setattr(cache_triton, "TILE_BYTES", 0)
        monkeypatch.setattr(cache_triton, "WARPS", {True: warps, False: warps})
        monkeypatch.setattr(cache_triton, "TOGETHER", {True: 8, False: 8})
        room, width, v_width, count = 70, 64, 96, 49
        fmts = [None if text is None else parse(text) for text in (key, value)]
        keys, key_scales = _filled(key, room, width, count, 2)
        values, value_scales = _filled(value, room, v_width, count, 3)
        q = torch.randn(2, 6, 1, width, generator=torch.Generator().manual_seed(4)) * 0.2
        slots = torch.tensor([count - 1])
        seen = torch.arange(room) < count
        bias = seen.expand(2, 1, 1, room).clone()
        bias[1, ..., :20] = False
        bias = torch.stack((bias, ~bias), -1)[..., 0]
        caches = (keys, values, key_scales, value_scales)
        got = attend_token(q, caches, bias if masked else None, slots, 0.3, v_width, *fmts)
        read = [
            c if f is None else restore(c, s, f, w, torch.float32)
            for c, s, f, w in ((keys, key_scales, fmts[0], width), (values, value_scales, fmts[1], v_width))
        ]
        mask = bias if masked else seen.expand(1, 1, 1, room)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, *read, attn_mask=mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("width", [64, 128])
    def test_codes_are_read_four_at_a_time(width, monkeypatch):
        """As on a GPU in bfloat16, which the interpreter cannot multiply."""
        read_of = cache_triton.read_of
        monkeypatch.setattr(
            cache_triton, "read_of", lambda width, fmt, lanes, _, *tile: read_of(width, fmt, lanes, BF16, *tile)
        )
        fmt = parse("mxint4@32/mse")
        (keys, ks), (values, vs) = (_filled(str(fmt), 70, width, 70, seed) for seed in (2, 3))
        q = torch.randn(2, 6, 1, width, generator=torch.Generator().manual_seed(4)) * 0.2
        got = attend_token(q, (keys, values, ks, vs), None, torch.tensor([69]), 0.3, width, fmt, fmt)
        k, v = (restore(c, s, fmt, width, torch.float32) for c, s in ((keys, ks), (values, vs)))
        torch.testing.assert_close(got, attend(q, k, v, None, 0.3, False), rtol=1e-5, atol=1e-5)

    def test_soft_caps_and_sinks_are_those_of_attention(monkeypatch):
        monkeypatch.setattr(cache_triton, "TOGETHER", {True: 12, False: 12})
        keys, values = (_filled(None, 49, 32, 49, seed)[0] for seed in (2, 3))
        q, sinks = torch.randn(2, 6, 1, 32), torch.randn(6, 2)[:, 0]
        got = attend_token(q, (keys, values, None, None), None, torch.tensor([48]), 0.3, 32, None, None, 5.0, sinks)
        wanted = attend(q, keys, values, None, 0.3, False, 5.0, sinks)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

    def test_what_the_kernels_take():
        assert takes(64, parse("mxint4@32")) and takes(80, None)
        assert not takes(80, parse("mxint4@32")) and not takes(64, parse("mxfp6_e3m2@32"))
        assert not takes(64, parse("mxint4@8"))

    def test_one_stretch_is_whole_by_itself(monkeypatch):
        """No second kernel; sinks too."""
        monkeypatch.setattr(cache_triton, "TOGETHER", {True: 1, False: 1})
        monkeypatch.setattr(cache_triton, "_join_kernel", None)
        keys, values = (_filled(None, 49, 32, 49, seed)[0] for seed in (2, 3))
        q, sinks = torch.randn(2, 6, 1, 32), torch.randn(6)
        for given in (None, sinks):
            got = attend_token(
                q, (keys, values, None, None), None, torch.tensor([48]), 0.3, 32, None, None, None, given
            )
            wanted = attend(q, keys, values, None, 0.3, False, None, given)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
