"""``select-logits``: only the tokens whose logits are wanted go through the last norm and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.ops import mxfx

from mxfx.formats import parse
from mxfx.formats.stored import stores
from mxfx.graph.fake import sizes_text
from mxfx.graph.node import kind, op_name
from mxfx.graph.program import KEPT
from mxfx.graph.tokenwise import mixes_tokens
from mxfx.ops.catalogue import spec
from mxfx.rewrite import Context, Exact, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import LOWERED, RAISED, Fact

#: Ops of the dialect that treat each token by itself.
_TOKENWISE = frozenset(
    {"cast", "fake_quantize", "rms_norm", "layer_norm", "hadamard", "block_transform", "linear", "mx_linear"}
)


@register
@dataclass(frozen=True)
class SelectLogits(Pass):
    """Let the tokens whose logits are wanted be chosen before the last norm and the head, by an input.

    Before::

        %y = mxfx.rms_norm(%x, @g, 1e-05)
        %z = linear(%y, @head)                           # batch × seq rows

    After::

        %kept = input(None) : i64[seq]
        %s = mxfx.select_tokens(%x, %kept)
        %y = mxfx.rms_norm(%s, @g, 1e-05)
        %z = linear(%y, @head)                           # batch × kept rows

    ``generate`` reads a long prompt for the logits of its last token (``logits_to_keep``). Without the input (None) the
    graph is what it was, to the bit. The tokens are chosen as early as nothing behind lets them see each other, no
    value is read twice and no number depends on how many there are (a scale of the whole tensor).
    """

    name: ClassVar[str] = "select-logits"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Exact()

    def run(self, rw: Rewriter, ctx: Context) -> None:
        first = next(n for n in rw.graph.nodes if n.op == "placeholder")
        (end,) = next(n for n in rw.graph.nodes if n.op == "output").all_input_nodes
        shape = first.meta["val"].shape
        chain = [end]
        while (source := _source(chain[-1], shape)) is not None:
            chain.append(source)
        if len(chain) == 1:
            rw.skip(end, f"{op_name(end)}, which gives the logits, does not treat each token by itself")
        elif any(rw.program.nodes("select_tokens")):
            rw.skip(end, "its tokens are chosen already", done=True)
        elif rw.match(chain[-2]):
            source, reader = chain[-1], chain[-2]
            kept = rw.input(KEPT, (shape[1],), torch.int64)
            chosen = rw.call(mxfx.select_tokens.default, source, kept, like=reader, val=source.meta["val"])
            reader.replace_input_with(source, chosen)
            rw.touch(reader)


def _source(node: fx.Node, shape: torch.Size) -> fx.Node | None:
    """The one operand of ``node`` that has tokens, where it treats each by itself; None where it may not."""
    if node.op != "call_function" or len(node.users) != 1 or not _tokenwise(node, shape[1]):
        return None
    sources = [operand for operand in node.all_input_nodes if operand.op != "get_attr"]
    if len(sources) != 1 or not all(_has_tokens(one, shape) for one in (node, *sources)):
        return None
    return sources[0]


def _tokenwise(node: fx.Node, length: torch.SymInt) -> bool:
    rounded = spec(node).rounds
    if rounded is not None and not (rounded.axis == -1 and stores(parse(rounded.format))):
        return False
    dialect = kind(node) in _TOKENWISE
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return (dialect or pointwise) and mixes_tokens(node, length) is None


def _has_tokens(node: fx.Node, shape: torch.Size) -> bool:
    """Whether a value is ``(batch, seq, channels)``."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or val.dim() != 3:
        return False
    return sizes_text(val)[:2] == tuple(str(size) for size in shape)
