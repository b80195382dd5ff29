"""Providers: fast implementations of dialect ops, chosen by ``lower`` for a device and a shape.

A provider is itself a ``torch.library`` op that runs everywhere (on a device without the kernel it runs the
definition), so that an emitted graph can move between devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True)
class Provider:
    """``target`` computes op ``op`` on devices of type ``device`` for nodes that ``serves`` accepts.

    ``arguments`` maps the node to the target's operands (default: the node's own).
    """

    name: str
    op: str
    device: str
    target: Callable
    serves: Callable[[fx.Node], bool] = lambda node: True
    arguments: Callable[[fx.Node], tuple] = lambda node: node.args


_PROVIDERS: list[Provider] = []


def provide(provider: Provider) -> Provider:
    """Register a provider; of several that serve a node the first registered wins."""
    _PROVIDERS.append(provider)
    return provider


def choose(op: str, node: fx.Node, device: torch.device) -> Provider | None:
    """The provider for a node on a device; None if the definition is to be inlined."""
    fitting = (p for p in _PROVIDERS if p.op == op and p.device == device.type and p.serves(node))
    return next(fitting, None)


def all_providers() -> tuple[Provider, ...]:
    return tuple(_PROVIDERS)
