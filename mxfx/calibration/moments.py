"""Calibration tokens through a whole program once, to watch chosen tensors: second moments and samples of rows.

For passes that decide before anything is rounded, where every statistic belongs to one and the same program. (What
depends on rewritten predecessors comes from ``mxfx.calibration.stream``.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext

import torch
from torch import Tensor, fx

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.calibration.estimate import SHARE, free_bytes
from mxfx.calibration.spread import Part, concatenated, parts, total
from mxfx.graph.execute import execute, runtime_weight
from mxfx.graph.feed import Feed
from mxfx.graph.program import Program
from mxfx.graph.weights import WeightStore
from mxfx.ground import ranks
from mxfx.rewrite import Context

#: Tokens that go through a program at once.
BATCH_TOKENS = 4096

Sink = Callable[[Tensor], None]


class _LastSeen(Exception):
    """Every watched node has its value: the rest of the program need not run."""


def watch(program: Program, sinks: Mapping[fx.Node, Sink], ctx: Context, tokens: Tensor | None = None) -> None:
    """Run calibration tokens through ``program`` and hand every value of a watched node to its sink.

    The program runs in its own dtype on ``ctx.device``, up to the last watched node; in pieces where it does not fit
    there. ``tokens`` are int64 ``(samples, length)``; None takes the run's. Of several ranks each runs its share, in
    ``batches_of``. Raises ``MissingCalibration`` if there are none.
    """
    if not sinks:
        return
    tokens = ctx.tokens() if tokens is None else tokens
    whole = fits(program, ctx.device)
    there = _on_device(program, ctx.device) if whole else program
    last = next(node for node in reversed(program.graph.nodes) if node in sinks)

    def observe(node: fx.Node, value: object) -> object:
        if node in sinks:
            assert isinstance(value, Tensor)
            sinks[node](value)
        if node is last:
            raise _LastSeen
        return value

    batches = batches_of(tokens)
    feed = None if whole else Feed(program, ctx.device)
    with nullcontext() if feed is None else closing(feed):
        for part in ctx.progress(batches, "calibration", len(batches)):
            if feed is not None:
                feed.start()
            try:
                execute(there, part.ids.to(ctx.device), observe=observe, feed=feed)
            except _LastSeen:
                continue


def batches_of(tokens: Tensor) -> list[Part]:
    """This rank's samples of ``tokens``, int64 ``(samples, length)``, as they go through a program at once."""
    return parts(tokens, max(1, BATCH_TOKENS // tokens.shape[1]))


def block_moments(
    program: Program,
    blocks: Mapping[fx.Node, int],
    ctx: Context,
    tokens: Tensor | None = None,
    *,
    unit_rows: bool = False,
    by_head: bool = True,
) -> dict[fx.Node, Tensor]:
    """Second moments within blocks of each node's last axis: mean of ``x_Bᵀ x_B`` over tokens, float64 on CPU.

    ``blocks`` maps a node to its block size b. A ``(batch, seq, n)`` node gives ``(n / b, b, b)``, a
    ``(batch, heads, seq, n)`` node ``(heads, n / b, b, b)``. With ``unit_rows`` each token's row is first divided by
    its root mean square, so that a few huge tokens do not speak for all. Without ``by_head`` the rows of a tensor of
    any rank count alike, as those of a linear's input do.

    The sums lie on the device (``moment_bytes``); where they take more of it than weights leave free, the tokens run
    through the program once for each part of the nodes. Of several ranks each sums over its samples, and they add up.
    """
    found: dict[fx.Node, Tensor] = {}
    # One division of the nodes for all ranks, whose devices may have more or less room.
    most = min(ranks.collected((1 - SHARE) * free_bytes(ctx.device)))
    for part in _parts(blocks, most, by_head):
        sums = {node: BlockMoment(blocks[node], ctx.device, unit_rows, by_head) for node in part}
        watch(program, sums, ctx, tokens)
        found |= means(sums)
        if unseen := [node for node in part if node not in found]:
            raise ValueError(f"no value of {unseen[0].name} was seen")
    return found


def moment_bytes(blocks: Mapping[fx.Node, int], *, by_head: bool = True) -> int:
    """What ``block_moments`` sums up for these nodes takes on the device, in float32."""
    return sum(_bytes_of(node, block, by_head) for node, block in blocks.items())


def _bytes_of(node: fx.Node, block: int, by_head: bool) -> int:
    shape = node.meta["val"].shape
    return 4 * int(shape[-1]) * block * (int(shape[1]) if by_head and len(shape) == 4 else 1)


def _parts(blocks: Mapping[fx.Node, int], most: float, by_head: bool) -> list[list[fx.Node]]:
    """Nodes in order, together of no more than ``most`` bytes, a new moment of the widest among them counted."""
    parts: list[list[fx.Node]] = []
    sums = widest = 0
    for node, block in blocks.items():
        size = _bytes_of(node, block, by_head)
        widest = max(widest, size)
        if not parts or sums + size + widest > most:
            parts.append([])
            sums, widest = 0, size
        sums += size
        parts[-1].append(node)
    return parts


class BlockMoment:
    """Σ x_Bᵀ x_B of the rows that this rank sees, which lie on ``device``; see ``block_moments``."""

    def __init__(self, block: int, device: torch.device, unit_rows: bool = False, by_head: bool = True) -> None:
        self._block = block
        self._device = device
        self._by_head = by_head
        self._unit_rows = unit_rows
        self._sum: Tensor | None = None
        self._seen = 0

    def __call__(self, x: Tensor) -> None:
        wide = (_rows(x) if self._by_head else x.flatten(0, -2)).to(torch.promote_types(x.dtype, torch.float32))
        if self._unit_rows:
            wide = wide * wide.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
        self._seen += wide.shape[-2]
        columns = wide.unflatten(-1, (-1, self._block)).transpose(-3, -2)  # (…, blocks, tokens, b)
        moment = columns.mT @ columns
        self._sum = moment if self._sum is None else self._sum.add_(moment)

    def mean(self) -> Tensor | None:
        """The mean over the rows of all ranks, float64 on CPU, None where none saw any; to be called once, on all."""
        whole, rows = total(self._sum, self._device), sum(ranks.collected(self._seen))
        return None if whole is None else whole.double().cpu() / rows


def means(sums: Mapping[fx.Node, BlockMoment]) -> dict[fx.Node, Tensor]:
    """The mean of each moment over the rows of all ranks; of what no rank saw, none."""
    found = {node: moment.mean() for node, moment in sums.items()}
    return {node: mean for node, mean in found.items() if mean is not None}


def _rows(x: Tensor) -> Tensor:
    """``(batch, seq, n)`` -> ``(tokens, n)``; ``(batch, heads, seq, n)`` -> ``(heads, tokens, n)``."""
    return x.flatten(0, -2) if x.dim() < 4 else x.transpose(0, 1).flatten(1, 2)


def samples(
    program: Program, nodes: Mapping[fx.Node, Callable[[Tensor], Tensor]], ctx: Context, rows: int, purpose: str
) -> dict[fx.Node, Tensor]:
    """About ``rows`` random tokens' values of each node on ``ctx.device``; the mapped function may reduce them first.

    The same tokens are drawn for every node, from a generator that ``purpose`` seeds.
    """
    tokens = ctx.tokens()
    share = min(1.0, rows / tokens.numel())
    picked: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}

    def sink(node: fx.Node) -> Sink:
        generator = ctx.generator(purpose)
        batches = iter(batches_of(tokens))

        def take(x: Tensor) -> None:
            values = _rows(x)
            drawn = next(batches).rows(lambda count: torch.rand(count, generator=generator), values.shape[-2])
            picked[node].append(nodes[node](values[..., (drawn < share).to(x.device), :]))

        return take

    watch(program, {node: sink(node) for node in nodes}, ctx, tokens)
    found = {}
    for node, seen in picked.items():
        whole = concatenated(torch.cat(seen, dim=-2) if seen else None, -2, ctx.device)
        assert whole is not None
        found[node] = whole
    return found


def fits(program: Program, device: torch.device) -> bool:
    """Whether a device has room for a copy of the weights in the dtype that they run in; else each batch brings them
    anew.
    """
    copied = sum(
        tensor.numel() * program.dtype.itemsize
        for tensor in program.weights.values()
        if tensor.device.type != device.type or tensor.dtype != program.dtype
    )
    return copied <= SHARE * free_bytes(device)


def _on_device(program: Program, device: torch.device) -> Program:
    """The program with its weights on ``device`` in the dtypes that they run in; its nodes are the same objects."""
    store = program.weights
    moved = {name: runtime_weight(program, name).to(device) for name in store}
    weights = WeightStore(moved, store.aliases, store.working, store.constants)
    return Program(program.graph, weights, program.dtype, program.source, program.symbols, program.facts, program.notes)
