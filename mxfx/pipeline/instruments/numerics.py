"""The promises of passes, enforced: ``Exact`` by bits, ``Close`` on the float64 twin, ``Local`` region by region."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from mxfx.graph.execute import CastCache, executable, execute
from mxfx.graph.node import op_name, path_of
from mxfx.graph.program import Program
from mxfx.graph.replay import bits
from mxfx.ground.errors import CheckError
from mxfx.ops.catalogue import spec
from mxfx.pipeline.manager import Instrument, Step
from mxfx.pipeline.probe import relative_error
from mxfx.rewrite import Close, Exact, Lossy, apply

_fake_quantize = torch.ops.mxfx.fake_quantize.default

#: What float32 masters allow where a pass cannot be repeated on the twin: a chain of products, each rounded at 6e-8.
MASTER_TOLERANCE = 1e-4

#: Relative difference below which two rounded numbers have one code: NVFP4's scale of a whole tensor moves all of them
#: by a unit in the last place, and codes of no format are as near.
_ONE_CODE = 1e-4
#: Tokens of each row that float64 twins read: they show whether two functions are one, not how a model does.
_TWIN_TOKENS = 16
#: Bytes of float64 weights that twins share: what a pass left alone is cast once for both.
_CASTS = 1 << 30
#: What is left of a block in which everything cancels, as a part of the tensor's largest number.
_NOTHING = 1e-6


class NumericsError(CheckError, ValueError):
    """A pass broke its promise about numbers; the message names the pass and the first node that differs."""


@dataclass
class Numbers(Instrument):
    """Hold each pass to its promise on the run's probe inputs; results in ``findings["numerics"]``.

    ``max_parameters`` keeps the check cheap: beyond it a ``Close`` promise, which needs the weights in float64, and a
    ``Local`` one, which records values, are not checked, and the finding says so. None checks whatever the size.
    """

    max_parameters: int | None = 300_000_000
    _tokens_asked: bool = field(default=False, repr=False)

    def before(self, step: Step) -> None:
        self._tokens_asked = False
        if not isinstance(step.pass_.numerics, Close):
            return
        step.ctx = replace(step.ctx, tokens=self._noticed(step.ctx.tokens), read=self._noticed(step.ctx.read))

    def _noticed(self, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def asked(*wanted: Any) -> Tensor:
            self._tokens_asked = True
            return inner(*wanted)

        return asked

    def after(self, step: Step) -> None:
        step.findings["numerics"] = self._check(step)

    def _check(self, step: Step) -> dict[str, object]:
        promise = step.pass_.numerics
        said = {"promise": type(promise).__name__.lower()}
        if isinstance(promise, Lossy):
            return said
        reason = self._unchecked(step)
        if reason is not None:
            return {**said, "unchecked": reason}
        assert step.after is not None
        if same_computation(step.before, step.after):
            return {**said, "error": 0.0}
        if isinstance(promise, Exact):
            return {**said, **check_exact(step)}
        if isinstance(promise, Close):
            return {**said, **check_close(step, promise.tol, repeat=not self._tokens_asked)}
        return {**said, **check_local(step, promise.tol)}

    def _unchecked(self, step: Step) -> str | None:
        assert step.after is not None
        reason = executable(step.before) or executable(step.after)
        if reason is not None or isinstance(step.pass_.numerics, Exact) or self.max_parameters is None:
            return reason
        parameters = sum(t.numel() for t in step.before.weights.values())
        if parameters > self.max_parameters:
            return f"{parameters:,} parameters; checked up to {self.max_parameters:,} unless asked for"
        return None


def check_exact(step: Step) -> dict[str, object]:
    """Bit-equal logits before and after. Raises ``NumericsError``."""
    assert step.after is not None
    probe = step.run.probe
    before = probe.logits(step.before)
    after = probe.run(step.after, twins={name: old.name for name, old in _anchors(step.before, step.after).items()})
    if before.dtype != after.dtype or not torch.equal(bits(before), bits(after)):
        raise _broken(
            step,
            f"promises bit-equal logits; they differ by {relative_error(after, before):.3g} of their norm",
            _first_difference(step.before, step.after, probe.tokens(step.before), 0.0),
        )
    return {"error": 0.0}


def same_computation(before: Program, after: Program) -> bool:
    """Whether both graphs are the same calls, node by node, on the same tensors: only records and facts differ."""
    if before.dtype != after.dtype or len(before.graph.nodes) != len(after.graph.nodes):
        return False
    pairs = dict(zip(after.graph.nodes, before.graph.nodes, strict=True))
    for new, old in pairs.items():
        if (new.op, new.target) != (old.op, old.target):
            return False
        if new.op == "get_attr" and before.weights[str(old.target)] is not after.weights[str(new.target)]:
            return False
        mine = fx.map_arg((new.args, new.kwargs), pairs.__getitem__)
        # As text too: 2 and 2.0 are equal and promote to other dtypes.
        if mine != (old.args, old.kwargs) or repr(mine) != repr((old.args, old.kwargs)):
            return False
    return True


def check_close(step: Step, tol: float, *, repeat: bool = True) -> dict[str, object]:
    """The programs as real functions agree on the float64 twin to ``tol``. Raises ``NumericsError``.

    The pass is run on the twin (``repeat``); a pass that looks at calibration data is not run twice: its float32
    masters are compared, to no less than ``MASTER_TOLERANCE``. Quantizers are read as the identity.
    """
    assert step.after is not None
    if "lowered" in step.before.facts:
        return {"unchecked": "the program is lowered: its dtypes are fixed, so it has no float64 twin"}
    if repeat:
        before = step.before.twin(torch.float64)
        after = apply(step.pass_, before, step.run.ctx, limit=step.limit).program
    else:
        before, after, tol = _wide(step.before), _wide(step.after), max(tol, MASTER_TOLERANCE)
    ids = step.run.probe.tokens(step.before)[:, :_TWIN_TOKENS]
    casts = CastCache(_CASTS)
    expected, actual = (execute(p, ids, quantize=False, casts=casts) for p in (before, after))
    error = relative_error(actual, expected)
    if not error <= tol:
        raise _broken(
            step,
            f"promises the same real function to {tol:g}; "
            f"on the float64 twin the logits differ by {error:.3g} of their norm",
            _first_difference(before, after, ids, max(tol, 1e-12), quantize=False),
        )
    return {
        "error": error,
        "tolerance": tol,
        "on": "float64 twin" if repeat else "float32 masters (data-aware pass)",
    }


def _wide(program: Program) -> Program:
    """The program's float64 twin, whose weights are brought to float64 when they are read."""
    wide = program.copy()
    wide.dtype = torch.float64
    return wide


