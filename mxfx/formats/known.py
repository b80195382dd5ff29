"""What is known of a symbolic size."""

from __future__ import annotations

import torch


def known_true(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for every size; False where that depends on the size."""
    # Slow to import, and reading the name of a format needs no sizes.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
