"""After every pass, all ranks of a run hold one program: what a pass computed on each by itself is the first one's."""

from __future__ import annotations

import torch

from mxfx.graph.program import Program
from mxfx.ground import ranks


def agree(before: Program, after: Program, title: str) -> None:
    """Let every rank have the first one's bytes of the weights that a pass changed.

    A pass that several ranks do alike may still end in other last bits: kernels are chosen by timing, and GPUs sum in
    an order of their own. Raises ``RankError`` if the graphs are not the same, which a pass that reads a clock or
    another source of chance would make of them.
    """
    if ranks.world() == 1:
        return
    changes = after.weights.ledger[len(before.weights.ledger) :]
    last = {change.weight: change.after for change in changes if change.weight in after.weights}
    found = ranks.collected((str(after.graph), sorted(last), last))
    if any(other[:2] != found[0][:2] for other in found):
        raise ranks.RankError(f"{title}: the processes of the run came to different programs")
    for name in found[0][1]:
        if all(other[2][name] == found[0][2][name] for other in found):
            continue
        tensor = after.weights[name]
        mine = tensor if ranks.is_first() else torch.empty_like(tensor)
        ranks.sent(mine)
        after.weights.adopt(name, mine)
