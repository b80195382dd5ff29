"""A program: the graph of a model, its weights and the facts that hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mxfx.graph.node import kind, layer_of
from mxfx.graph.weights import WeightStore
from mxfx.ops.catalogue import spec, weights_of

#: Dtypes in ``meta["val"]`` are roles: every program is traced in bfloat16, so that casts are visible.
NOMINAL_MODEL = torch.bfloat16
NOMINAL_COMPUTE = torch.float32

#: Entry of a source's configuration that holds how the model wants to generate.
GENERATION = "generation_config"
#: The input that says of which tokens logits are wanted, int64 ``(kept,)``; None for all.
KEPT = "kept"


def compute_dtype(model: torch.dtype) -> torch.dtype:
    """The precision that upcasts ask for: float32, or float64 if the model itself runs in float64."""
    return torch.promote_types(model, torch.float32)


@dataclass(frozen=True)
class Symbol:
    """A dynamic dimension with its inclusive range."""

    name: str
    low: int
    high: int


@dataclass(frozen=True)
class Source:
    """Where a program came from: the model's name, its architecture and its Hugging Face configuration as JSON."""

    name: str
    architecture: str
    config: Mapping[str, object]


@dataclass(frozen=True)
class Phases:
    """The second entry of a program: ``decode`` runs steps of one token, and fills and reads one cache with it.

    ``handoff`` says what that cache holds of a prefill's keys and values: what the prefill reads (``keep``), or that
    rounded once onto the format in which decode has them (``requantize``). ``onto`` names that format for the keys,
    then the values, of each attention; None where nothing is rounded.
    """

    decode: Program
    handoff: str
    onto: tuple[str | None, ...]


@dataclass
class Program:
    """Graph, weights and facts. Passes get a copy; nobody edits a program in place but a ``Rewriter``.

    ``dtype`` is the precision that the model runs in (weights in the store may be kept finer).
    The graph takes ``input_ids``, ``position_ids``, ``attention_mask`` and returns logits
    ``(batch, seq, vocabulary)``; ``get_attr`` targets are names in ``weights``.
    """

    graph: fx.Graph
    weights: WeightStore
    dtype: torch.dtype
    source: Source
    symbols: tuple[Symbol, ...] = ()
    facts: frozenset[str] = frozenset()
    notes: dict[str, object] = field(default_factory=dict)
    phases: Phases | None = None
    """The program of single steps, where that has formats of its own; then this one is the prefill's."""

    def copy(self) -> Program:
        """A program that shares weight tensors with this one and nothing else."""
        return Program(
            copy_graph(self.graph),
            self.weights.copy(),
            self.dtype,
            self.source,
            self.symbols,
            self.facts,
            copy.copy(self.notes),
            self.phases,
        )

    def twin(self, dtype: torch.dtype) -> Program:
        """The same program in another precision; ``twin(torch.float64)`` is what ``Close`` promises are held to."""
        other = self.copy()
        other.dtype = dtype
        other.weights = self.weights.cast(dtype)
        return other

    def nodes(self, *kinds: str) -> Iterator[fx.Node]:
        """Nodes in topological order, only those of the named kinds if any are named."""
        for node in list(self.graph.nodes):
            if not kinds or kind(node) in kinds:
                yield node

    @property
    def layers(self) -> int:
        """Number of decoder layers: one more than the highest layer index of any node."""
        return max((i + 1 for n in self.graph.nodes if (i := layer_of(n)) is not None), default=0)

    def weight_of(self, node: fx.Node) -> str:
        """Name of the weight that a linear, embedding or norm reads.

        Raises ``ValueError`` if the operand is not a ``get_attr`` (a computed weight).
        """
        stored = weights_of(node)
        if "weight" not in stored:
            raise ValueError(f"{node.name}: its weight {spec(node).get('weight')} is computed, not stored")
        return str(stored["weight"].target)

    def products(self) -> Iterator[fx.Node]:
        """Nodes that multiply an activation by a weight, in topological order: linears and their like."""
        for node in list(self.graph.nodes):
            if spec(node).product is not None:
                yield node

    def tensor(self, node: fx.Node) -> Tensor:
        """The stored tensor behind a ``get_attr`` node."""
        return self.weights[str(node.target)]


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A new graph with the same node names and metadata (``NodeInfo`` is immutable and shared)."""
    result = fx.Graph()
    result._codegen = copy.copy(graph._codegen)
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = result.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    return result
