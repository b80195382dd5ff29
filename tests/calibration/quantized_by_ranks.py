"""What ``test_four_ranks.py`` starts under torchrun: GPTQ of a tiny model, statistics and sums of odd sizes, written
down.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mxfx.api import trace
from mxfx.calibration import moments
from mxfx.calibration.fisher import gradient_moments, token_importance
from mxfx.calibration.sensitivity import Operands, kl_of_rounding
from mxfx.calibration.stages import input_of
from mxfx.config import Pipeline
from mxfx.formats import parse
from mxfx.graph.program import Program
from mxfx.graph.tiny import tiny
from mxfx.ground import ranks
from mxfx.passes import Annotate, Gptq, Rule
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context, Selector

#: Elements: fewer than ranks, and some that they do not share evenly.
SIZES = (1, 3, 4, 1003)


def quantized() -> dict[str, Tensor]:
    """Rounded weights of a tiny model, by name; every rank has the same."""
    rule = Rule(Selector(r".*_proj"), weight=parse("mxint4@32"), input=parse("mxint4@32"))
    tokens = torch.randint(3, 128, (9, 24), generator=torch.Generator().manual_seed(0))
    ctx = Context(tokens=lambda: tokens)
    gptq = Gptq(batch_size=2, quantized_inputs=True, asymmetric=0.25, activations="cpu")
    program = trace(tiny("llama-tiny", layers=2), proven=False)
    found = PassManager().run(program, Pipeline([Annotate((rule,)), gptq]).completed(), ctx).program
    return {name: tensor.clone() for name, tensor in found.weights.items() if "_proj" in name}


@cache
def _raised() -> Program:
    return PassManager().run(trace(tiny("llama-tiny", layers=2), proven=False), Pipeline([]).completed()).program


def measured(samples: int) -> dict[str, Tensor]:
    """Every statistic of so many samples, by kind and node; of batches that ranks share unevenly."""
    before, moments.BATCH_TOKENS = moments.BATCH_TOKENS, 4 * 24
    tokens = torch.randint(3, 128, (samples, 24), generator=torch.Generator().manual_seed(1))
    ctx = Context(tokens=lambda: tokens)
    program = _raised()
    linears = [node for node in program.nodes("linear") if node.name != "linear"]
    k = next(program.nodes("attention")).args[1]
    blocks = {input_of(node): 16 for node in linears}
    fmt = parse("mxint4@32")
    found = {
        "moments": moments.block_moments(program, blocks, ctx, by_head=False),
        "moments of heads": moments.block_moments(program, {k: 8}, ctx),
        "gradients": gradient_moments(program, blocks, ctx, tokens, by_head=False),
        "rows": moments.samples(program, {node: lambda x: x for node in [*blocks, k]}, ctx, 40, "test"),
        "importance": token_importance(program, linears, ctx, tokens),
        "costs": {
            name: torch.tensor(costs)
            for name, costs in kl_of_rounding(program, linears, [Operands(fmt, fmt)], tokens, ctx).items()
        },
    }
    seen: list[Tensor] = []
    moments.watch(program, {k: lambda x: seen.append(x[:, 0, 0, 0])}, ctx)
    assert sum(map(len, seen)) == len(tokens[ranks.share(samples)]), "a rank runs its share"
    moments.BATCH_TOKENS = before
    return {f"{kind} {node} {samples}": value for kind, of_kind in found.items() for node, value in of_kind.items()}


def addends(size: int, rank: int) -> Tensor:
    """What a rank gives to a sum whose last bits depend on the order."""
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def main(out: Path) -> None:
    ranks.start()
    for size in SIZES:
        expected = addends(size, 0)
        for rank in range(1, ranks.world()):
            expected = expected + addends(size, rank)
        mine = addends(size, ranks.rank())
        assert ranks.summed(mine) is mine and torch.equal(mine, expected), size
        counts = torch.arange(size) * (ranks.rank() + 1)
        assert torch.equal(ranks.summed(counts), torch.arange(size) * 10), size
    turned = addends(12, ranks.rank()).view(3, 4).mT
    whole = addends(12, 0)
    for rank in range(1, ranks.world()):
        whole = whole + addends(12, rank)
    assert torch.equal(ranks.summed(turned), whole.view(3, 4).mT)
    found = quantized() | measured(9) | measured(3)
    first = ranks.from_first(lambda: found)
    assert all(torch.equal(first[name], found[name]) for name in found), "ranks differ"
    if ranks.is_first():
        save_file(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()},
            out / "found.safetensors",
        )
    ranks.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
