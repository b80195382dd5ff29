"""How much the loss minds a change of a tensor: gradients at the float model, of tokens that it draws itself.

KL to the float model has no gradient there, and the Fisher information for its Hessian: a small change δ of a tensor
costs ½ E[(δ · g)²] nats, g the gradient of log p(y) with y drawn from the model (Martens, JMLR 21, 2020, §5).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from mxfx.calibration.moments import BlockMoment, batches_of, fits, means
from mxfx.calibration.spread import Part, concatenated
from mxfx.calibration.stages import input_of
from mxfx.calibration.training import trainable
from mxfx.graph.node import kind, path_of
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.rewrite import Context, Rewriter

#: Sees the gradient at a tensor, batch by batch.
Sink = Callable[[Tensor], None]


def differentiate(logits: Tensor, part: Part, generator: torch.Generator) -> None:
    """Gradients of Σ log p(y) over rows of ``logits``, ``(…, vocabulary)``, to the hooks that are set; y drawn anew,
    the same however many ranks share the batch that ``part`` is of. Raises ``ValueError`` for logits that are NaN.
    """
    log_p = logits.flatten(0, -2).float().log_softmax(-1)
    if bool(log_p.isnan().any()):
        raise ValueError("the model's logits on calibration tokens are not finite: they have no gradients to go by")

    def times(rows: int) -> Tensor:
        return log_p.new_empty(rows, log_p.shape[-1]).exponential_(generator=generator)

    # The least of exponential times, each over its chance: ``torch.multinomial`` draws so too, but not for a part.
    drawn = log_p.detach().exp().div_(part.rows(times, len(log_p))).argmax(-1, keepdim=True)
    log_p.gather(-1, drawn).sum().backward()


def watch_gradients(program: Program, sinks: Mapping[fx.Node, Sink], ctx: Context, tokens: Tensor) -> None:
    """Run ``tokens``, int64 ``(samples, length)``, through ``program`` and back; hand the gradient at each watched
    node, of its shape and dtype, to its sink, batch after batch in the order of the samples. Of several ranks each runs
    its share, in ``batches_of``.

    The whole model lies on ``ctx.device``, with what one batch leaves for the way back. Raises ``ValueError`` where the
    device has no room for its weights.
    """
    if not sinks:
        return
    if not all(ranks.collected(fits(program, ctx.device))):
        raise ValueError(
            f"gradients of the loss take a pass back through the whole model, and {ctx.device} has no room for its "
            'weights; go without them: guided = false for gptq, against = "weights" for transforms'
        )
    copy = program.copy()
    rw = Rewriter(copy, "gradients")
    found = {node.name: node for node in copy.graph.nodes}
    marks: dict[str, Sink] = {}
    for node, sink in sinks.items():
        mine = found[node.name]
        readers = list(mine.users)
        mark = rw.call(_marked, mine, like=mine, after=mine, val=mine.meta["val"])
        for reader in readers:
            reader.replace_input_with(mine, mark)
        marks[mark.name] = sink
    module, _ = trainable(copy, {}, ctx.device)
    for node in module.graph.nodes:
        if node.name in marks:
            node.target = _hook(marks[node.name])
    module.recompile()
    generator = torch.Generator(ctx.device).manual_seed(int(ctx.generator("fisher").initial_seed()) % 2**63)
    batches = batches_of(tokens)
    for part in ctx.progress(batches, "gradients", len(batches)):
        logits = module(part.ids.to(ctx.device), None, None)
        # Without: none of the watched reaches them.
        if logits.requires_grad:
            differentiate(logits, part, generator)


def gradient_moments(
    program: Program, blocks: Mapping[fx.Node, int], ctx: Context, tokens: Tensor, *, by_head: bool = True
) -> dict[fx.Node, Tensor]:
    """Second moments of the gradients at nodes, shaped as those of their values by ``moments.block_moments``; of nodes
    that the loss does not depend on, none.
    """
    sums = {node: BlockMoment(block, ctx.device, by_head=by_head) for node, block in blocks.items()}
    watch_gradients(program, sums, ctx, tokens)
    return means(sums)


def warn_of_unreached(rw: Rewriter, nodes: Iterable[fx.Node], reached: Container[fx.Node], instead: str) -> None:
    """Say at which of ``nodes`` the loss has no gradient, and what is done ``instead``."""
    if missing := [path_of(node) or node.name for node in nodes if node not in reached]:
        rw.warn(f"no gradient of the loss reaches {', '.join(missing)}: {instead}")


def token_importance(program: Program, linears: Sequence[fx.Node], ctx: Context, tokens: Tensor) -> dict[str, Tensor]:
    """By name of a linear, how much the loss minds its outputs at each row: Σ g² over the channels of all linears that
    read its input, divided by its mean. Float32 ``(samples, rows of a sample)`` on ``ctx.device``; a row is a token, or
    a token of a head where those have rows of their own. Experts, and what the loss does not depend on, have none.

    An error of like size in every channel costs in proportion to it (GuidedQuant, arXiv 2505.07004, one group).
    """
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in linears:
        if kind(node) == "linear":
            groups.setdefault(input_of(node), []).append(node)
    seen: dict[fx.Node, list[Tensor]] = {node: [] for nodes in groups.values() for node in nodes}
    watch_gradients(program, {node: _squares(parts) for node, parts in seen.items()}, ctx, tokens)
    result: dict[str, Tensor] = {}
    for nodes in groups.values():
        of_ranks = (torch.cat(seen[node]) if seen[node] else None for node in nodes)
        found = [whole for own in of_ranks if (whole := concatenated(own, 0, ctx.device)) is not None]
        mean = sum(part.mean() for part in found)
        if found and mean > 0:
            total = torch.stack(found).sum(0).div_(mean).unflatten(0, (len(tokens), -1))
            result |= dict.fromkeys((node.name for node in nodes), total)
    return result


def _marked(x: Tensor) -> Tensor:
    """The identity, which no rewriting of the graph around it takes away."""
    return x


def _hook(sink: Sink) -> Callable[[Tensor], Tensor]:
    """The identity that hands the gradient at its value to a sink."""

    def marked(x: Tensor) -> Tensor:
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        x.register_hook(sink)
        return x

    return marked


def _squares(parts: list[Tensor]) -> Sink:
    """Keeps Σ g² over the last axis of each batch, row after row."""
    return lambda gradient: parts.append(gradient.float().square().sum(-1).flatten())
