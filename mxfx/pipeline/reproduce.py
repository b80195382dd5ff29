"""Run a reproducer folder again, and cut it to one layer if it still fails there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, fx

from mxfx.config.pipeline import Pipeline
from mxfx.config.text import from_text
from mxfx.graph.node import layer_of
from mxfx.graph.program import Program
from mxfx.graph.text import parse
from mxfx.pipeline.instruments import Numbers, Verify
from mxfx.pipeline.instruments.reproduce import save_reproducer
from mxfx.pipeline.manager import PassManager, StopPoint
from mxfx.pipeline.probe import Probe
from mxfx.rewrite import Context
from mxfx.rewrite.rewriter import clean


@dataclass(frozen=True)
class Reproduced:
    """What happened: the failure (None: it ran through), whether it is the recorded one, and the smaller folder."""

    error: Exception | None
    same: bool
    layers: int
    shrunk: Path | None = None

    def __str__(self) -> str:
        said = (
            "ran through: the failure is gone" if self.error is None else f"{type(self.error).__name__}: {self.error}"
        )
        smaller = f"\ncut to {self.layers} layer in {self.shrunk}" if self.shrunk else ""
        return f"{'reproduced' if self.same else 'not reproduced'}: {said}{smaller}"


@dataclass(frozen=True)
class Reproducer:
    """A folder that the ``Reproduce`` instrument left, read back."""

    program: Program
    pipeline: Pipeline
    ids: Tensor | None
    tokens: Tensor | None
    seed: int
    limit: int | None
    error: str

    @classmethod
    def read(cls, folder: Path) -> Reproducer:
        """Raises ``FileNotFoundError`` or ``TextError`` for a folder that is none."""
        said = json.loads((folder / "repro.json").read_text(encoding="utf-8"))
        stored = load_file(folder / "weights.safetensors")
        weights = {n.removeprefix("weight/"): t for n, t in stored.items() if n.startswith("weight/")}
        program = parse((folder / "graph.txt").read_text(encoding="utf-8"), weights if said["weights"] else None)
        pipeline = from_text((folder / "passes.txt").read_text(encoding="utf-8").strip(), str(folder / "passes.txt"))
        return cls(
            program,
            pipeline,
            stored.get("probe"),
            stored.get("tokens"),
            said["seed"],
            said["limit"],
            said["error"]["type"],
        )

    def fails(self, program: Program) -> Exception | None:
        """The exception that running the pipeline on ``program`` raises, None if it runs through."""
        tokens = self.tokens
        ctx = Context(seed=self.seed) if tokens is None else Context(seed=self.seed, tokens=lambda: tokens)
        stop = StopPoint(1, self.limit) if self.limit is not None else None
        try:
            PassManager([Numbers(), Verify()]).run(
                program, self.pipeline, ctx, probe=Probe(seed=self.seed, ids=self.ids), stop_after=stop
            )
        except Exception as error:
            return error
        return None

    def is_same(self, error: Exception | None) -> bool:
        return type(error).__name__ == self.error


def reproduce(folder: str | Path, shrink: bool = False) -> Reproduced:
    """Run what failed again. ``shrink`` looks for one decoder layer on which it still fails, and saves that
    beside it.
    """
    folder = Path(folder)
    case = Reproducer.read(folder)
    error = case.fails(case.program)
    same = case.is_same(error)
    layers = case.program.layers
    if not (shrink and same and layers > 1):
        return Reproduced(error, same, layers)
    for layer in range(layers):
        small = one_layer(case.program, layer)
        failure = case.fails(small)
        if case.is_same(failure):
            assert failure is not None
            target = folder / "shrunk"
            save_reproducer(target, small, case.pipeline, failure, case.seed, case.ids, case.tokens, case.limit)
            return Reproduced(failure, True, 1, target)
    return Reproduced(error, same, layers)


def one_layer(program: Program, layer: int) -> Program:
    """A copy that keeps one decoder layer: what entered the first layer enters it, what left the last leaves it.

    Raises ``ValueError`` if layers are not joined by a single value each.
    """
    result = program.copy()
    first, last = _leaving(result, 0), _leaving(result, program.layers - 1)
    entering = _entering(result, first)
    leaving = _leaving(result, layer)
    if layer > 0:
        above = _leaving(result, layer - 1)
        above.replace_all_uses_with(entering, delete_user_cb=lambda user: layer_of(user) == layer)
    if leaving is not last:
        last.replace_all_uses_with(leaving, delete_user_cb=lambda user: layer_of(user) is None)
    clean(result)
    return result


def _leaving(program: Program, layer: int) -> fx.Node:
    """The one value of a layer that is read outside it."""
    found = [n for n in program.graph.nodes if layer_of(n) == layer and any(layer_of(u) != layer for u in n.users)]
    found = [n for n in found if n.op == "call_function"]
    if len(found) != 1:
        raise ValueError(
            f"layer {layer} is left by {len(found)} values ({', '.join(n.name for n in found)}), not by one"
        )
    return found[0]


def _entering(program: Program, first: fx.Node) -> fx.Node:
    """The residual stream before layer 0: computed outside the layers, read by layer 0, shaped like what leaves it."""
    shape = str(first.meta["val"].shape)
    for node in program.graph.nodes:
        inside = any(layer_of(user) == 0 for user in node.users)
        val = node.meta.get("val")
        if inside and layer_of(node) is None and isinstance(val, torch.Tensor) and str(val.shape) == shape:
            return node
    raise ValueError("no value outside the layers enters layer 0")
