"""Facts: what passes require, provide and forbid of a program.

A fact is an object, so that a misspelt one cannot be imported; it is also its own name, as which a program keeps it and
prints it. It is *verified*, not only declared: its predicate looks at the graph and returns the first reason why the
fact does not hold for the part that was selected, or None. ``apply`` runs it after the pass that provides the fact.

The facts of mxfx's own passes are declared here, for passes speak of each other's; each predicate stands in the file
that knows what it is about. A pass that brings a fact of its own declares it in its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import fx

from mxfx.graph.program import Program
from mxfx.ground.errors import MxfxError
from mxfx.ground.nearest import did_you_mean

#: Which nodes a pass answers for: those that its options select and that it did not skip with a reason.
Selected: TypeAlias = "Callable[[fx.Node], bool]"
Predicate: TypeAlias = "Callable[[Program, Selected], str | None]"


class FactError(MxfxError, ValueError):
    """A pass needs a fact that does not hold, forbids one that holds, or did not provide what it promised."""


def every_node(node: fx.Node) -> bool:
    return True


class Fact(str):
    """A fact by its name, with its meaning in words; ``@FACT.means`` above its predicate.

    Raises ``ValueError`` if the name has another meaning already.
    """

    meaning: str
    _predicate: Predicate | None

    def __new__(cls, name: str, meaning: str) -> Fact:
        known = _FACTS.get(name)
        if known is None:
            known = _FACTS[name] = super().__new__(cls, name)
            known.meaning, known._predicate = meaning, None
        elif known.meaning != meaning:
            raise ValueError(f"fact {name!r} is already defined: {known.meaning}")
        return known

    def means(self, predicate: Predicate) -> Predicate:
        """Decorator: give the fact its predicate. Raises ``ValueError`` if another function is it already."""
        if self._predicate is not None and self._predicate.__qualname__ != predicate.__qualname__:
            raise ValueError(f"fact {self!r} already has a predicate, {self._predicate.__qualname__}")
        self._predicate = predicate
        return predicate

    def check(self, program: Program, selected: Selected = every_node) -> str | None:
        """The first reason why the fact does not hold for the selected nodes; None if it holds.

        Raises ``FactError`` for a fact without a predicate: nothing that no one can check may be promised.
        """
        if self._predicate is None:
            raise FactError(f"fact {self!r} has no predicate; put @…means above the function that checks it")
        return self._predicate(program, selected)


_FACTS: dict[str, Fact] = {}


def find_fact(name: str) -> Fact:
    """The fact of that name; ``FactError`` names the nearest one."""
    if name in _FACTS:
        return _FACTS[name]
    raise FactError(f"unknown fact {name!r}; {did_you_mean(name, _FACTS)}".removesuffix("; "))


def all_facts() -> dict[str, Fact]:
    return dict(_FACTS)


NORMS_RAISED = Fact("norms-raised", "every RMSNorm and LayerNorm is one node")
ROPES_RAISED = Fact("ropes-raised", "every rotary embedding is one node")
ATTENTION_RAISED = Fact("attention-raised", "every attention is one node")
RAISED = Fact("raised", "norms, rotary embeddings and attention are single nodes")
FUSED_SPLIT = Fact("fused-split", "every product makes what plays one role")
ANNOTATED = Fact("annotated", "the operands that rules speak of carry formats")
NORMS_FUSED = Fact("norms-fused", "norms that only linears with weights of their own read have no gain")
RESIDUAL_ROTATED = Fact("residual-rotated", "everything that touches a rotated residual axis is in the same basis")
VALUES_ROTATED = Fact("values-rotated", "what writes values and what reads them were turned together")
KV_TRANSFORMED = Fact("kv-transformed", "queries are transformed wherever keys are, and values where they are read")
QK_ROTATED = Fact("qk-rotated", "queries and keys of every attention are rotated alike")
ROTATED_ONLINE = Fact("rotated-online", "rotated tensors carry the formats that their readers gave up")
INPUTS_TRANSFORMED = Fact("inputs-transformed", "linears with a transformed input read their transform")
ATTENTION_EXPANDED = Fact("attention-expanded", "attention whose inner operands carry formats is spelled out")
ACTIVATIONS_QUANTIZED = Fact("activations-quantized", "annotated activations are rounded")
KV_QUANTIZED = Fact("kv-quantized", "annotated keys and values are rounded")
WEIGHTS_ROUNDED = Fact("weights-rounded", "annotated weights lie on their grids")
CALIBRATED = Fact("calibrated", "every annotated weight that can be solved for is on its grid")
ROUNDED_TO_NEAREST = Fact(
    "rounded-to-nearest", "every annotated weight and bias is rounded: there is nothing left to calibrate"
)
QUANTIZERS_FUSED = Fact("quantizers-fused", "quantizers are part of the ops before them, where that can be")
LOWERED = Fact("lowered", "no dialect op is left")
