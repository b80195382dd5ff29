"""Attention and its masks at trace time, through transformers' own interfaces for both.

A mask function of transformers says of a query's and a key's index whether one sees the other. Causal masks, windows
and chunks become attributes of ``mxfx::attention``; any other function is evaluated on ``mxfx::places``, so that a mask
stays a function of places: of queries, of keys, of padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from mxfx.graph.errors import TraceError
from mxfx.graph.fake import sizes_text
from mxfx.graph.node import operands
from mxfx.graph.program import NOMINAL_MODEL, Program

aten = torch.ops.aten
_attention = torch.ops.mxfx.attention.default
_position_mask = torch.ops.mxfx.position_mask.default

#: Operands of ``mxfx::attention`` without a default.
_NEEDED = sum(not argument.has_default_value() for argument in _attention._schema.arguments)
#: Arguments of attention that change nothing here: no dropout in eval mode, no cache, one sequence a row.
_IRRELEVANT = frozenset(
    {
        *("dropout", "deterministic", "sliding_window", "position_ids", "position_embeddings", "layer_idx"),
        *("use_cache", "past_key_values", "cache_position", "logits_to_keep", "num_items_in_batch", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "target_dtype"),
        *("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    **extra: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: one ``mxfx::attention`` a layer, heads not repeated.

    Sinks come as ``s_aux``, one a head, or as ``sinks``, one a query and head.
    A window is taken from the mask and nowhere else, as transformers' own SDPA does. Raises ``TraceError`` for an
    argument that ``mxfx::attention`` does not express.
    """
    unknown = [
        name for name, value in extra.items() if name not in _IRRELEVANT and value is not None and value is not False
    ]
    if unknown:
        raise TraceError(f"{type(module).__name__} gives attention {unknown[0]!r}, which the dialect cannot express")
    if indices is not None and attention_mask is not None:
        attention_mask = _chosen(attention_mask, indices)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = attention_mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    out = torch.ops.mxfx.attention(
        query,
        key,
        value,
        attention_mask,
        float(scale),
        causal,
        None,
        None,
        None if softcap is None else float(softcap),
        s_aux if sinks is None else sinks,
        position_bias,
    )
    return out.transpose(1, 2).contiguous(), None


def _chosen(mask: Tensor, indices: Tensor) -> Tensor:
    """An additive mask that also hides keys that a query did not choose; ``indices`` is ``(batch, seq, chosen)``."""
    others = torch.ones_like(mask[:, 0], dtype=torch.bool).scatter(-1, indices.long(), False)
    return mask.masked_fill(others[:, None], torch.finfo(NOMINAL_MODEL).min)


def mask_forward(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "meta",
    **unused: object,
) -> Tensor:
    """transformers' mask interface: zero where a query may attend, else the least number; ``(batch, 1, seq, seq)``.

    Attention that goes through the interface reads the boolean mask behind it (``settle_masks``); a model with
    attention of its own adds this to its scores.
    """
    tokens = attention_mask
    if tokens is None:
        tokens = torch.zeros(batch_size, q_length, dtype=torch.int64, device=device)
    found = _describe(mask_function)
    if found is not None:
        allowed = torch.ops.mxfx.position_mask(tokens, attention_mask, found.causal, found.window, found.chunk)
    else:
        allowed = _evaluated(mask_function, tokens, attention_mask)
    return torch.where(allowed, 0.0, torch.finfo(NOMINAL_MODEL).min).to(NOMINAL_MODEL)


