"""``scale-channels``: free diagonals between linears, so that activations and weights share the range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, fx

from mxfx.algorithms.block_transform import smoothing_scales
from mxfx.calibration.moments import block_moments
from mxfx.graph.node import operands, path_of
from mxfx.graph.regions import (
    GatedRegion,
    Refusal,
    RotaryRegion,
    ValueRegion,
    gated_regions,
    rotary_region,
    value_region,
)
from mxfx.ops.catalogue import multiplies, spec
from mxfx.passes.permute_channels import why_fixed
from mxfx.rewrite import ALL, Close, Context, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.basis import bias_of, change_input, why_shared
from mxfx.rewrite.facts import ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED, RAISED, WEIGHTS_ROUNDED, Fact

Region: TypeAlias = "GatedRegion | ValueRegion | RotaryRegion | fx.Node"


@register
@dataclass(frozen=True)
class ScaleChannels(Pass):
    """Divide activation channels by s, multiply what reads them by s (SmoothQuant, arXiv 2211.10438); no op is added.

    Before::

        %y = linear(f(%g) * linear(%x, @Wu), @Wd)

    After::

        the same graph with rows @Wu / s and columns @Wd * s

    ``sites``: ``up`` (hidden channels of gated activations), ``value`` (values per key-value head, read by the output
    projection), ``key`` (keys against queries; channels i and i + head_dim/2 share s, for RoPE turns them together),
    ``norm`` (gains of norms that only linears read, so before ``fuse-norm``). s = |x|^alpha / |w|^(1-alpha) from root
    mean squares on the calibration tokens.

    sites: where diagonals are free: see above.
    alpha: share of the range that moves from activations into weights, from 0 to 1.
    """

    name: ClassVar[str] = "scale-channels"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, KV_QUANTIZED, LOWERED})
    numerics: ClassVar[Numerics] = Close(1e-9)
    sites: tuple[Literal["up", "value", "key", "norm"], ...] = ("up", "value", "key")
    alpha: float = 0.5
    select: Selector = ALL

    def run(self, rw: Rewriter, ctx: Context) -> None:
        regions = self._regions(rw)
        watched = {node: 1 for region in regions for node in _activations(region)}
        energy = {n: e.flatten(-3) for n, e in block_moments(rw.program, watched, ctx).items()}
        for region in regions:
            if rw.match(_place(region), note=type(region).__name__):
                self._scale(rw, region, [energy[n].sqrt() for n in _activations(region)])

    def _regions(self, rw: Rewriter) -> list[Region]:
        found: list[Region | Refusal] = []
        if "norm" in self.sites:
            found += [_norm(rw, node) for node in rw.program.nodes("rms_norm")]
        if "up" in self.sites:
            found += list(gated_regions(rw.program))
        for attention in rw.program.nodes("attention"):
            found += [value_region(attention)] if "value" in self.sites else []
            found += [rotary_region(attention)] if "key" in self.sites else []
        chosen: list[Region] = []
        for region in found:
            node = region.node if isinstance(region, Refusal) else _place(region)
            if not self.select(node):
                continue
            reason = region.reason if isinstance(region, Refusal) else _why_fixed(rw, region)
            if reason is None:
                chosen.append(region)
            else:
                rw.skip(node, reason)
        return chosen

    def _scale(self, rw: Rewriter, region: Region, sizes: list[Tensor]) -> None:
        if isinstance(region, GatedRegion):
            scale = smoothing_scales(sizes[0], _columns_rms(rw, region.readers), self.alpha)
            for reader in region.readers:
                change_input(rw, reader, lambda w: w * scale.to(w.device))
            # One of the factors carries the diagonal; the others stay.
            _scale_rows(rw, region.scaled[0].linear, region.scaled[0].rows, 1.0 / scale)
        elif isinstance(region, ValueRegion):
            self._scale_values(rw, region, sizes[0])
        elif isinstance(region, RotaryRegion):
            self._scale_keys(rw, region, *sizes)
        else:
            scale = smoothing_scales(sizes[0], _columns_rms(rw, tuple(region.users)), self.alpha)
            self._scale_gain(rw, region, scale)

    def _scale_values(self, rw: Rewriter, region: ValueRegion, size: Tensor) -> None:
        heads, width = region.rows.shape
        columns = _columns_rms(rw, (region.output,))[region.columns.flatten()].reshape(heads, -1, width)
        of_group = columns.square().mean(1).sqrt()
        scale = smoothing_scales(size.flatten(), of_group.flatten(), self.alpha).reshape(heads, width)
        _scale_rows(rw, region.value, region.rows.flatten(), 1.0 / scale.flatten())
        spread = scale.repeat_interleave(region.group, 0).flatten()
        full = torch.ones(rw.weights[rw.program.weight_of(region.output)].shape[1], dtype=torch.float64)
        full[region.columns.flatten()] = spread
        change_input(rw, region.output, lambda w: w * full.to(w.device))

    def _scale_keys(self, rw: Rewriter, region: RotaryRegion, queries: Tensor, keys: Tensor) -> None:
        heads, width = region.key_rows.shape
        group = region.query_rows.shape[0] // heads
        of_group = queries.square().reshape(heads, group, width).mean(1)
        scale = smoothing_scales(
            _paired(keys.square()).sqrt().flatten(), _paired(of_group).sqrt().flatten(), self.alpha
        )
        scale = scale.reshape(heads, width)
        _scale_rows(rw, region.key, region.key_rows.flatten(), 1.0 / scale.flatten())
        _scale_rows(rw, region.query, region.query_rows.flatten(), scale.repeat_interleave(group, 0).flatten())

    def _scale_gain(self, rw: Rewriter, norm: fx.Node, scale: Tensor) -> None:
        offset = float(operands(norm)["offset"])
        name = rw.program.weight_of(norm)
        rw.set_weight(name, (rw.weights[name].double() + offset) / scale.to(rw.weights[name].device) - offset)
        for linear in list(norm.users):
            change_input(rw, linear, lambda w: w * scale.to(w.device))


def _place(region: Region) -> fx.Node:
    if isinstance(region, GatedRegion):
        return region.readers[0]
    return region if isinstance(region, fx.Node) else region.attention


def _activations(region: Region) -> list[fx.Node]:
    """The tensors whose channel sizes decide a region's scales."""
    if isinstance(region, GatedRegion):
        return [region.product]
    if isinstance(region, fx.Node):
        return [region]
    names = ("v",) if isinstance(region, ValueRegion) else ("q", "k")
    return [operands(region.attention)[name] for name in names]  # type: ignore[misc]