def check_local(step: Step, tol: float) -> dict[str, object]:
    """Each rewritten region agrees with its original on recorded inputs. Raises ``NumericsError``.

    Values that both graphs compute under one name end the regions: each is computed by the new graph from the *old*
    graph's values, compared, and then replaced by the old value, so that one flipped code does not spread. Where the
    old operand is quantized, differing elements are counted as flipped codes, and at most the share ``tol`` may flip.
    """
    assert step.after is not None
    probe = step.run.probe
    recorded: dict[str, object] = {}
    probe.run(step.before, observe=lambda node, value: recorded.setdefault(node.name, value))
    anchors = _anchors(step.before, step.after)
    worst, where, flipped, codes = 0.0, "", 0, 0

    def compare(node: fx.Node, value: object) -> object:
        nonlocal worst, where, flipped, codes
        anchor = anchors.get(node.name)
        if anchor is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        old = recorded[anchor.name]
        if not isinstance(old, Tensor) or old.shape != value.shape:
            return value
        if value is old:
            # Not computed again, or to the same bits.
            codes += old.numel() if anchor.target is _fake_quantize else 0
            return old
        if anchor.target is _fake_quantize:
            near = (_ONE_CODE * old.abs()).clamp_min(_NOTHING * _largest(old))
            same = (value == old) | (value.isnan() & old.isnan()) | ((value - old).abs() <= near)
            different = ~same
            flipped, codes = flipped + int(different.sum()), codes + old.numel()
            error = float(different.double().mean())
        else:
            error = relative_error(value, old)
        if not error <= tol:
            what = f"{error:.2%} of its codes flipped" if anchor.target is _fake_quantize else f"off by {error:.3g}"
            raise _broken(step, f"promises regions equal to {tol:g} on recorded inputs", _place(node, what))
        if error > worst:
            worst, where = error, node.name
        return old

    probe.run(step.after, observe=compare, twins={name: old.name for name, old in anchors.items()})
    return {
        "error": worst,
        "tolerance": tol,
        "at": where,
        "regions": len(anchors),
        "flipped": flipped,
        "codes": codes,
    }


