"""``mxfx::cached_attention``: attention over an explicit cache of keys and values, plain or packed.

A cache is a tensor ``(batch, kv_heads, room, …)``; place ``s`` of ``room`` holds the token of slot ``s``. Slots count
the columns of the attention mask: all rows of a batch fill the same slots, padding included. Under a window the cache
may be a ring: with ``room`` places, slot ``s`` lies at place ``s % room``, and ``room`` is no less than the window, or
than the number of slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mxfx.formats import Format
from mxfx.formats.known import known_true
from mxfx.formats.stored import restore, store_on_grid
from mxfx.ops.attention import _CONTRACTS, _OPERANDS, _attended, attend, attention_bias
from mxfx.ops.catalogue import describe, plain
from mxfx.ops.dialect import define
from mxfx.ops.kernels.library import load_cpu
from mxfx.ops.kernels.limits import DTYPES, has_triton
from mxfx.ops.quantize import _format, is_first


def write_cache(cache: Tensor, scales: Tensor | None, x: Tensor, slots: Tensor, fmt: Format | None) -> None:
    """Put rows ``(batch, kv_heads, seq, width)`` at their places; of more rows than places only the last stay."""
    room = cache.shape[2]
    if x.shape[2] > room:
        x, slots = x[:, :, -room:], slots[-room:]
    places = slots % room
    if scales is None:
        cache.index_copy_(2, places, x)
        return
    assert fmt is not None
    codes, exponents = store_on_grid(x, fmt)
    cache.index_copy_(2, places, codes)
    scales.index_copy_(2, places, exponents)


def read_cache(cache: Tensor, scales: Tensor | None, like: Tensor, fmt: Format | None) -> Tensor:
    """All places of a cache as ``(batch, kv_heads, room, width)`` in the width and dtype of ``like``."""
    if scales is None:
        return cache
    assert fmt is not None
    return restore(cache, scales, fmt, like.shape[-1], like.dtype)


def write_first(kept: Tensor, x: Tensor, slots: Tensor, starts: Tensor) -> None:
    """Put those of ``x`` that are the first tokens of their text into ``kept``, ``(batch, kv_heads, first, width)``."""
    of = starts[:, None] + torch.arange(kept.shape[2], device=x.device) - slots[0]
    new = (of >= 0) & (of < x.shape[2])
    rows = of.clamp(0, x.shape[2] - 1)[:, None, :, None].expand_as(kept)
    kept.copy_(torch.where(new[:, None, :, None], x.gather(2, rows), kept))


def with_first(x: Tensor, kept: Tensor, held: Tensor, starts: Tensor) -> Tensor:
    """All places of a cache, which hold the slots ``held``, the first tokens of each text as they are in ``kept``."""
    place = held[None, :] - starts[:, None]
    first = is_first(held, starts, kept.shape[2])
    rows = place.clamp(0, kept.shape[2] - 1)[:, None, :, None].expand_as(x)
    return torch.where(first[:, None, :, None], kept.gather(2, rows), x)


def slots_held(slots: Tensor, room: int) -> Tensor:
    """The slot that each place of a ring holds, int64 ``(room,)``, negative where none yet.

    One token is written before the ring is read; of several, the ring is read as it was before the first.
    """
    newest = slots[-1] if slots.shape[0] == 1 else slots[0] - 1
    return newest - (newest - torch.arange(room, device=slots.device)) % room


def cache_bias(
    mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    slots: Tensor | None,
    keys: Tensor | None,
    causal: bool,
    window: int | None,
    chunk: int | None,
) -> Tensor | None:
    """Boolean mask ``(batch | 1, 1, seq, places)``, True where a query may attend; see ``cached_attend``.

    None where nothing is hidden, or only by causality. Without a cache it is ``attention_bias``. ``mask`` is
    ``(batch, slots)``, nonzero where a token is real; a query that may attend to nothing attends to itself. A ready
    mask, ``(batch | 1, heads | 1, seq, slots)``, is all that is hidden.
    """
    if mask is not None and mask.dim() == 4:
        return mask
    if keys is None or slots is None:
        return attention_bias(mask, q, k, causal, window, chunk)
    room, one = keys.shape[2], known_true(q.shape[-2] == 1)
    if window is None and chunk is None:
        if known_true(q.shape[-2] == room):
            return attention_bias(mask, q, k, causal, None)
        if mask is None and one:
            return None
        held = torch.arange(room, device=q.device)
    else:
        held = slots_held(slots, room)
        held = held if one else torch.cat((held, slots))
    distance = slots[:, None] - held[None, :]
    allowed = (distance >= 0) & (held >= 0)[None, :]
    if window is not None:
        allowed = allowed & (distance < window)
    allowed = allowed[None, None]
    if chunk is not None:
        # Chunks are counted from the first real token of a row.
        start = 0 if mask is None else (mask.ne(0).cumsum(-1) == 0).sum(-1, keepdim=True)
        mine, theirs = ((places[None] - start) // chunk for places in (slots, held))
        allowed = allowed & (mine[:, :, None] == theirs[:, None, :])[:, None]
    if mask is not None:
        real = mask.ne(0).index_select(1, held.clamp_min(0))
        allowed = allowed & real[:, None, None, :] | (distance == 0)[None, None]
    return allowed


def cached_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    slots: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    key_format: str | None,
    value_format: str | None,
    writes: bool,
    first_keys: Tensor | None = None,
    first_values: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Write ``k`` and ``v`` to their places, then attend; ``allowed`` is what ``cache_bias`` gives.

    See ``cached_attention`` for the operands.
    """
    if keys is None or values is None or slots is None:
        return attend(q, k, v, allowed, scale, causal, softcap, sinks, bias)
    formats = [None if text is None else _format(text) for text in (key_format, value_format)]
    tensors = (keys, values, key_scales, value_scales)
    caches = ((keys, key_scales, k, formats[0]), (values, value_scales, v, formats[1]))
    firsts = (first_keys, first_values)
    one, limited = known_true(q.shape[2] == 1), window is not None or chunk is not None
    if bias is not None and limited:
        held = slots_held(slots, keys.shape[2])
        bias = bias.index_select(-1, (held if one else torch.cat((held, slots))).clamp_min(0))
    plain = _why_not_plain(bias, allowed, sinks) is None
    kept = starts is not None and (first_keys is not None or first_values is not None)
    if one and plain and not kept and q.is_cpu and load_cpu() is None:
        from mxfx.ops.kernels.cpu import attend_token

        texts = (key_format, value_format)
        out = attend_token(q, k, v, tensors, allowed, slots, scale, texts, softcap, sinks, writes)
        if out is not NotImplemented:
            return out
    # Several tokens may push out of a ring what the first of them still sees: it is read first.

    def read() -> list[Tensor]:
        found = [read_cache(c, s, x, f) for c, s, x, f in caches]
        if starts is None:
            return found
        held = slots_held(slots, keys.shape[2]) if limited else torch.arange(keys.shape[2], device=q.device)
        return [x if f is None else with_first(x, f, held, starts) for x, f in zip(found, firsts, strict=True)]

    before = [x.clone() for x in read()] if limited and not one else []
    kernels = None if kept else _kernels(q, k, v, *formats)
    if writes and starts is not None:
        for first, x in zip(firsts, (k, v), strict=True):
            if first is not None:
                write_first(first, x, slots, starts)
    if writes and kernels is not None and k.shape[2] <= keys.shape[2]:
        write_tokens, _ = kernels
        write_tokens(tensors, k, v, slots, *formats)
    elif writes:
        for cache, scales, x, fmt in caches:
            write_cache(cache, scales, x, slots, fmt)
    if before:
        k, v = (torch.cat((old, x), dim=2) for old, x in zip(before, (k, v), strict=True))
        return attend(q, k, v, allowed, scale, False, softcap, sinks, bias)
    if known_true(q.shape[2] == keys.shape[2]) and not limited:
        return attend(q, k, v, allowed, scale, causal, softcap, sinks, bias)
    if one and kernels is not None and plain:
        _, attend_token = kernels
        return attend_token(q, tensors, allowed, slots, scale, v.shape[-1], *formats, softcap, sinks)
    k, v = read()
    if not one or sinks is not None or not plain:
        return attend(q, k, v, allowed, scale, False, softcap, sinks, bias)
    # The query heads of a group are rows that meet the same keys.
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    return attend(grouped, k, v, allowed, scale, False, softcap).reshape(*q.shape[:-1], v.shape[-1])


