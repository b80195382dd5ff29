"""The dialect's selectors -> rules of ``annotate``.

A selector is a quoted regular expression with a table. Which module it means shows in its keys: tables for
the stages of attention; ``minifloat`` for norms; a bare exponent and fraction width for the MLP's activation;
weights and inputs for linears and embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mxfx.compat.buckets import has_buckets, read_buckets
from mxfx.compat.table import Table
from mxfx.compat.widths import Written, read_format
from mxfx.config import options
from mxfx.rewrite import Selector

#: Stage of the attention table -> key of an annotate rule, and the family that the stage is quantized in.
_STAGES = {"qk_matmul": "q", "av_matmul": "probs", "kv_cache": "kv", "softmax": "softmax", "rope": "rope"}
_MINIFLOAT_STAGES = ("softmax", "rope")
_FAMILY = {
    "mxint": "mxint",
    "mxfp": "mxfp",
    "minifloat": "minifloat",
    "mxint_rotate": "mxint",
    "mxfp_rotate": "mxfp",
}
#: Quantizers of Mase that are no MX formats.
_LEGACY = (
    *("integer", "fixed", "log", "block_fp", "block_minifloat", "block_log", "minifloat_ieee"),
    *("minifloat_denorm", "binary", "binary_residual", "ternary", "lutnet", "logicnets", "mxint_hardware"),
    *("lsqinteger", "flexround"),
)

_REFUSED = {
    "online_rotate": "no version of Mase reads it; write name = 'mxint_rotate' or a [rotation_search] table",
}
#: Stages that a rotation can stand at -> site of ``online-rotation``.
_ROTATED = {"kv_cache": "kv_cache", "qk_matmul": "qk_matmul"}
#: A rounding error of the rotated row spreads over all its positions on the way back, those that are hidden included.
WHY_NOT_PROBS = "rounded in a rotated basis, probabilities reach tokens that come later, and the model reads ahead"
#: A module of the dialect's families that is a whole decoder layer, and one that is an MLP.
_LAYER, _MLP = "model.layers.0", "model.layers.0.mlp"


@dataclass
class Chosen:
    """What one selector asks for.

    ``kind`` is attention, norm, activation, linear or nothing (bypassed); ``formats`` are keys of an annotate
    rule; ``rotated`` names what is rotated online: ``linear``, or stages of attention.
    """

    table: Table
    pattern: str
    kind: str
    family: str = ""
    formats: dict[str, Written] = field(default_factory=dict)
    gptq: bool = False
    rotated: tuple[str, ...] = ()
    phase: str = ""
    """The phase that it speaks of, ``""`` for both."""
    handoff: str = ""
    """Of an attention with buckets: what ``mxfx.config.phases`` calls its handoff."""


def read_selector(key: str, table: Table, by: str) -> list[Chosen]:
    """Read one selector's table: what it asks for, and then what a table ``qk_norm`` in it asks for.

    Raises ``ConfigError`` for what is not understood or not supported.
    """
    pattern = key if by == "regex_name" else re.escape(key)
    options.read(Selector, pattern, table.at)
    table.refuse(_REFUSED)
    if not has_buckets(table):
        return _read_flat(table, pattern)
    buckets, handoff = read_buckets(table, (*_STAGES, "qk_norm"))
    found = []
    for phase, bucket in buckets.items():
        for one in _read_flat(bucket, pattern):
            one.phase, one.handoff = phase, handoff
            found.append(one)
    return found


def _read_flat(table: Table, pattern: str) -> list[Chosen]:
    if table.take("bypass", bool, False):
        return [Chosen(table, pattern, "nothing")]
    name = _name(table)
    kind = _kind(table, _FAMILY[name], pattern)
    rotated = ("linear",) if name.endswith("_rotate") else ()
    chosen = Chosen(table, pattern, kind, _FAMILY[name], rotated=rotated)
    norms = _read_qk_norm(chosen) if kind == "attention" else []
    _READERS[kind](chosen)
    table.close()
    return [chosen, *norms]


def _name(table: Table) -> str:
    name = table.need("name", str)
    if name in _LEGACY:
        table.fail(
            "name",
            f"{name!r} is a quantizer of Mase that is no MX format; mxfx has MX formats only",
            _names(),
        )
    if name not in _FAMILY:
        raise (table.at / "name").error(
            f"unknown quantizer {name!r}", _names(), options.did_you_mean(name, [*_FAMILY, *_LEGACY])
        )
    return name


def _names() -> str:
    return f"one of {options.listed(_FAMILY)}"


def _kind(table: Table, family: str, pattern: str) -> str:
    if any(stage in table for stage in (*_STAGES, "qk_norm")):
        return "attention"
    if family == "minifloat":
        if re.fullmatch(pattern, _LAYER):
            table.fail(
                "name", "rounding the residual stream of a decoder layer is not supported", "norms, MLPs, attention"
            )
        return "activation" if re.fullmatch(pattern, _MLP) else "norm"
    has_floats = "data_in_exponent_width" in table and "data_in_frac_width" in table
    has_more = "data_in_block_size" in table or any(key.startswith("weight_") for key in table.raw)
    return "activation" if has_floats and not has_more else "linear"


def _read_linear(chosen: Chosen) -> None:
    table = chosen.table
    chosen.gptq = table.take("gptq", bool, False)
    search = table.take("clip_search", bool, False)
    _check_fp32_hadamard(table)
    for operand, key in (("weight", "weight"), ("data_in", "input"), ("bias", "bias")):
        written = read_format(table, operand, chosen.family, search=search and operand == "weight")
        if written is not None:
            chosen.formats[key] = written
    if search and "weight" not in chosen.formats and not table.left:
        table.fail("clip_search", "clip_search chooses the scales of a weight, and no weight format is given")
    if "weight" in table.left:
        chosen.gptq = False
    if "data_in" in table.left:
        chosen.rotated = ()
    if chosen.rotated and "input" not in chosen.formats:
        table.fail("name", "an online rotation changes nothing unless the input is quantized", "data_in_… keys")
    if not chosen.formats and table.left:
        chosen.kind = "nothing"
    elif not chosen.formats and not chosen.gptq:
        known = "weight_…, data_in_…, bias_… keys, gptq = true, or bypass = true"
        table.close(("name",))
        raise table.at.error(f"{table.what} sets no format", known)


def _read_norm(chosen: Chosen) -> None:
    table = chosen.table
    for operand, key in (("weight", "weight"), ("data_in", "input")):
        written = read_format(table, operand, "minifloat")
        if written is not None and not table.take(f"{operand}_bypass", bool, False):
            chosen.formats[key] = written
    if not chosen.formats:
        chosen.kind = "nothing"


def _read_activation(chosen: Chosen) -> None:
    """The table of an MLP quantizes what goes into its SiLU; the activation is the child ``act_fn``."""
    written = read_format(chosen.table, "data_in", "minifloat")
    if written is None:
        chosen.kind = "nothing"
        return
    chosen.formats["input"] = written
    chosen.pattern = rf"(?:{chosen.pattern.removesuffix('$')})\.act_fn"


def _read_qk_norm(chosen: Chosen) -> list[Chosen]:
    """The norms of queries and keys are children of the attention module."""
    inner = chosen.table.table("qk_norm")
    if inner is None or inner.take("bypass", bool, False):
        return []
    pattern = rf"(?:{chosen.pattern.removesuffix('$')})\.[qk]_norm"
    norms = Chosen(inner, pattern, "norm", "minifloat")
    _read_norm(norms)
    inner.close(("name",))
    return [norms]


def _read_attention(chosen: Chosen) -> None:
    table = chosen.table
    turning, chosen.rotated = bool(chosen.rotated), ()
    for operand in ("data_in", "weight"):
        # Mase reads neither here; 16 bits, as one of its files has them, is what happens anyway.
        if read_format(table, operand, chosen.family) is not None:
            table.fail(
                f"{operand}_{'width' if chosen.family == 'mxint' else 'exponent_width'}",
                f"{table.what} is an attention, which multiplies by no {operand} of its own",
                f"selectors of its projections, or the tables {options.listed(_STAGES)}",
            )
    for stage, key in _STAGES.items():
        inner = table.table(stage)
        if inner is None:
            wanted = f"a table {stage} with a format, or with bypass = true"
            raise table.at.error(f"{table.what} says nothing about {stage}", wanted)
        family = "minifloat" if stage in _MINIFLOAT_STAGES else chosen.family
        chosen.formats |= _read_stage(chosen, inner, stage, key, family, turning)


def _read_stage(chosen: Chosen, inner: Table, stage: str, key: str, family: str, turning: bool) -> dict[str, Written]:
    bypassed = inner.take("bypass", bool, False)
    rotate = inner.take("rotate", bool, turning and family != "minifloat" and not bypassed)
    _check_fp32_hadamard(inner)
    if stage == "kv_cache" and ("key" in inner or "value" in inner):
        formats = _read_split_cache(inner, family)
    else:
        written = read_format(inner, "data_in", family)
        formats = {key: written} if written else {}
    inner.close()
    if bypassed or (inner.left and not formats):
        return {}
    if not formats:
        raise inner.at.error(f"{inner.what} gives no format", "data_in_… keys, or bypass = true")
    if rotate and not turning:
        inner.fail("rotate", f"{stage} can only rotate where name is 'mxint_rotate' or 'mxfp_rotate'")
    if rotate and stage not in _ROTATED:
        # Mase too leaves it out, with a warning, at every length of which it has no Hadamard matrix.
        chosen.table.warn(stage, f"{stage} is quantized without a rotation: {WHY_NOT_PROBS}")
    elif rotate:
        chosen.rotated += (_ROTATED[stage],)
    return formats


def _read_split_cache(inner: Table, family: str) -> dict[str, Written]:
    formats = {}
    for name, key in (("key", "k"), ("value", "v")):
        half = inner.table(name)
        if half is None or half.take("bypass", bool, False):
            continue
        written = read_format(half, "data_in", family)
        if written is not None:
            formats[key] = written
        inner.left |= half.left
        half.close()
    return formats


def _check_fp32_hadamard(table: Table) -> None:
    table.require("force_fp32_had", bool, True, "Hadamard transforms of mxfx compute in float32 or better")


_READERS = {
    "linear": _read_linear,
    "norm": _read_norm,
    "activation": _read_activation,
    "attention": _read_attention,
}


def shadowed(chosen: Sequence[Chosen], index: int) -> str:
    """The pattern of a selector, without the modules that an earlier one has taken.

    In the dialect a module belongs to the first selector that matches it, in ``annotate`` each operand does.
    They differ only where an earlier selector leaves out an operand that this one sets; then its modules are
    cut out of the pattern.
    """
    this = chosen[index]
    earlier = [
        other.pattern
        for other in chosen[:index]
        if other.kind == "nothing" or (other.kind == this.kind and this.formats.keys() - other.formats.keys())
    ]
    cuts = "".join(rf"(?!(?:{pattern})\Z)" for pattern in earlier)
    return f"{cuts}(?:{this.pattern})" if cuts and "|" in this.pattern else cuts + this.pattern
