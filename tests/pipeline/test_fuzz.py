"""Random pipelines over all passes that need no calibration: refused before they start, or every promise is kept."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch

from mxfx.config import ConfigError, from_text
from mxfx.graph.verify import verify
from mxfx.pipeline.instruments import Numbers, Verify
from mxfx.pipeline.manager import PassManager, check_pipeline
from mxfx.pipeline.probe import Probe
from mxfx.rewrite import Context

RAISE = ["raise-norm", "raise-rope", "raise-attention"]
LINEARS = "annotate{rule=[{match='.*_proj',weight=mxint4@32,input=mxint4@32}]}"
EVERYTHING = [
    *RAISE,
    "fuse-norm",
    LINEARS,
    "annotate{rule=[{match='.*self_attn',kv=mxint4@16}]}",
    "annotate{rule=[{match='.*self_attn',probs=mxint8@16,q=mxint8@16}]}",
    "rotate-residual{block=32}",
    "rotate-value",
    "rotate-qk",
    "transform-inputs{kind=hadamard,block=32}",
    "transform-kv{kind=hadamard,block=16}",
    "online-rotation",
    "expand-attention",
    "scale-channels",
    "permute-channels",
    "insert-fake-quant",
    "quantize-kv-cache",
    "round-weights",
    "fuse-norm-quant",
    "fuse-rope-quant",
    "fuse-activation-quant",
    "fuse-hadamard-quant",
    "lower",
]


def random_pipeline(seed: int) -> str:
    """A shuffled draw; two thirds start with the raise passes, or next to none would get past the first check."""
    random = Random(seed)
    drawn = random.choices(EVERYTHING, k=random.randint(1, 8))
    # Where it makes sense, in the order of a full pipeline: pure chance seldom comes past three passes.
    if random.random() < 0.7:
        drawn.sort(key=EVERYTHING.index)
    return ",".join([*RAISE, *drawn] if random.random() < 0.8 else drawn)


def outcome(program, text: str) -> str:
    pipeline = from_text(text)
    try:
        check_pipeline(program, pipeline)
    except ConfigError as error:
        assert "requires" in str(error) or "must come before" in str(error)
        assert "--passes:1:" in str(error)
        return "refused"
    ids = torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(0))
    manager = PassManager([Numbers(), Verify()])
    result = manager.run(program, pipeline, Context(tokens=lambda: ids), probe=Probe(batch=1, length=8))
    verify(result.program)
    return "ran"


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(30), id="30"),
        *(pytest.param(range(a, a + 50), id=f"{a}-{a + 49}", marks=pytest.mark.thorough) for a in range(30, 530, 50)),
    ],
)
def test_random_pipelines_are_refused_or_keep_their_promises(program, seeds: range) -> None:
    source = program("llama-tiny", "traced")
    found = Counter(outcome(source, random_pipeline(seed)) for seed in seeds)
    assert found["ran"] >= len(seeds) // 5 and found["refused"] >= len(seeds) // 5
