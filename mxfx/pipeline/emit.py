"""The emit stage alone: for a program that was rewritten without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mxfx.graph.phases import entries, joined
from mxfx.graph.program import Program

if TYPE_CHECKING:
    from mxfx.config.emit import EmitConfig
    from mxfx.pipeline.manager import Instrument
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
    if all("lowered" in one.facts for one in entries(program).values()):
        return program
    # A saved model that was emitted before is opened without passes.
    from mxfx.rewrite import Context

    if program.phases is not None:
        return _of_phases(program, device, settings, instruments)
    return _emitted(program, device, settings, instruments, Context())


def _of_phases(
    program: Program, device: torch.device | str, settings: EmitConfig | None, instruments: Sequence[Instrument]
) -> Program:
    """Both programs, each with the other as its peer."""
    from mxfx.rewrite import Context

    assert program.phases is not None
    decode, handoff = program.phases.decode, program.phases.handoff
    first, second = (
        _emitted(one, device, settings, instruments, Context(phase=phase, peer=peer, handoff=handoff))
        for phase, one, peer in (("prefill", program, decode), ("decode", decode, program))
    )
    return joined(first, second, handoff, program.phases.onto)


def _emitted(
    program: Program,
    device: torch.device | str,
    settings: EmitConfig | None,
    instruments: Sequence[Instrument],
    ctx: Context,
) -> Program:
    if "lowered" in program.facts:
        return program
    from mxfx.config.emit import EmitConfig
    from mxfx.config.pipeline import Pipeline
    from mxfx.passes.unpack_weights import PACKED
    from mxfx.pipeline.manager import PassManager

    settings = settings or EmitConfig(packed=any(program.nodes(*PACKED)))
    place = torch.device(device)
    stage = Pipeline(emit=settings).emitted(place.type)
    return PassManager(instruments).run(program, stage, replace(ctx, device=place)).program
