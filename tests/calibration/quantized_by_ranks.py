"""What ``test_four_ranks.py`` starts under torchrun: GPTQ of a tiny model and sums of odd sizes, written down."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mxfx.api import trace
from mxfx.config import Pipeline
from mxfx.formats import parse
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
    found = quantized()
    first = ranks.from_first(lambda: found)
    assert all(torch.equal(first[name], found[name]) for name in found), "ranks differ"
    if ranks.is_first():
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, out / "found.safetensors")
    ranks.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
