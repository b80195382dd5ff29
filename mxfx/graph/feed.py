"""Weights of a program that come to a device one after the other while it runs, for a model that it does not hold."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mxfx.graph.execute import as_run, checked_weight
from mxfx.graph.program import Program
from mxfx.graph.transfers import Arrival, Transfers

#: Weights that are on their way while one is read: the one that a copy fills, and the next for the worker to read.
_AHEAD = 2


class Feed:
    """Gives each weight as the program's nodes ask for it, and begins to bring those that they will ask for next.

    Copies go through pinned buffers on a stream of their own (``mxfx.graph.transfers``); the buffers stay until
    ``close``, so that one feed serves many runs. A weight comes as it is stored and is cast on the device.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program = program
        self._transfers = Transfers(device)
        read = (w for node in program.graph.nodes for w in node.all_input_nodes if w.op == "get_attr")
        self._order = list(dict.fromkeys(read))
        self._places = {node: place for place, node in enumerate(self._order)}
        self._coming: dict[fx.Node, Arrival] = {}

    def start(self) -> None:
        """Begin a run: what an earlier one left, because it ended early, is let go."""
        for arrival in self._coming.values():
            # Its memory must not be given out while a copy writes to it.
            arrival.get()
        self._coming.clear()

    def __call__(self, node: fx.Node) -> Tensor:
        """The weight of a ``get_attr`` node, in the dtype that it runs in."""
        place = self._places[node]
        for coming in self._order[place : place + 1 + _AHEAD]:
            if coming not in self._coming:
                tensor = checked_weight(self._program, str(coming.target))
                self._coming[coming] = self._transfers.staged_up(tensor)
        return as_run(self._program, str(node.target), self._coming.pop(node).get())

    def close(self) -> None:
        """Let go of the buffers."""
        self.start()
        self._transfers.close()
