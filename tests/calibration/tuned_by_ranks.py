"""What ``test_sharded.py`` starts under torchrun: a distillation of a few parameters, written down."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mxfx.calibration.distillation import Distillation, Plan
from mxfx.calibration.sharded import ShardedUpdate
from mxfx.ground import ranks
from mxfx.rewrite import Context

_SIZES = {"a": (7,), "b": (5, 3), "c": (11, 13), "d": (1,)}


def tuned(
    steps: int = 12, file: Path | None = None, accumulate: int = 1, only: str = ""
) -> tuple[dict[str, Tensor], Distillation]:
    """Parameters after ``steps``, by name: a small net that learns what another one computes; ``only`` one is tuned."""
    generator = torch.Generator().manual_seed(0)
    wanted = {name: torch.randn(size, generator=generator) for name, size in _SIZES.items()}
    given = torch.randn(9, 11, generator=generator)
    parameters = {name: nn.Parameter(0.7 * w + 0.2) for name, w in wanted.items()}
    # A view whose axes lie in another order.
    parameters["c"].data = parameters["c"].data.mT.contiguous().mT

    def run(x: Tensor, of: dict[str, Tensor]) -> Tensor:
        wide = torch.tanh(x @ of["c"])
        return wide[:, :7] * of["a"] + (wide[:, :5] @ of["b"]).sum(-1, keepdim=True) + of["d"]

    def loss(x: Tensor) -> Tensor:
        return 30 * (run(x, parameters) - run(x, wanted)).square().mean()  # so that gradients are clipped

    def check() -> float:
        with torch.no_grad():
            return float(loss(given[:2]))

    plan = Plan(12, 4, 0.05, accumulate=accumulate, check_every=3, checkpoint_every=5, average=4)
    ctx = Context(progress=lambda items, *_: items if steps == 12 else list(items)[:steps])
    chosen_ones = {name: p for name, p in parameters.items() if only in ("", name)}
    loop = Distillation(plan, chosen_ones, loss, check, lambda chosen: (given[chosen],), 9, ctx, file=file)
    loop.run()
    return {name: parameter.detach().clone().contiguous() for name, parameter in parameters.items()}, loop


def main(out: Path) -> None:
    ranks.start()
    found, loop = tuned()
    assert isinstance(loop._update, ShardedUpdate)
    held = sum(moment.numel() for state in loop._update._update.state.values() for moment in (state["exp_avg"],))
    # The second run goes on from the checkpoint after 5 steps, which only the first rank has.
    file = out / "kept.safetensors" if ranks.is_first() else None
    tuned(5, file)
    assert ranks.from_first(lambda: file is not None and file.exists())
    resumed, _ = tuned(12, file)
    everywhere = ranks.collected(found)
    assert all(torch.equal(other[name], found[name]) for other in everywhere for name in found), "ranks differ"
    counts = ranks.collected(held)
    split, _ = tuned(accumulate=2)
    one, loop = tuned(only="d")
    held_by_all = [one["d"].tolist(), *(moment.tolist() for of in loop._update.moments() for moment in of)]
    assert all(other == held_by_all for other in ranks.collected(held_by_all)), "ranks differ"
    if ranks.is_first():
        save_file(found, out / "found.safetensors")
        save_file(resumed, out / "resumed.safetensors")
        save_file(one, out / "one.safetensors")
        save_file(split, out / "split.safetensors")
        save_file({"held": torch.tensor(counts)}, out / "held.safetensors")
    ranks.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
