"""Is the order of the passes possible? Facts checked over a whole pipeline before anything runs.

Each pass requires, provides and forbids facts (``mxfx.rewrite.facts``). Walking the pipeline with a
set of fact names finds the first pass that could not start. The error cites its line and gives an order that
is possible, or the passes that wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mxfx.config.errors import ConfigError
from mxfx.config.phases import check_phases
from mxfx.config.pipeline import Pipeline
from mxfx.rewrite import Pass, all_facts, all_passes, facts_after

if TYPE_CHECKING:
    # Only a pipeline in a wrong order needs it, and it is slow to import.
    from networkx import MultiDiGraph


@dataclass(frozen=True)
class OrderProblem:
    """Pass ``index`` cannot run where it stands: ``fact`` is missing, or holds and is forbidden."""

    index: int
    fact: str
    missing: bool


def check_order(pipeline: Pipeline, facts: frozenset[str] = frozenset()) -> frozenset[str]:
    """The facts that hold after the pipeline, from those that hold before it.

    Raises ``ConfigError`` at the first pass whose ``requires`` or ``forbids`` is violated, or that is not
    registered, and for phases that cannot be.
    """
    passes = pipeline.passes
    check_phases(pipeline)
    problem = first_problem(passes, facts)
    if problem is not None:
        raise _order_error(pipeline, passes, problem, facts)
    for pass_ in passes:
        facts = facts_after(pass_, facts)
    return facts


def first_problem(passes: tuple[Pass, ...], facts: frozenset[str] = frozenset()) -> OrderProblem | None:
    """The first pass that could not start, or None."""
    for index, pass_ in enumerate(passes):
        for name in sorted(pass_.requires - facts):
            return OrderProblem(index, name, missing=True)
        for name in sorted(pass_.forbids & facts):
            return OrderProblem(index, name, missing=False)
        facts = facts_after(pass_, facts)
    return None


def constraints(passes: tuple[Pass, ...]) -> MultiDiGraph:
    """Edges "must precede" between the positions of a pipeline; ``why`` says which fact asks for it.

    A pass that requires a fact follows those that provide it; a pass that forbids a fact precedes them.
    """
    from networkx import MultiDiGraph

    graph = MultiDiGraph()
    graph.add_nodes_from(range(len(passes)))
    for here, pass_ in enumerate(passes):
        for there, other in enumerate(passes):
            if here == there:
                continue
            for name in sorted(pass_.requires & other.provided()):
                graph.add_edge(there, here, why=f"provides {name!r}, which {pass_.name} requires")
            for name in sorted(pass_.forbids & other.provided()):
                graph.add_edge(here, there, why=f"must come before {name!r} holds")
    return graph


def possible_order(passes: tuple[Pass, ...], facts: frozenset[str] = frozenset()) -> tuple[int, ...] | None:
    """Positions in an order that satisfies every constraint, as near to the given one as can be."""
    import networkx as nx

    graph = nx.DiGraph(constraints(passes))
    if not nx.is_directed_acyclic_graph(graph):
        return None
    order = tuple(nx.lexicographical_topological_sort(graph))
    return order if first_problem(tuple(passes[i] for i in order), facts) is None else None


def _order_error(
    pipeline: Pipeline, passes: tuple[Pass, ...], problem: OrderProblem, facts: frozenset[str]
) -> ConfigError:
    name = passes[problem.index].name
    known = all_facts().get(problem.fact)
    meaning = f" ({known.meaning})" if known else ""
    if problem.missing:
        said = f"pass {name!r} requires {problem.fact!r}{meaning}, which does not hold here"
        expected = _who_provides(problem.fact, passes, pipeline)
    else:
        provider = _provider(passes, problem)
        cause = f"{_label(pipeline, provider)} makes it true" if provider is not None else "it holds from the start"
        said = f"pass {name!r} must come before {problem.fact!r}{meaning} holds; {cause}"
        if provider is not None and passes[provider].forbids & passes[problem.index].provided():
            one = f"{_label(pipeline, provider)} or {_label(pipeline, problem.index)}, not both"
            parted = ", or a select for each" if hasattr(passes[provider], "select") else ""
            return pipeline.error(problem.index, ("name",), said, one + parted)
        expected = f"a program without {problem.fact!r}"
        if provider is not None:
            expected = f"{_called(pipeline, problem.index)} before {_called(pipeline, provider)}"
    return pipeline.error(problem.index, ("name",), said, expected, _advice(pipeline, passes, facts))


def _provider(passes: tuple[Pass, ...], problem: OrderProblem) -> int | None:
    before = [i for i in range(problem.index) if problem.fact in passes[i].provided()]
    return before[-1] if before else None


def _who_provides(fact: str, passes: tuple[Pass, ...], pipeline: Pipeline) -> str:
    inside = [_label(pipeline, i) for i, pass_ in enumerate(passes) if fact in pass_.provided()]
    if inside:
        return f"{' or '.join(inside)} before it"
    outside = sorted(name for name, cls in all_passes().items() if fact in cls.provides)
    return f"{' or '.join(outside)} before it" if outside else f"a program in which {fact!r} holds: no pass provides it"


def _advice(pipeline: Pipeline, passes: tuple[Pass, ...], facts: frozenset[str]) -> str:
    """An order that is possible, of the passes that the file lists; where there is none, who waits for whom."""
    import networkx as nx

    order = possible_order(passes, facts)
    if order is not None:
        written = [i for i in order if pipeline.location(i).line] or order
        return "an order that is possible: " + ", ".join(_called(pipeline, i) for i in written)
    graph = constraints(passes)
    cycles = sorted(nx.simple_cycles(nx.DiGraph(graph)), key=len)
    if not cycles:
        return ""
    ring = [*cycles[0], cycles[0][0]]
    asked = [f"{_label(pipeline, a)} {next(iter(graph[a][b].values()))['why']}" for a, b in pairwise(ring)]
    called = " → ".join(_label(pipeline, i) for i in ring)
    return "\n  ".join([f"these go round in a circle: {called}", *asked])


def _label(pipeline: Pipeline, index: int) -> str:
    place = pipeline.location(index)
    return f"[{index}] {pipeline.specs[index].name}" + (f" (line {place.line})" if place.line else "")


def _called(pipeline: Pipeline, index: int) -> str:
    """A pass's name alone, where no other has it."""
    names = [spec.name for spec in pipeline.specs]
    return names[index] if names.count(names[index]) == 1 else _label(pipeline, index)
