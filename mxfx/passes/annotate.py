"""``annotate``: say which operand is to be in which format."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

from torch import fx

from mxfx.formats import Format
from mxfx.graph.node import Annotation, info, kind, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.rewrite import ALL, Context, Exact, ExpectationError, Numerics, Pass, Rewriter, Selector, register
from mxfx.rewrite.expect import check, evaluate
from mxfx.rewrite.facts import (
    ACTIVATIONS_QUANTIZED,
    ANNOTATED,
    ATTENTION_EXPANDED,
    KV_QUANTIZED,
    LOWERED,
    RAISED,
    WEIGHTS_ROUNDED,
    Fact,
    Selected,
)
from mxfx.rewrite.roles import role_of, roles_remembered
from mxfx.rewrite.size import left_out

_KEYS = ("weight", "bias", "input", "output", "q", "k", "v", "kv", "probs", "softmax", "rope")


@dataclass(frozen=True)
class Rule:
    """One rule: nodes whose module path matches ``match`` get the formats named.

    role: what the node does in its layer, by the dataflow (``q_proj``, ``down_proj``, ``mlp``; see
        ``mxfx.rewrite.roles``), or several, after commas. A router is taken only by a rule that speaks of nothing else.
    layers: decoder layers, as in ``0-3, -1``; negative ones count from the end.
    except: a regular expression; nodes whose whole module path matches it are left out.
    type: concepts of nodes, such as ``linear`` or ``expert_linear``, after commas.

    ``weight``, ``bias``, ``input``, ``output`` speak of linears (and norms, embeddings, activations); ``q``, ``k``,
    ``v``, ``kv`` (k and v), ``softmax`` (the scores before the softmax), ``probs`` (after it) speak of attention;
    ``rope`` of the rotary embedding's cosines and sines. ``expect`` is integer arithmetic over ``layers``: the number
    of nodes that must match.

    match: module paths, as a regular expression of the whole path.
    weight: of linears, norms and embeddings, along their inputs.
    bias: of linears.
    input: of linears, norms and activations.
    output: of the same, and of embeddings.
    q: queries, of attention.
    k: keys, as a cache holds them.
    v: values, as a cache holds them.
    kv: keys and values alike.
    softmax: scores before the softmax.
    probs: probabilities after it.
    rope: cosines and sines of the rotary embedding.
    expect: how many nodes must match, in integer arithmetic over ``layers``.
    """

    match: Selector = field(default=ALL)
    role: str = ""
    layers: str = ""
    except_: str = ""
    type: str = ""
    weight: Format | None = None
    bias: Format | None = None
    input: Format | None = None
    output: Format | None = None
    q: Format | None = None
    k: Format | None = None
    v: Format | None = None
    kv: Format | None = None
    softmax: Format | None = None
    probs: Format | None = None
    rope: Format | None = None
    expect: str | None = None

    def __post_init__(self) -> None:
        if not self.formats():
            raise ValueError(f"the rule for {str(self.where)!r} names no format; give one of {', '.join(_KEYS)}")
        _ = self.where
        if self.kv is not None and (self.k is not None or self.v is not None):
            raise ValueError("'kv' speaks of k and v; give kv alone or k and v")
        if self.expect is not None:
            check(self.expect)

    @cached_property
    def where(self) -> Selector:
        """What the rule speaks of, all keys together."""
        return self.match.narrowed(role=self.role, layers=self.layers, excluded=self.except_, type=self.type)

    def formats(self) -> dict[str, Format]:
        """The keys that are set, in the order of the fields."""
        return {key: fmt for key in _KEYS if (fmt := getattr(self, key)) is not None}


@register
@dataclass(frozen=True)
class Annotate(Pass):
    """Put formats on operands; nothing is quantized yet. For each operand the first rule that matches wins.

    Before::

        %y = linear(%x, @model.layers.0.mlp.up_proj.weight)

    After::

        %y = linear(%x, @model.layers.0.mlp.up_proj.weight)  {weight: mxint4@32, input: mxint4@32}

    A rule that matches another number of nodes than its ``expect`` is an error. One that matches nothing is an error,
    with ``unmatched = "warn"`` a warning.
    A format that no pass behind it rounds to is a warning.
    A pipeline whose rules leave out a tenth of the weights that its layers multiply by is warned; ``partial`` says that
    this is meant.

    rule: rules in order; for each operand the first that matches wins.
    partial: no warning for weights that no rule speaks of.
    unmatched: what a rule that matches nothing is, an error or a warning.
    """

    name: ClassVar[str] = "annotate"
    requires: ClassVar[frozenset[Fact]] = frozenset({RAISED})
    provides: ClassVar[frozenset[Fact]] = frozenset({ANNOTATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, LOWERED})
    expects: ClassVar[frozenset[Fact]] = frozenset(
        {WEIGHTS_ROUNDED, ACTIVATIONS_QUANTIZED, KV_QUANTIZED, ATTENTION_EXPANDED}
    )
    numerics: ClassVar[Numerics] = Exact()
    by_phase: ClassVar[bool] = True
    rule: tuple[Rule, ...] = ()
    partial: bool = False
    unmatched: Literal["error", "warn"] = "error"

    def run(self, rw: Rewriter, ctx: Context) -> None:
        with roles_remembered(rw.graph):
            self._annotate(rw, ctx)

    def _annotate(self, rw: Rewriter, ctx: Context) -> None:
        for index, rule in enumerate(self.rule, start=1):
            place = ctx.where(("rule", index - 1))
            count = self._apply(rw, rule, f"annotate rule {index}" + (f" ({place})" if place else ""))
            _check_count(rw, rule, index, count, self.unmatched)
        left = None if self.partial or rw.record.limited else left_out(rw.program)
        if left is not None:
            rw.warn(left)

    def selects(self, node: fx.Node) -> bool:
        takes = any(_operands(rule, node) and rule.where(node) for rule in self.rule)
        return takes and role_of(node) != "router"

    def _apply(self, rw: Rewriter, rule: Rule, by: str) -> int:
        wanted_of = {node: _operands(rule, node) for node in rw.program.nodes()}
        found = [(node, wanted) for node, wanted in wanted_of.items() if wanted and rule.where(node)]
        routers = {node for node, _ in found if role_of(node) == "router"}
        count = 0
        for node, wanted in found:
            if node in routers and len(routers) < len(found):
                rw.skip(node, 'a router stays float; a rule with role = "router" takes it', rule=by)
                continue
            count += 1
            fresh = {o: f for o, f in wanted.items() if o not in info(node).formats}
            if not fresh:
                rw.skip(node, "an earlier rule set these operands", rule=by)
            elif rw.match(node, note=", ".join(f"{o}={f}" for o, f in fresh.items()), rule=by):
                _set(rw, node, fresh, by)
        return count


def _operands(rule: Rule, node: fx.Node) -> dict[str, Format]:
    """The operands of ``node`` that the rule's keys speak of, with their formats; of two keys the later one counts."""
    carries = spec(node).carries
    wanted = {operand: fmt for key, fmt in rule.formats().items() for operand in _meant(key, node)}
    return {operand: fmt for operand, fmt in wanted.items() if operand in carries}


