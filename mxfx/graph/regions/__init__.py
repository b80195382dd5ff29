"""Which tensors share a feature axis, and which weights write and read it.

Everything here is found by dataflow: ops and shapes decide, never names of modules or families. A region that a
rewrite may not touch comes back as a ``Refusal`` (or carries refusals) that says which node is in the way and why.
"""

from mxfx.graph.regions.attention import RotaryRegion, ValueRegion, rotary_region, value_region
from mxfx.graph.regions.features import Features, features
from mxfx.graph.regions.gated import GatedRegion, Writer, gated_regions
from mxfx.graph.regions.inputs import siblings
from mxfx.graph.regions.ops import Refusal
from mxfx.graph.regions.residual import AxisRegion, Stream, residual_regions, residual_streams

__all__ = [
    "AxisRegion",
    "Features",
    "GatedRegion",
    "Refusal",
    "RotaryRegion",
    "Stream",
    "ValueRegion",
    "Writer",
    "features",
    "gated_regions",
    "residual_regions",
    "residual_streams",
    "rotary_region",
    "siblings",
    "value_region",
]