@contextmanager
def traced_as(name: str) -> Iterator[None]:
    """Attention and masks under a name of transformers' own are those of a trace meanwhile."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name] = attention_forward, mask_forward
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name]


@dataclass(frozen=True)
class _Shape:
    """What ``mxfx::attention`` says of a mask by attributes."""

    causal: bool = False
    window: int | None = None
    chunk: int | None = None


def _describe(function: Callable) -> _Shape | None:
    """The attributes of a mask composed of transformers' own parts by intersection; None for any other."""
    from transformers import masking_utils

    name = getattr(function, "__qualname__", "")
    if getattr(function, "__module__", "") != masking_utils.__name__:
        return None
    if function is masking_utils.causal_mask_function:
        return _Shape(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Shape()
    held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name.startswith("sliding_window_overlay."):
        return _Shape(window=int(held["sliding_window"].cell_contents))
    if name.startswith("chunked_overlay."):
        return _Shape(chunk=int(held["chunk_size"].cell_contents))
    if name.startswith("and_masks."):
        return _joined([_describe(part) for part in held["mask_functions"].cell_contents])
    return None


def _joined(parts: list[_Shape | None]) -> _Shape | None:
    if any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    windows = [p.window for p in known if p.window is not None]
    chunks = {p.chunk for p in known if p.chunk is not None}
    if len(chunks) > 1:
        return None
    return _Shape(any(p.causal for p in known), min(windows, default=None), next(iter(chunks), None))


def _evaluated(function: Callable, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask of a function of indices, each broadcast along its own axis."""
    batch, length = tokens.shape
    rows = torch.arange(batch, device=tokens.device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=tokens.device)
    queries = torch.ops.mxfx.places(tokens, "queries")[None, None, :, None]
    keys = torch.ops.mxfx.places(tokens, "keys")[None, None, None, :]
    try:
        allowed = function(rows, head, queries, keys)
    except Exception as error:
        raise TraceError(f"the attention mask is no function of places: {error}") from error
    if attention_mask is not None:
        allowed = allowed & attention_mask.ne(0)[:, None, None, :] | (queries == keys)
    return allowed.expand(batch, -1, length, length)


def settle_masks(program: Program) -> None:
    """Give each attention the mask that it was traced with, as attributes where they say it, else as one operand."""
    for node in program.nodes("attention"):
        given = operands(node)
        mask = given["mask"]
        if not isinstance(mask, fx.Node) or mask.meta["val"].dim() == 2:
            continue
        known = mask_of(mask)
        if known is not None:
            given |= known
        elif given["bias"] is None:
            given["mask"], given["bias"] = None, mask
        else:
            raise TraceError(f"{node.name} adds a mask and a bias to its scores that cannot be told apart")
        node.args = without_defaults(given)


def mask_of(mask: fx.Node) -> dict[str, object] | None:
    """The operands of ``mxfx::attention`` that say a mask of four axes; None for numbers that no such mask is behind.

    ``mask`` is boolean, True where a query may attend, or zero there and the least number elsewhere.
    """
    source = boolean_behind(mask)
    if source.target is _position_mask:
        found = operands(source)
        return {name: found[name] for name in ("mask", "causal", "window", "chunk")}
    return {"mask": source} if source.meta["val"].dtype == torch.bool else None


def without_defaults(given: dict[str, object]) -> tuple:
    """Operands of ``mxfx::attention``, in order, up to the last one that its default does not say."""
    defaults = [a.default_value for a in _attention._schema.arguments]
    used = list(given.values())
    while len(used) > _NEEDED and used[-1] is defaults[len(used) - 1]:
        used.pop()
    return tuple(used)


def boolean_behind(mask: fx.Node) -> fx.Node:
    """The boolean mask behind casts, whole slices and ``where(allowed, 0, least)``; ``mask`` itself if none is."""
    node = mask
    while True:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not isinstance(source.meta["val"], Tensor):
            return mask
        if node.target is aten.where.Scalar and node.args[1:] == (0.0, torch.finfo(NOMINAL_MODEL).min):
            return _behind_slices(source)
        kept = node.target is torch.ops.mxfx.cast.default or _is_whole_slice(node)
        if not kept:
            return mask
        node = source


def _behind_slices(node: fx.Node) -> fx.Node:
    while _is_whole_slice(node):
        node = node.args[0]
    return node


def _is_whole_slice(node: fx.Node) -> bool:
    if node.target not in (aten.slice.Tensor, aten.expand.default):
        return False
    return sizes_text(node.meta["val"]) == sizes_text(node.args[0].meta["val"])
