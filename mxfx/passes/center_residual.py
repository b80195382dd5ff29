"""``center-residual``: a residual stream without a mean, so that each LayerNorm of it is an RMSNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mxfx.graph.node import kind, path_of
from mxfx.graph.regions import Stream, residual_streams
from mxfx.ops.catalogue import spec
from mxfx.rewrite import Close, Context, Numerics, Pass, Rewriter, register
from mxfx.rewrite.basis import change_output, why_shared
from mxfx.rewrite.facts import ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED, NORMS_FUSED, RAISED, WEIGHTS_ROUNDED, Fact


@register
@dataclass(frozen=True)
class CenterResidual(Pass):
    """Subtract the mean over channels from all that writes to the residual stream; no op is added.

    Before::

        %h = embedding(@E); %h' = %h + linear(%a, @Wo, @b); %y = linear(layer_norm(%h', None, None), @W)

    After::

        the same graph with  @E - mean(@E),  @Wo - mean(@Wo),  @b - mean(@b),  and rms_norm for layer_norm

    A LayerNorm begins with subtracting that mean, so nothing changes (arXiv 2401.15024, §3.2); what comes is an
    RMSNorm, which a rotation of the residual commutes with. A stream that an RMSNorm, a linear or the output reads as
    it is needs its mean and is refused, as is one that something else than embeddings and linears writes to.
    """

    name: ClassVar[str] = "center-residual"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED, NORMS_FUSED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-9)

    def run(self, rw: Rewriter, ctx: Context) -> None:
        seen: set[fx.Node] = set()
        for stream in residual_streams(rw.program):
            seen |= set(stream.norms)
            reason = _refusal(rw, stream)
            if not _layer_norms(stream):
                rw.skip(stream.writers[0], "no LayerNorm reads this residual stream", done=True)
            elif reason is not None:
                rw.skip(stream.writers[0], reason)
            elif rw.match(stream.writers[0], note=f"{len(stream.writers)} writers, {len(stream.norms)} norms"):
                _center(rw, stream)
        for norm in rw.program.nodes("layer_norm"):
            if norm not in seen:
                rw.skip(norm, "what it normalizes is no sum that embeddings begin")


def _refusal(rw: Rewriter, stream: Stream) -> str | None:
    """Why a stream keeps its mean; None if it may go."""
    norms = _layer_norms(stream)
    others = [f"the RMSNorm {path_of(n) or n.name} needs the mean" for n in stream.norms if n not in norms]
    biased = [f"the norm {path_of(n) or n.name} has a bias" for n in norms if spec(n).get("bias") is not None]
    reasons = [*(refusal.reason for refusal in stream.refusals), *others, *biased]
    if not reasons:
        # A head that shares the embedding's table reads a norm without a gain, in which the mean has no part.
        behind = frozenset(user for norm in norms if spec(norm).get("weight") is None for user in norm.users)
        reasons = [reason for w in stream.writers if (reason := why_shared(rw, w, behind)) is not None]
    return "; ".join(dict.fromkeys(reasons[:3])) or None


def _layer_norms(stream: Stream) -> list[fx.Node]:
    return [norm for norm in stream.norms if kind(norm) == "layer_norm"]


def _center(rw: Rewriter, stream: Stream) -> None:
    done: set[str] = set()
    for writer in stream.writers:
        home = rw.weights.canonical(rw.program.weight_of(writer))
        if home not in done:
            done.add(home)
            change_output(rw, writer, _centred)
    for norm in stream.norms:
        x, gain, _, eps, offset, _ = spec(norm).arguments().values()
        given = (gain, eps) if gain is None else (gain, eps, offset, True)
        rw.replace(norm, rw.call(torch.ops.mxfx.rms_norm.default, x, *given, like=norm))


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