def _meant(key: str, node: fx.Node) -> tuple[str, ...]:
    """The names of operands that a key stands for: its own, but for two that are shorter to write."""
    if key == "kv":
        return ("k", "v")
    if key == "rope":
        return ("cos", "sin") if kind(node) == "rope" else ()
    return (key,)


def _set(rw: Rewriter, node: fx.Node, formats: dict[str, Format], by: str) -> None:
    record = info(node)
    for operand, fmt in formats.items():
        record = record.with_format(operand, Annotation(fmt, by))
    rw.set_info(node, record)


def _check_count(rw: Rewriter, rule: Rule, index: int, count: int, unmatched: str) -> None:
    expected = None if rule.expect is None else evaluate(rule.expect, layers=rw.program.layers)
    if expected is not None and count != expected:
        raise ExpectationError(
            f"annotate rule {index}: match {str(rule.where)!r} fits {count} nodes, "
            f"expect = {rule.expect!r} asks for {expected} (layers = {rw.program.layers})",
            rule=index,
        )
    if count == 0 and not rw.record.limited:
        hint = rule.where.hint(n for n in rw.program.nodes() if _operands(rule, n))
        problem = (
            f"annotate rule {index}: match {str(rule.where)!r} fits no node that has {' or '.join(rule.formats())}; "
            + (hint or "none: the model has no such operand")
        )
        if unmatched == "error":
            raise ExpectationError(problem, rule=index)
        rw.warn(problem)


@ANNOTATED.means
def annotated(program: Program, selected: Selected) -> str | None:
    meant = [node for node in program.graph.nodes if selected(node) and spec(node).carries]
    # Of two phases one may have no rules.
    if meant and not any(info(node).formats for node in program.graph.nodes):
        return "no node carries a format"
    bare = next((node for node in meant if not info(node).formats), None)
    return None if bare is None else f"{bare.name} ({path_of(bare)}) carries no format"