def _norm(rw: Rewriter, norm: fx.Node) -> fx.Node | Refusal:
    strangers = [u for u in norm.users if not multiplies(u, norm) or spec(u).axis("weight") != -1]
    if spec(norm).get("weight") is None:
        return Refusal(norm, "its gain is fused: nothing is left to scale")
    if strangers:
        return Refusal(norm, f"{path_of(strangers[0]) or strangers[0].name} reads it, which is no linear")
    return norm


def _why_fixed(rw: Rewriter, region: Region) -> str | None:
    if isinstance(region, GatedRegion):
        return why_fixed(rw, region) if region.scaled else "no linear enters the product linearly"
    linears = (
        (region.value, region.output)
        if isinstance(region, ValueRegion)
        else (region.query, region.key)
        if isinstance(region, RotaryRegion)
        else tuple(region.users)
    )
    return next((reason for n in linears if (reason := why_shared(rw, n)) is not None), None)


def _columns_rms(rw: Rewriter, linears: tuple[fx.Node, ...]) -> Tensor:
    stacked = torch.cat([rw.weights[rw.program.weight_of(n)].double() for n in linears])
    return stacked.square().mean(0).sqrt().cpu()


def _scale_rows(rw: Rewriter, linear: fx.Node, rows: Tensor, factor: Tensor) -> None:
    for name in (rw.program.weight_of(linear), bias_of(linear)):
        if name is not None:
            tensor = rw.weights[name].double().clone()
            tensor[rows] *= (factor if tensor.dim() == 1 else factor[:, None]).to(tensor.device)
            rw.set_weight(name, tensor)


def _paired(energy: Tensor) -> Tensor:
    """Mean energy of channels i and i + width/2, ``(heads, width)``."""
    low, high = energy.chunk(2, -1)
    mean = (low + high) / 2
    return torch.cat((mean, mean), -1)
