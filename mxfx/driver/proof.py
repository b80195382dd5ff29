"""Is what was saved what was measured? The artefact is loaded from its files, run on the probe, compared bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mxfx.config.emit import EmitConfig
from mxfx.export.artefact import load
from mxfx.graph.execute import execute
from mxfx.graph.feed import Feed
from mxfx.graph.module import build
from mxfx.graph.phases import entries
from mxfx.graph.program import Program
from mxfx.ground import ranks
from mxfx.ground.errors import CheckError
from mxfx.ops.kernels.packed import inexact_count
from mxfx.pipeline.emit import emitted


class ProofError(CheckError, ValueError):
    """A saved model does not run, or computes something else than the model that was measured."""


def logits_of(program: Program, ids: Tensor, device: torch.device, *, whole: bool = True) -> dict[str, Tensor]:
    """``(batch, seq, vocabulary)`` of the module that a lowered program is built into, or of the program in pieces; of
    each phase, by its name.
    """
    found = entries(program)
    if not whole:
        return {phase: _in_pieces(one, ids.to(device)) for phase, one in found.items()}
    with torch.no_grad():
        return {phase: build(one).to(device)(ids.to(device)) for phase, one in found.items()}


def _in_pieces(program: Program, ids: Tensor) -> Tensor:
    with closing(Feed(program, ids.device)) as feed:
        return execute(program, ids, feed=feed)


def check_saved(
    folder: Path,
    expected: dict[str, Tensor],
    ids: Tensor,
    device: torch.device,
    settings: EmitConfig,
    *,
    files: Path | None = None,
) -> None:
    """Raise ``ProofError`` unless the model saved in ``folder``, emitted again, gives the bits of ``expected``.

    With ``files``, a folder, it runs in pieces, as ``expected`` did, and what emitting makes of its weights lies there.
    """
    try:
        saved = load(folder)
        if files is not None:
            for one in entries(saved).values():
                one.weights.keep_in_files(files)
        found = logits_of(emitted(saved, device, settings), ids, device, whole=files is None)
    except Exception as error:
        raise ProofError(f"the model saved in {folder} does not run: {type(error).__name__}: {error}") from error
    if found.keys() != expected.keys():
        raise ProofError(f"the model saved in {folder} is not the one that was measured: it has other phases")
    for phase, wanted in expected.items():
        _check_bits(f"{folder}, {phase}" if phase else str(folder), found[phase], wanted)


def _check_bits(what: str, found: Tensor, expected: Tensor) -> None:
    different = int((_bits(found) != _bits(expected)).sum()) if found.shape == expected.shape else -1
    if different:
        raise ProofError(
            f"the model saved in {what} is not the one that was measured: "
            f"{different if different > 0 else 'all'} of {expected.numel()} logits of the probe differ"
        )


def not_finite(logits: Tensor) -> str | None:
    """What is wrong with logits that hold NaN or Inf; None if nothing is."""
    broken = int((~logits.isfinite()).sum())
    return f"{broken} of {logits.numel()} logits of the probe are NaN or infinite" if broken else None


def _bits(x: Tensor) -> Tensor:
    """Integers with the same bits: NaNs compare, and signed zeros differ."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@contextmanager
def inexact_told(warnings: list[str]) -> Iterator[None]:
    """Add a warning of the rows that had to be rounded to E4M3 or int8 meanwhile, by all processes of a run."""
    before = inexact_count()
    yield
    if beyond := sum(ranks.collected(inexact_count() - before)):
        warnings.append(
            f"{beyond} rows of activations span more octaves than E4M3, or int8, is sure to hold: their least were "
            "rounded"
        )
