"""What comes before every command: imports that are late, and quiet."""

from __future__ import annotations

import logging
import warnings

from mxfx.ground.late import LateImports

#: Rooms whose classes declare formats, options and contracts, and what only the bodies in them need.
LATE = LateImports(
    rooms=("mxfx.ground", "mxfx.formats", "mxfx.rewrite", "mxfx.passes"),
    heavy=(
        "torch",
        "mxfx.algorithms",
        "mxfx.ops",
        "mxfx.graph",
        "mxfx.calibration",
        *(f"mxfx.rewrite.{body}" for body in ("basis", "inline", "lowering", "operands", "pattern", "roles", "size")),
    ),
)


def prepare_imports() -> None:
    LATE.install()
    quiet()


def quiet() -> None:
    """What libraries say at import and of what mxfx asks them is not for the user."""
    # transformers imports torchao where it is installed, and torchao reports kernels that nobody asked for.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # A packed checkpoint is asked for dequantized: transformers tells that it was asked.
    warnings.filterwarnings("ignore", "You passed `quantization_config`")
