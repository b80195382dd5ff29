"""What the shipped configurations make of an architecture: A, GPTQ and D in their shortest form, on a tiny model."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from mxfx.api import load_pipeline
from mxfx.config import Pipeline
from mxfx.driver.job import default_instruments
from mxfx.graph.execute import execute
from mxfx.graph.node import op_name
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.ground.errors import MxfxError
from mxfx.ops.catalogue import spec
from mxfx.passes import Distill
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context, Pass
from mxfx.rewrite.operands import is_rounded
from mxfx.rewrite.size import inner, multiplied, share_in_format
from tests.architectures import VOCABULARY, NotCausal, Unbuilt, build, in_a_process

CONFIGS = Path(__file__).parents[1] / "passes_configs"
#: Name → file: round to nearest, layer by layer, tuned.
FILES = {"A": "rtn_w4a4kv4.toml", "GPTQ": "gptq_w4a4kv4.toml", "D": "best_w4a4kv4.toml"}
TOKENS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
#: The least share of the layers' weights that A must take, and why a family has less: the products that stay float.
LEAST = 0.9
EXCUSED = {
    "gemma3n_text": "alternating updates and low-rank residuals mix streams: products of no role",
    "hy_v4": "hyper-connections mix streams by weights cast to float32, an indexer chooses keys: products of no role",
}

#: Ops that move a weight and change nothing in it, and ops that multiply matrices.
MOVES = (
    "transpose",
    "t",
    "mT",
    "permute",
    "view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "expand",
    "select",
    "slice",
    "cast",
)
MULTIPLIES = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "mv")


@dataclass
class Outcome:
    """What became of a family: ``none`` (no tiny model), ``refused``, ``ok`` or ``CRASH``, and by configuration.

    ``share``: of the weights that layers multiply by, what A gave a format; ``left``: what it did not, by path.
    """

    name: str
    kind: str = "ok"
    why: str = ""
    configs: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0


def outcome(name: str) -> Outcome:
    """Trace a family and run every configuration on it; each is ``ok``, or refused with a reason."""
    found = Outcome(name)
    started = time.perf_counter()
    try:
        program = trace(build(name))
    except (NotCausal, Unbuilt) as error:
        return replace(found, kind="none", why=f"{type(error).__name__}: {error}")
    except MxfxError as error:
        return replace(found, kind="refused", why=f"{type(error).__name__}: {error}")
    for config, file in FILES.items():
        try:
            result = PassManager(default_instruments(pipeline := shortened(file))).run(
                program, pipeline, Context(tokens=lambda: TOKENS)
            )
        except MxfxError as error:
            found.configs[config] = f"refused: {error}"
            continue
        logits = execute(result.program, TOKENS[:2])
        found.configs[config] = "ok" if bool(logits.isfinite().all()) else "CRASH: logits are not finite"
        if config == "A":
            # A format that is only wanted, of a weight that no pass could round, is none.
            weights = [
                one if is_rounded(one.node, "weight") else replace(one, format=None)
                for one in inner(multiplied(result.before_emit))
            ]
            uncounted = unseen(result.before_emit)
            known = sum(one.elements for one in weights)
            found.share = share_in_format(weights) * known / (known + sum(uncounted.values()))
            found.left = sorted({one.node.meta["mxfx"].path for one in weights if one.format is None} | set(uncounted))
    found.kind = "CRASH" if any(said.startswith("CRASH") for said in found.configs.values()) else "ok"
    found.seconds = time.perf_counter() - started
    return found


def unseen(program: Program) -> dict[str, int]:
    """Stored tensors that a matrix product multiplies by and no op of the catalogue has as its weight: elements.

    ``multiplied`` knows nothing of them.
    """
    found = {}
    for node in program.nodes():
        if node.op != "get_attr" or str(node.target) in program.weights.constants:
            continue
        frontier = [node]
        while frontier:
            readers = {reader: _op(reader) for reader in frontier.pop().users}
            frontier += [reader for reader, op in readers.items() if op in MOVES]
            if any(op in MULTIPLIES and not spec(reader).product for reader, op in readers.items()):
                found[str(node.target)] = node.meta["val"].numel()
    return found


def _op(node: fx.Node) -> str:
    """``matmul`` for ``aten.matmul.default``."""
    return op_name(node).rpartition(".")[0].rpartition(".")[2]


def shortened(file: str) -> Pipeline:
    """A shipped configuration with two steps of training."""
    passes: list[Pass] = [
        replace(one, steps=2, batch_size=2, checks=1) if isinstance(one, Distill) else one
        for one in load_pipeline(CONFIGS / file).passes
    ]
    return Pipeline(passes).completed().emitted()


def apart(name: str) -> Outcome:
    """``outcome`` in a process of its own, with bounds on memory and time."""

    def run() -> dict[str, Any]:
        warnings.simplefilter("ignore")
        return asdict(outcome(name))

    found, crash = in_a_process(run)
    return Outcome(**found) if found is not None else Outcome(name, "CRASH", crash)