def _kernels(
    q: Tensor, k: Tensor, v: Tensor, key_format: Format | None, value_format: Format | None
) -> tuple[Callable[..., None], Callable[..., Tensor]] | None:
    """The kernels that write tokens and attend, where they take such ones; None where the definition runs."""
    if not q.is_cuda or _why_not_triton(q, k, v, key_format, value_format) is not None:
        return None
    # Importable only where `triton` is.
    from mxfx.ops.kernels.cache_rows_triton import write_tokens
    from mxfx.ops.kernels.cache_triton import attend_token

    return write_tokens, attend_token


def _why_not_triton(
    q: Tensor, k: Tensor, v: Tensor, key_format: Format | None, value_format: Format | None
) -> str | None:
    if not has_triton():
        return "triton is not installed"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"attends in {q.dtype}, with keys in {k.dtype} and values in {v.dtype}"
    from mxfx.ops.kernels.cache_rows_triton import takes

    found = ((name, x.shape[-1], fmt) for name, x, fmt in (("keys", k, key_format), ("values", v, value_format)))
    refused = (f"{name} of {width} channels in {fmt or q.dtype}" for name, width, fmt in found if not takes(width, fmt))
    return next(refused, None)


def _why_not_plain(bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None) -> str | None:
    """Kernels take one mask for all heads, one sink a head, and add nothing to scores."""
    if bias is not None or (mask is not None and mask.dim() == 4 and not known_true(mask.shape[1] == 1)):
        return "scores get a bias, or heads masks of their own"
    return None if sinks is None or sinks.dim() == 1 else "each query has a sink of its own"


