"""``rotation_search_transform_pass``: the search with calibration samples of its own, and its summary."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxfx.compat.emitter import SITES as ALL_MATMUL_TYPES
from mxfx.compat.quantize import device_of, job_of, saveable, say_warnings
from mxfx.compat.table import Table
from mxfx.compat.tutorial import from_pass_args
from mxfx.config import Pipeline
from mxfx.config.locate import Cursor
from mxfx.driver.job import Job, default_instruments
from mxfx.driver.search import Found
from mxfx.export.folder import MxfxForCausalLM
from mxfx.ground.files import read_json, write_json
from mxfx.pipeline.manager import PipelineResult

__all__ = ["ALL_MATMUL_TYPES", "rotation_search_transform_pass"]


def rotation_search_transform_pass(
    network: nn.Module, pass_args: Mapping[str, Any]
) -> tuple[MxfxForCausalLM, dict[str, Any]]:
    """Quantize as ``base_quantize_args`` say, search on ``calib_loader``, emit with what won.

    ``pass_args``: ``base_quantize_args``, ``calib_loader`` (``[(ids, target), …]``, samples of one length), and the
    optional ``device``, ``matmul_types`` (all ten; ``av_matmul`` is never rotated), ``improvement_eps``,
    ``output_json`` (where the summary is written) and ``cache_winners`` (an ``output_json`` of the same program, tokens
    and options is read in place of a search; one of Mase's own is left alone with a warning).

    Returns the emitted model and Mase's summary: ``winners``, ``baseline_ppl``, ``final_ppl``, ``rounds``,
    ``n_trials``, ``per_type_swap_count``, ``improvement_eps``, ``matmul_types_searched``, and ``from_cache`` where a
    file was read. The network given is not changed. Raises ``ConfigError`` before any weight is touched.
    """
    table = Table("pass_args", pass_args, Cursor("pass_args", {}))
    for key in ("base_quantize_args", "calib_loader"):
        if not pass_args.get(key):
            table.fail(key, f"{key} is missing or empty", "the arguments to quantize with, and samples to score on")
    for key in ("base_quantize_args", "calib_loader", "device", "output_json", "cache_winners", "score_phase"):
        table.ignore(key)
    base = pass_args["base_quantize_args"]
    types, eps = table.take("matmul_types", tuple[str, ...]), table.take("improvement_eps", float, 0.0)
    table.close()
    output = pass_args.get("output_json")
    kept = output is not None and bool(pass_args.get("cache_winners", False))
    search: dict[str, Any] = {
        # The samples are given: of no data set of its own.
        "calib_nsamples": 1,
        "calib_seqlen": 1,
        "improvement_eps": eps,
        "cache_winners": kept,
        "score_phase": pass_args.get("score_phase"),
    }
    search |= {} if types is None or set(types) == set(ALL_MATMUL_TYPES) else {"matmul_types": list(types)}
    search |= {"cache_path": str(output)} if kept else {}
    asked = {**base, "rotation_search": {key: value for key, value in search.items() if value is not None}}
    home = next(network.parameters()).device
    device = torch.device(pass_args["device"]) if "device" in pass_args else device_of(base, home)
    pipeline = from_pass_args(asked)
    pipeline = pipeline.emitted(home.type) if device.type == home.type else pipeline
    first, second = _run(network, pipeline, device, _samples(pass_args["calib_loader"]))
    say_warnings([*first.records, *second.records])
    found = Found.of(second)
    results = _summary(found, eps, tuple(types or ALL_MATMUL_TYPES))
    if output is not None:
        _write(Path(output), results, kept)
    return saveable(second, home), results


def _samples(loader: Sequence[Any]) -> Tensor:
    return torch.cat([torch.as_tensor(entry[0]).reshape(1, -1) for entry in loader]).to(torch.int64)


def _run(
    network: nn.Module, pipeline: Pipeline, device: torch.device, tokens: Tensor
) -> tuple[PipelineResult, PipelineResult]:
    """GPTQ has its own calibration set; the search and what follows it read ``tokens``."""
    at = next(i for i, spec in enumerate(pipeline.specs) if spec.name == "rotation-search")
    search = pipeline.specs[at].with_option(("samples",), len(tokens), pipeline.root)
    search = search.with_option(("length",), tokens.shape[1], pipeline.root)
    job = job_of(network, pipeline, device)
    head, tail = pipeline.replace(specs=pipeline.specs[:at]), (search, *pipeline.specs[at + 1 :])
    first = job.run(head, default_instruments(head))
    rest = Job(first.program, device, given=lambda: tokens)
    return first, rest.run(pipeline.replace(specs=tail), default_instruments(pipeline))


def _summary(found: Found, eps: float, types: tuple[str, ...]) -> dict[str, Any]:
    rounds = [
        {
            "round": one.number,
            "committed_before": list(one.rotated),
            "current_ppl_before": one.before,
            "round_ppls": dict(one.tried),
            "selected": one.winner,
            "current_ppl_after": one.after,
            "stopped": one.winner is None,
        }
        for one in found.rounds()
    ]
    summary: dict[str, Any] = {
        "per_type_swap_count": dict(found.nodes),
        "winners": list(found.winners),
        "final_ppl": found.perplexity,
        "rounds": rounds,
        "n_trials": sum(len(one.tried) for one in found.rounds()),
        "baseline_ppl": found.baseline,
        "improvement_eps": eps,
        "matmul_types_searched": list(types),
    }
    return summary | ({"from_cache": True} if found.from_file is not None else {})


def _write(file: Path, results: dict[str, Any], kept: bool) -> None:
    """The summary; in a file that a later search is to read it stands beside what ``rotation-search`` wrote."""
    known: dict[str, Any] = {}
    if kept:
        known = read_json(file)
        if "key" not in known:
            warnings.warn(f"{file} is another tool's and stays as it is: the summary is not written", stacklevel=3)
            return
    write_json(file, known | {key: value for key, value in results.items() if key != "from_cache"})
