"""Probe inputs that all instruments of a run share, and distances between the logits of two programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxfx.graph.execute import Observer
from mxfx.graph.node import kind
from mxfx.graph.program import Program
from mxfx.graph.replay import Replay


@dataclass
class Probe:
    """A few token ids, and the logits of the programs that were asked for last.

    ``batch`` × ``length`` random ids unless ``ids`` (int64 ``(batch, seq)``) are given. What one program computed is
    not computed again for the next: the program after one pass is the program before the next, and a pass leaves most
    of it as it was.
    """

    seed: int = 0
    batch: int = 2
    length: int = 16
    ids: Tensor | None = None
    _known: list[tuple[Program, Tensor]] = field(default_factory=list, repr=False)
    _replay: Replay = field(default_factory=Replay, repr=False)

    def tokens(self, program: Program) -> Tensor:
        """int64 ``(batch, seq)`` on the device of the program's weights."""
        if self.ids is None:
            generator = torch.Generator().manual_seed(self.seed)
            self.ids = torch.randint(vocabulary(program), (self.batch, self.length), generator=generator)
        device = next((t.device for t in program.weights.values()), torch.device("cpu"))
        if self.ids.device != device:
            self.ids = self.ids.to(device)
        return self.ids

    def run(
        self, program: Program, *, observe: Observer | None = None, twins: Mapping[str, str] | None = None
    ) -> Tensor:
        """Logits ``(batch, seq, vocabulary)`` in the program's dtype; see ``Replay.run``. Raises ``ValueError`` for a
        program on the meta device.
        """
        logits = self._replay.run(program, self.tokens(program), observe=observe, twins=twins)
        if observe is None:
            self._known = [*self._known[-1:], (program, logits)]
        return logits

    def logits(self, program: Program) -> Tensor:
        """``run``, once for each of the last two programs."""
        known = next((logits for known, logits in self._known if known is program), None)
        return self.run(program) if known is None else known


def vocabulary(program: Program) -> int:
    """Number of token ids that the program's embedding knows. Raises ``ValueError`` if it has none."""
    for node in program.graph.nodes:
        if kind(node) == "embedding":
            return int(node.args[0].meta["val"].shape[0])
    raise ValueError("the program has no embedding, so there are no token ids to probe it with")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖_F / ‖expected‖_F in float64; infinite if either is not finite where the other is."""
    a, b = actual.double(), expected.double()
    error = float((a - b).norm() / b.norm().clamp_min(1e-300))
    if math.isfinite(error):
        return error
    same = torch.isfinite(a) == torch.isfinite(b)
    if not bool(same.all()):
        return math.inf
    a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    return float((a - b).norm() / b.norm().clamp_min(1e-300)) if bool((a != b).any()) else 0.0


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal to quantization noise in dB: 20·log10(‖expected‖ / ‖actual − expected‖); infinite for equal tensors."""
    error = relative_error(actual, expected)
    return math.inf if error == 0 else -math.inf if error == math.inf else -20 * math.log10(error)


def mean_kl(actual: Tensor, expected: Tensor) -> float:
    """Mean KL(expected ‖ actual) of the next-token distributions in nats, over logits ``(batch, seq, vocabulary)``."""
    wide = precision_of_kl(actual, expected)
    return mean_kl_of(log_probabilities(actual, wide), log_probabilities(expected, wide))


def precision_of_kl(*logits: Tensor) -> torch.dtype:
    """A half-precision logit carries 8 to 11 bits: float32 is exact enough for it, in half the time."""
    halves = all(each.dtype.itemsize == 2 for each in logits)
    return torch.float32 if halves else torch.float64


def log_probabilities(logits: Tensor, wide: torch.dtype) -> Tensor:
    return torch.log_softmax(logits.to(wide), -1)


def mean_kl_of(q: Tensor, p: Tensor) -> float:
    """``mean_kl`` of log-probabilities."""
    return float((p.exp() * (p - q)).sum(-1, dtype=torch.float64).mean().clamp_min(0))
