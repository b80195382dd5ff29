"""Providers: fast implementations of dialect ops, chosen by ``lower`` for a device and its operands.

A provider is itself a ``torch.library`` op that runs everywhere (on a device without the kernel it runs the
definition), so that an emitted graph can move between devices. ``mxfx.ops.kernels.kernel`` above a function makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

#: Says, of an op's operands, why a kernel does not take them; None if it does.
Takes = Callable[..., str | None]


def takes_all(*args: object, **kwargs: object) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """``target`` computes op ``op``, from its own operands, on devices of type ``device`` where ``takes`` is None."""

    name: str
    op: str
    device: str
    target: Callable
    takes: Takes = takes_all


_PROVIDERS: list[Provider] = []
_LOADERS: dict[str, Callable[[], str | None]] = {}


def provide(provider: Provider) -> Provider:
    """Register a provider; of several that take a node's operands the first registered wins."""
    _PROVIDERS.append(provider)
    return provider


def on_demand(device: str, load: Callable[[], str | None]) -> None:
    """Let ``load`` register the kernels of a device type when first asked for; it returns why there are none."""
    _LOADERS[device] = load


def offered(device: torch.device) -> tuple[str, ...]:
    """In words, all kernels for the type of a device, in the order in which they are asked, and why there are no
    others.
    """
    missing = _LOADERS[device.type]() if device.type in _LOADERS else None
    mine = [one for one in _PROVIDERS if one.device == device.type]
    return (missing or "", *(f"{one.name} {one.op} {_said(one.target)} {_said(one.takes)}" for one in mine))


def _said(function: Callable) -> str:
    """Its full name: ``repr`` of a function has its address."""
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"


@dataclass(frozen=True)
class Choice:
    """The provider that a node gets; without one, the ``reasons`` of all that might have been."""

    provider: Provider | None
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.provider.name if self.provider is not None else "definition: " + "; ".join(self.reasons)


def choose(op: str, node: fx.Node, device: torch.device) -> Choice:
    """Which provider computes a node on a device; its operands are described by their fake values."""
    missing = _LOADERS[device.type]() if device.type in _LOADERS else None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    reasons = [] if missing is None else [missing]
    for provider in _PROVIDERS:
        if provider.op != op or provider.device != device.type:
            continue
        reason = provider.takes(*args, **kwargs)
        if reason is None:
            return Choice(provider)
        reasons.append(f"{provider.name}: {reason}")
    return Choice(None, tuple(reasons) or (f"no kernel for {device.type}",))