def _largest(x: Tensor) -> float:
    """The largest finite magnitude; 0 of nothing."""
    return float(x.abs().nan_to_num(0.0, 0.0).max()) if x.numel() else 0.0


def _anchors(before: Program, after: Program) -> Mapping[str, fx.Node]:
    """Name of a node of ``after`` → the node of ``before`` that computes the same value."""
    old = {n.name: n for n in before.graph.nodes}
    pairs: dict[str, fx.Node] = {}
    for node in after.graph.nodes:
        twin = old.get(node.name)
        if node.op == "output":
            twin = next(n for n in before.graph.nodes if n.op == "output")
        if twin is None or twin.op != node.op or (node.op != "output" and twin.target is not node.target):
            continue
        if node.op == "call_function":
            pairs[node.name] = twin
        for mine, theirs in zip(node.args, twin.args, strict=False):
            # An operand that was rewritten under another name still ends a region if its reader stands in both graphs.
            if isinstance(mine, fx.Node) and isinstance(theirs, fx.Node) and theirs.op == "call_function":
                pairs.setdefault(mine.name, theirs)
    rounding = [[n for n in graph.nodes if spec(n).rounds is not None] for graph in (before.graph, after.graph)]
    if [spec(n).rounds for n in rounding[0]] == [spec(n).rounds for n in rounding[1]]:
        # Lowered or fused under other names, but quantizer for quantizer the same.
        for theirs, mine in zip(*rounding, strict=True):
            pairs.setdefault(mine.name, theirs)
    return pairs


def _first_difference(before: Program, after: Program, ids: Tensor, tol: float, quantize: bool = True) -> str:
    """The first node with the same name in both programs whose value differs by more than ``tol``.

    A node that another weight or constant was given to may rightly compute something else (a norm without its gain):
    it is named only if no node that is the same call in both graphs differs.
    """
    recorded: dict[str, object] = {}
    execute(before, ids, observe=lambda node, value: recorded.setdefault(node.name, value), quantize=quantize)
    calls = {node.name: _call(node) for node in before.graph.nodes}
    found: dict[bool, str] = {}

    def compare(node: fx.Node, value: object) -> object:
        old, same = recorded.get(node.name), calls.get(node.name) == _call(node)
        comparable = isinstance(value, Tensor) and isinstance(old, Tensor) and old.shape == value.shape
        if same not in found and comparable and value.is_floating_point():
            error = relative_error(value, old)
            if error > tol:
                found[same] = _place(node, f"off by {error:.3g}")
        return value

    execute(after, ids, observe=compare, quantize=quantize)
    return found.get(True) or found.get(False) or "no node of the same name in both graphs differs"


def _call(node: fx.Node) -> tuple:
    """A call without the computed values that it reads: target, constants, names of weights."""

    def named(operand: fx.Node) -> object:
        return f"@{operand.target}" if operand.op == "get_attr" else "%"

    return node.target, str(fx.map_arg((node.args, node.kwargs), named))


def _place(node: fx.Node, what: str) -> str:
    return f"{node.name} = {op_name(node)} in {path_of(node) or 'the top level'} ({what})"


def _broken(step: Step, promise: str, first: str) -> NumericsError:
    return NumericsError(f"{step.title} {promise}; first difference: {first}")


__all__ = ["Numbers", "NumericsError", "check_close", "check_exact", "check_local"]
