"""``lower``: from the dialect to ATen and kernels, in the precision that the model runs in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mxfx.rewrite import Context, Local, Numerics, Pass, Rewriter, register
from mxfx.rewrite.facts import LOWERED, RAISED, Fact
from mxfx.rewrite.lowering import lower_calls


@register
@dataclass(frozen=True)
class Lower(Pass):
    """Replace every dialect op: by a provider's kernel where one serves the device, else by its ATen definition.

    Before::

        %y = mxfx.rms_norm(%x, @g, 1e-05)
        %o = mxfx.attention(%q, %k, %v, %mask, 0.125)
        %z = mxfx.cast(%y, "compute")

    After::

        %w = to(%x, float32); %r = rsqrt(mean(pow(%w, 2), [-1], True) + 1e-05); …
        %b = attention_bias(%mask, %q, %k, True, None, None)      # one for all layers
        %o = attend(%q, %k, %v, %b, 0.125, True)
        %z = to(%y, float32)

    Roles become dtypes: ``compute`` is max(float32, model dtype); a cast that changes nothing is dropped. A fused op
    that no kernel serves is split into its parts, each of which may have one.

    device: whose kernels are chosen; the run's device if not given.
    """

    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    provides: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    numerics: ClassVar[Numerics] = Local(1e-2)
    required: ClassVar[bool] = True
    device: Literal["cpu", "cuda"] | None = None

    def run(self, rw: Rewriter, ctx: Context) -> None:
        lower_calls(rw, ctx.device if self.device is None else torch.device(self.device))