def why_defined(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    key_format: str | None,
    value_format: str | None,
    keeps_first: bool,
    device: torch.device,
) -> str | None:
    """Why a step of decoding over a cache is computed by the definition on a device; None where a kernel does it."""
    if keeps_first:
        return "first tokens are kept as they are beside the codes of the others, and no kernel reads both"
    if reason := _why_not_plain(bias, mask, sinks):
        return reason
    if device.type == "cuda":
        return _why_not_triton(
            q, k, v, *(None if text is None else _format(text) for text in (key_format, value_format))
        )
    if device.type != "cpu":
        return f"no kernel for {device.type}"
    if (missing := load_cpu()) is not None:
        return missing
    from mxfx.ops.kernels.structs import why_not_cached

    return why_not_cached(q.dtype, k.dtype, key_format) or why_not_cached(q.dtype, v.dtype, value_format)


#: Operands that ``cached_attend`` and ``mxfx::cached_attention`` write.
CACHES = ("keys", "values", "key_scales", "value_scales", "first_keys", "first_values")
cached_attend.mutates = CACHES


def _shape(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return _attended(q, k, v, None, 1.0)


describe(cached_attend, "attend", operands=(plain("q"), plain("k"), plain("v")), shape=_shape)


@define("cached_attention", operands=_OPERANDS, contracts=_CONTRACTS, fake=_shape, mutates=CACHES)
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slots: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    key_format: str | None = None,
    value_format: str | None = None,
    writes: bool = True,
    first_keys: Tensor | None = None,
    first_values: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """``attention`` of new tokens to all that a cache holds; it writes ``k`` and ``v`` there first.

    ``q`` is ``(batch, heads, seq, width)``; ``k`` and ``v`` are ``(batch, kv_heads, seq, width)`` of the same tokens,
    which take ``slots``, int64 ``(seq,)``, consecutive. ``keys`` and ``values`` are ``(batch, kv_heads, room, width)``;
    with a format, bytes of codes beside E8M0 ``scales``, as ``store`` gives (k and v lie on that grid). ``mask`` is
    ``(batch, slots)``, or ready, ``(batch | 1, heads | 1, seq, slots)``; ``bias`` is over slots too, with one row or
    ``seq``. ``writes=False`` reads what another layer wrote. With several tokens and no window, ``room``
    ends with the last of ``slots``, or ``mask`` hides what is behind it. Without a cache it is ``attention``, where the
    other operands are explained. ``first_keys`` and ``first_values``, ``(batch, kv_heads, first, width)``, hold the
    first tokens of each text, which begins at slot ``starts`` ``(batch,)``, as they are: codes do not.
    """
    allowed = cache_bias(mask, q, k, slots, keys, causal, window, chunk)
    return cached_attend(
        q, k, v, allowed, slots, keys, values, key_scales, value_scales,
        scale, causal, window, chunk, softcap, sinks, bias, key_format, value_format, writes,
        first_keys, first_values, starts,
    )  # fmt: skip
