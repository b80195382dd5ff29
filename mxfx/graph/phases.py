"""Two programs over one cache: what prefill and decode have in common, and what of a cache goes from one to the other.

A call of several tokens, or of the first ones, is a prefill; a call of one token that finds others in the cache is
decode. Both programs come from one trace: they have the same attentions, which differ in formats alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from mxfx.graph.node import info, kind
from mxfx.graph.program import Phases, Program
from mxfx.graph.weights import WeightStore
from mxfx.ground.errors import MxfxError
from mxfx.ops import cached_attend
from mxfx.ops.catalogue import spec

#: What decode's cache holds of a prefill's keys and values: what the prefill reads, or that rounded to decode's format.
HANDOFFS = ("keep", "requantize")

#: Note of a program that can have no cache, and why.
NO_CACHE = "no-kv-cache"
_ATTENTION = ("attention", "cached_attention")


class PhaseError(MxfxError, ValueError):
    """Two programs that cannot be the phases of one model."""


@dataclass(frozen=True)
class Held:
    """Keys or values of one attention in a program: ``width`` numbers a token and head, rounded ``onto`` a format;
    ``wanted``: they are annotated to be in one; ``first``: but for the first tokens of a text.

    ``cache`` and ``scales`` name the inputs that hold them, as codes of the format ``stored``; without it as numbers.
    Before ``insert-kv-cache`` there are no such inputs.
    """

    width: int
    onto: str | None
    wanted: bool = False
    first: bool = False
    cache: str = ""
    scales: str = ""
    stored: str | None = None


def held(program: Program) -> tuple[Held, ...]:
    """Keys, then values, of every attention that writes them, in order; layers that share them count once."""
    found: dict[tuple[object, object], tuple[Held, Held]] = {}
    for node in program.graph.nodes:
        if kind(node) in _ATTENTION or node.target is cached_attend:
            given = spec(node).arguments()
            found.setdefault(
                (given["k"], given["v"]), (_held(node, given, "k", "key"), _held(node, given, "v", "value"))
            )
    return tuple(one for pair in found.values() for one in pair)


def _held(node: fx.Node, given: dict[str, object], operand: str, name: str) -> Held:
    source = given[operand]
    assert isinstance(source, fx.Node)
    rounded = spec(source).rounds
    onto = rounded.format if rounded is not None and rounded.axis == -1 else None
    cache, scales = (given.get(f"{name}{suffix}") for suffix in ("s", "_scales"))
    stored = given.get(f"{name}_format")
    wanted = operand in info(node).formats
    return Held(
        source.meta["val"].shape[-1],
        onto,
        wanted,
        kind(source) == "keep_first_quantize",
        _named(cache),
        _named(scales),
        None if stored is None else str(stored),
    )


def _named(cache: object) -> str:
    return str(cache.target) if isinstance(cache, fx.Node) else ""


def joined(prefill: Program, decode: Program, handoff: str, onto: tuple[str | None, ...] | None = None) -> Program:
    """The prefill's program with decode's as its second entry; weights that agree are held once.

    ``onto`` is given for lowered programs, whose kernels do not tell what they round to; see ``Phases``.

    Raises ``PhaseError`` for programs of which no cache can go from one to the other.
    """
    if handoff not in HANDOFFS:
        raise PhaseError(f"no handoff {handoff!r}; expected {' or '.join(HANDOFFS)}")
    mine, theirs = held(prefill), held(decode)
    if [one.width for one in mine] != [one.width for one in theirs]:
        raise PhaseError(
            f"prefill has {len(mine) // 2} attentions that a cache can serve, decode has {len(theirs) // 2}: one "
            "of them spells attention out (formats of probs or softmax do), and no cache goes from one to the other; "
            "give both phases such formats or none, or compile them as two models"
        )
    if (why := prefill.notes.get(NO_CACHE, decode.notes.get(NO_CACHE))) is not None:
        raise PhaseError(f"the model can have no cache, so that there are no steps to decode: {why}")
    if not mine:
        raise PhaseError("the model has no attention that a cache can serve, so that there are no steps to decode")
    if onto is None:
        if any(one.first for one in (*mine, *theirs)) and [one.onto for one in mine] != [one.onto for one in theirs]:
            raise PhaseError(
                "the first tokens of a text are kept as they are, and no cache with such tokens goes over to one in "
                "another format; give the keys and values of both phases one format, or round the first tokens too"
            )
        quantized = {"kv-quantized", "activations-quantized"} & decode.facts
        if handoff == "requantize" and quantized and any(one.wanted and one.onto is None for one in theirs):
            raise PhaseError(
                "decode's keys or values are rounded in another basis than attention reads them in (a rotation back "
                "stands between), so that a prefill's cannot be rounded to their format when they are handed over; "
                'give handoff = "keep", or do not rotate the cache'
            )
        onto = tuple(_rounding(a, b) if handoff == "requantize" else None for a, b in zip(mine, theirs, strict=True))
    decode = decode.copy()
    _share(decode.weights, prefill.weights)
    return replace(prefill, phases=Phases(replace(decode, phases=None), handoff, onto))


def _rounding(mine: Held, theirs: Held) -> str | None:
    """What a number of a prefill is rounded to on its way: decode's format, unless the prefill has it too."""
    return None if theirs.onto == mine.onto else theirs.onto


def _share(mine: WeightStore, theirs: WeightStore) -> None:
    """Hold only once what both stores have under one name, in the same bits, laid out alike in memory."""
    for name in set(mine) & set(theirs):
        if (name in mine.constants) == (name in theirs.constants) and _same(mine[name], theirs[name]):
            mine.share(name, theirs[name])


def _same(a: Tensor, b: Tensor) -> bool:
    alike = (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
    if a is b or not alike or a.device.type == "meta":
        return a is b
    # As integers: NaNs compare, and signed zeros differ.
    return torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b)))


def entries(program: Program) -> dict[str, Program]:
    """The programs of a model by their phase; ``""`` for one that has no phases."""
    if program.phases is None:
        return {"": program}
    return {"prefill": program, "decode": program.phases.decode}


def kept_as_numbers(program: Program, peer: Program | None, handoff: str) -> frozenset[int]:
    """Positions in ``held`` of what a cache holds as numbers: what both phases write, in formats that differ."""
    if peer is None or handoff != "keep":
        return frozenset()
    pairs = enumerate(zip(held(program), held(peer), strict=False))
    return frozenset(index for index, (mine, theirs) in pairs if mine.onto != theirs.onto)
