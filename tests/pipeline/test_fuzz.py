"""Random pipelines: refused before they start, or every promise is kept and what is saved gives the same bits."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from mxfx.config import ConfigError, Pipeline, from_text
from mxfx.driver.check import refuse_hopeless
from mxfx.driver.proof import check_saved, logits_of
from mxfx.export.folder import save_folder
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.graph.verify import verify
from mxfx.graph.weights import UnknownWeight
from mxfx.ground.errors import MxfxError
from mxfx.ops.catalogue import spec
from mxfx.pipeline.instruments import Numbers, Verify
from mxfx.pipeline.manager import PassError, PassManager, check_pipeline
from mxfx.pipeline.probe import Probe, relative_error
from mxfx.rewrite import Context
from mxfx.runtime.causal_lm import as_causal_lm
from tests.architectures import build
from tests.pipeline import random_pipelines

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


#: Plain, normed queries, windows and sandwiched norms, fused projections, Conv1D and learned positions, parallel layers
#: with partial RoPE, interleaved RoPE and LayerNorm, experts, sinks with stacked experts, latent attention.
FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "cohere", "mixtral", "gpt_oss", "deepseek_v3")
_CALIBRATION = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))


@cache
def traced(family: str, dtype: torch.dtype) -> Program:
    return trace(build(family).to(dtype))


def end(seed: int, folder: Path) -> tuple[str, str]:
    """What became of a random pipeline: ``refused`` before it starts, ``stopped`` by a pass with a reason, ``ran``.

    What ran is saved, opened again and compared, logits bit by bit; a third also through its cache and behind
    padding.
    """
    program = traced(FAMILIES[seed % len(FAMILIES)], torch.bfloat16 if seed % 7 == 0 else torch.float32)
    try:
        pipeline = from_text(random_pipelines.random_pipeline(seed)).completed().emitted("cpu")
        check_pipeline(program, pipeline)
        head = _up_to_rules(pipeline)
        annotated = PassManager().run(program, pipeline.replace(specs=head)).program
        refuse_hopeless(pipeline, annotated, len(head))
    except (ConfigError, PassError) as error:
        return "refused", _shortly(error)
    ctx = Context(tokens=lambda: _CALIBRATION, cache=folder / "cache")
    ids = _CALIBRATION[:2, :12]
    try:
        result = PassManager([Numbers(), Verify()]).run(program, pipeline, ctx, probe=Probe(ids=ids))
    except PassError as error:
        cause = error.__cause__
        assert isinstance(cause, MxfxError | ValueError) and not isinstance(cause, UnknownWeight), error
        return "stopped", _shortly(error)
    logits = logits_of(result.program, ids, torch.device("cpu"))
    assert all(one.isfinite().all() for one in logits.values()), "an emitted model of a finite one gives NaN or Inf"
    save_folder(result.portable, folder / "model")
    check_saved(folder / "model", logits, ids, torch.device("cpu"), pipeline.emit)
    # Another lowering, as dear as all that was before it.
    if seed % 3 == 0:
        for way, error in _otherwise(result.portable, ids).items():
            assert error < 1e-6, f"{way} it gives other logits: {error:.1e}"
    return "ran", ""


def _otherwise(program: Program, ids: Tensor) -> dict[str, float]:
    """How far logits that are computed another way are from those of one call, in float64: roundings seldom flip.

    They do at a tie, which numbers of few bits make likely. So the nearer of the rows counts.
    """
    model = as_causal_lm(program.twin(torch.float64))
    # The scale that NVFP4 has for a whole tensor is that of the call: a chunk has another one.
    if any("nvfp4" in str(node.args) for node in program.graph.nodes if spec(node).rounds):
        return {}
    whole = model(ids, use_cache=False).logits
    found = {}
    if model.specs:
        start = model(ids[:, :7], use_cache=True)
        rest = model(ids[:, 7:], past_key_values=start.past_key_values).logits
        found["through its cache"] = _of_nearer_row(torch.cat([start.logits, rest], 1), whole)
    # Blocks of scores and probabilities lie along the keys, and padding moves them.
    if "attention-expanded" not in program.facts:
        padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
        mask = (torch.arange(padded.shape[1]) >= 3).long().expand(padded.shape)
        alone = model(padded, attention_mask=mask, use_cache=False).logits[:, 3:]
        found["behind padding"] = _of_nearer_row(alone, whole)
    return found


def _of_nearer_row(actual: Tensor, expected: Tensor) -> float:
    return min(relative_error(a, b) for a, b in zip(actual, expected, strict=True))


def _up_to_rules(pipeline: Pipeline) -> tuple:
    """What ``mxfx check`` runs before weights are read."""
    last = max((i for i, spec in enumerate(pipeline.specs) if spec.name == "annotate"), default=-1)
    return pipeline.specs[: last + 1]


def _shortly(error: Exception) -> str:
    """The reason without names and numbers, so that alike ones count together."""
    return re.sub(r"[\d.]+", "N", str(error).splitlines()[0])[:160]


@pytest.mark.parametrize(
    "seeds",
    [
        # Each family twice, in the order of FAMILIES.
        pytest.param(range(20), id="20"),
        *(pytest.param(range(a, a + 25), id=f"{a}-{a + 24}", marks=pytest.mark.thorough) for a in range(20, 2000, 25)),
    ],
)
def test_random_pipelines_over_ten_families_are_refused_or_give_the_same_bits_again(
    seeds: range, tmp_path: Path
) -> None:
    found: Counter[str] = Counter()
    for seed in seeds:
        try:
            found[end(seed, tmp_path / str(seed))[0]] += 1
        except Exception as error:
            text = random_pipelines.random_pipeline(seed)
            raise AssertionError(f"seed {seed}, {FAMILIES[seed % len(FAMILIES)]}: {text}") from error
        shutil.rmtree(tmp_path / str(seed), ignore_errors=True)
    assert found["ran"] >= len(seeds) // 3, found
