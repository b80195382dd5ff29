"""The emit stage alone: for a program that was rewritten without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mxfx.config.emit import EmitConfig
from mxfx.config.pipeline import Pipeline
from mxfx.graph.program import Program
from mxfx.pipeline.manager import Instrument, PassManager
from mxfx.rewrite import Context


def emitted(
    program: Program,
    device: torch.device | str = "cpu",
    settings: EmitConfig | None = None,
    instruments: Sequence[Instrument] = (),
) -> Program:
    """What the emit stage makes of a raised program for a device; a lowered program as it is.

    Without ``settings`` a program with packed weights keeps them packed.
    """
    if "lowered" in program.facts:
        return program
    settings = settings or EmitConfig(packed=any(program.nodes("mx_linear", "mx_expert_linear", "mx_embedding")))
    place = torch.device(device)
    stage = Pipeline(emit=settings).emitted(place.type)
    return PassManager(instruments).run(program, stage, Context(device=place)).program
