"""The error ledger: what every lossy pass costs against the float model, and the budget that stops a run."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mxfx.config.pipeline import BudgetConfig
from mxfx.graph.execute import executable
from mxfx.graph.node import kind, layer_of, path_of
from mxfx.graph.program import Program
from mxfx.ground.errors import CheckError
from mxfx.ops.catalogue import spec
from mxfx.pipeline.manager import Instrument, Run, Step
from mxfx.pipeline.probe import Probe, log_probabilities, mean_kl_of, precision_of_kl, sqnr
from mxfx.rewrite import Close, Lossy

#: Instead of the SQNR of a value that is not finite where the float model's is.
NOT_FINITE = "not finite"
#: The largest number of which Python takes the exponential.
_LARGEST = math.log(sys.float_info.max)


class BudgetError(CheckError, ValueError):
    """A pass lost more than the pipeline's budget allows."""


@dataclass
class Ledger(Instrument):
    """For each lossy pass, against the program that the run started with, on its probe inputs (``findings["ledger"]``):

    ``kl``: mean KL divergence of the next-token distribution, nats. ``sqnr``: of the logits, dB. ``ppl_ratio``:
    perplexity
    of the probe ids over that of the float program. ``layers``: SQNR of the residual stream after each layer, dB.
    ``operands``: SQNR by layer and operand (``q_proj``, ``attention`` …), the data of a heat map. An SQNR is None where
    nothing was lost, and ``NOT_FINITE`` where a value is not.

    ``budget`` stops the run with ``BudgetError``. Programs without data (meta) are not measured, and the finding
    says so.
    """

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    _reference: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _logits: Tensor | None = field(default=None, repr=False)
    _log_p: Tensor | None = field(default=None, repr=False)
    _reason: str | None = field(default=None, repr=False)

    def enter(self, run: Run) -> None:
        self._logits = self._log_p = None
        self._reference.clear()
        self._reason = executable(run.source)

    def exit(self, run: Run) -> None:
        self._logits = self._log_p = None
        self._reference.clear()

    def before(self, step: Step) -> None:
        """Record the float program right before the first lossy pass: raised, not yet rounded, so that names agree."""
        if self._logits is None and self._reason is None and isinstance(step.pass_.numerics, Lossy):
            self._logits, self._reference = residual_stream(step.before, step.run.probe)

    def after(self, step: Step) -> None:
        if not isinstance(step.pass_.numerics, Lossy):
            if step.changed and isinstance(step.pass_.numerics, Close):
                # A rotation after the first rounding: inner values are in another basis than those recorded.
                self._reference.clear()
            return
        if self._logits is None:
            step.findings["ledger"] = {"unmeasured": self._reason or "no float program was recorded"}
            return
        assert step.after is not None
        reason = executable(step.after)
        if reason is not None:
            step.findings["ledger"] = {"unmeasured": reason}
            return
        logits, values = residual_stream(step.after, step.run.probe)
        entry = self._entry(logits, values, step.run.probe.tokens(step.after))
        step.findings["ledger"] = entry
        self._hold(step, entry)

    def _entry(self, logits: Tensor, values: dict[str, Tensor], ids: Tensor) -> dict[str, object]:
        assert self._logits is not None
        wide = precision_of_kl(logits, self._logits)
        if self._log_p is None or self._log_p.dtype != wide:
            self._log_p = log_probabilities(self._logits, wide)
        log_q = log_probabilities(logits, wide)
        more = _cross_entropy(log_q, ids) - _cross_entropy(self._log_p, ids)
        ratio = math.inf if more > _LARGEST else math.exp(more)
        common = {n: sqnr(v, self._reference[n]) for n, v in values.items() if _comparable(self._reference.get(n), v)}
        return {
            "kl": mean_kl_of(log_q, self._log_p),
            "sqnr": _figure(sqnr(logits, self._logits)),
            "ppl_ratio": ratio,
            "layers": {n.split("/")[0]: _figure(db) for n, db in common.items() if n.endswith("/residual")},
            "operands": {n: _figure(db) for n, db in common.items() if not n.endswith("/residual")},
        }

    def _hold(self, step: Step, entry: dict[str, object]) -> None:
        limits = {
            "max_kl": (self.budget.max_kl, entry["kl"]),
            "max_ppl_ratio": (self.budget.max_ppl_ratio, entry["ppl_ratio"]),
        }
        for name, (limit, value) in limits.items():
            if limit is not None and not value <= limit:
                raise BudgetError(
                    f"{step.title} leaves {name[4:]} {value:.4g} on the probe inputs, "
                    f"the budget allows {name} = {limit:g}; "
                    "raise the budget, or find the loss with `mxfx bisect`"
                )


def residual_stream(program: Program, probe: Probe) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and values by ``layer/operand``: results of linears and attention, and the residual stream after
    a layer.
    """
    values: dict[str, Tensor] = {}
    wanted = _labels(program)

    def observe(node: fx.Node, value: object) -> object:
        if node.name in wanted and isinstance(value, Tensor):
            values[wanted[node.name]] = value
        return value

    return probe.run(program, observe=observe), values


def _labels(program: Program) -> dict[str, str]:
    """Node name → ``layer/operand``; the last sum of a layer's own module path is its residual stream."""
    labels: dict[str, str] = {}
    residual: dict[int, str] = {}
    for node in program.graph.nodes:
        layer = layer_of(node)
        if layer is None:
            continue
        name = _label(node)
        if name:
            labels[node.name] = f"{layer}/{name}"
        if node.target is torch.ops.aten.add.Tensor and _path_is_layer(node):
            residual[layer] = node.name
    return labels | {name: f"{layer}/residual" for layer, name in residual.items()}


def _label(node: fx.Node) -> str:
    if spec(node).product is not None:
        return path_of(node).rsplit(".", 1)[-1]
    return "attention" if kind(node) in ("attention", "attend") else ""


def _path_is_layer(node: fx.Node) -> bool:
    return path_of(node).rsplit(".", 1)[-1].isdigit()


def _comparable(reference: Tensor | None, value: Tensor) -> bool:
    return reference is not None and reference.shape == value.shape


def _cross_entropy(log_probabilities: Tensor, ids: Tensor) -> float:
    """Mean negative log-likelihood of the next token, nats."""
    return -float(log_probabilities[:, :-1].gather(-1, ids[:, 1:, None]).mean(dtype=torch.float64))


def _figure(db: float) -> float | str | None:
    """JSON has no infinity: None for equal tensors, which have no noise to speak of."""
    return db if math.isfinite(db) else None if db > 0 else NOT_FINITE
