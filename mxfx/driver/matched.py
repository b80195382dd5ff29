"""What the rules of a pipeline matched, what they left out, and where its passes can work, in lines for people."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from mxfx.config.emit import EMIT_PASSES
from mxfx.formats import Format
from mxfx.graph.node import info, kind, path_of
from mxfx.graph.program import Program
from mxfx.ops.catalogue import spec
from mxfx.passes import Annotate, RaiseAttention
from mxfx.rewrite import ALL, Pass, PassRecord, Rewriter, Selector
from mxfx.rewrite.roles import role_of
from mxfx.rewrite.size import inner, multiplied, share_in_format

#: Reasons of one pass that are told in full.
_REASONS = 6
#: Different notes of one pass that are told.
_NOTES = 16


def matched_lines(program: Program, records: Sequence[PassRecord]) -> Iterator[str]:
    """Per rule of ``annotate``, in an annotated program: how many nodes of which role, and what it said of them."""
    nodes = {node.name: node for node in program.graph.nodes}
    for record in records:
        if record.name != Annotate.name:
            continue
        rules: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for match in record.matches:
            rules[match.rule].append((_called(nodes.get(match.node), match.path), match.note))
        for rule, found in rules.items():
            notes = Counter(note for _, note in found)
            called = _counted(name for name, _ in found)
            yield f"{rule.removeprefix('annotate ')}: {called}; {_counted(notes.elements())}"
    weights = multiplied(program)
    if any(one.format is not None for one in weights):
        left = _counted(_called(one.node, path_of(one.node)) for one in weights if one.format is None)
        yield (
            f"weights that layers multiply by: {share_in_format(inner(weights)):.1%} are to be in a format "
            f"({share_in_format(weights):.1%} with router and head); float stay {left or 'none'}"
        )
    yield from _ragged(program)


def attention_lines(records: Sequence[PassRecord]) -> Iterator[str]:
    """A warning for attentions that are no nodes, by the reason."""
    skipped = [skip for record in records if record.name == RaiseAttention.name for skip in record.skips]
    for reason, count in Counter(skip.reason for skip in skipped).items():
        where = next(skip.path for skip in skipped if skip.reason == reason)
        yield f"warning: {count} attentions (such as {where}) are not raised: {reason}"


def site_lines(program: Program, passes: Sequence[Pass], records: Sequence[PassRecord]) -> Iterator[str]:
    """Per pass: the sites where it works, and why it leaves others alone, by what they are.

    What ran is told by its record; the passes behind are asked what they foresee for the program as it is.
    """
    ran = {record.name: record for record in records}
    nodes = {node.name: node for node in program.graph.nodes}
    for pass_ in passes:
        record = ran.get(pass_.name)
        if record is None and pass_.name in EMIT_PASSES:
            # What they fuse and pack is made by the passes before them.
            continue
        select = getattr(pass_, "select", ALL)
        # The passes before it may make nodes of other types and roles, but of no other modules.
        if misses := Selector(select.pattern, excluded=select.excluded).misses(program.graph.nodes):
            yield f"warning: {pass_.name}: {misses}"
            continue
        if record is not None:
            sites: int | None = len(record.matches)
        else:
            # To foresee changes nothing.
            rw = Rewriter(program, pass_.name)
            sites, record = pass_.foresee(rw), rw.record
        if sites is not None and pass_.name != Annotate.name:
            reasons = Counter((_called(nodes.get(skip.node), ""), _plain(skip.reason)) for skip in record.skips)
            told = [f" ({_counted(notes)})"] if (notes := [] if ran.get(pass_.name) else _notes(record)) else []
            told += [f"; {count} {who} not: {reason}" for (who, reason), count in reasons.most_common(_REASONS)]
            more = f"; and {len(reasons) - _REASONS} other reasons" if len(reasons) > _REASONS else ""
            yield f"{pass_.name}: {sites or 'no'} sites{''.join(told).replace('  ', ' ')}{more}"


def _notes(record: PassRecord) -> list[str]:
    """What is foreseen of each site, unless there is too much to tell."""
    notes = [match.note for match in record.matches if match.note]
    return notes if len(set(notes)) <= _NOTES else []


def _ragged(program: Program) -> Iterator[str]:
    """Axes that their blocks do not divide: the last block is shorter."""
    found: Counter[str] = Counter()
    for node in program.products():
        weight, annotation = spec(node).node_of("weight"), info(node).formats.get("weight")
        if weight is None or annotation is None:
            continue
        width, fmt = weight.meta["val"].shape[spec(node).axis("weight") or -1], annotation.format
        if fmt.block and width % fmt.block:
            found[f"{role_of(node) or kind(node)} of {width} in blocks of {fmt.block}{_fitting(width, fmt)}"] += 1
    for what, count in found.items():
        yield f"a ragged last block: {count} {what}"


def _fitting(width: int, fmt: Format) -> str:
    """The widest block up to the format's that divides an axis, in words; nothing where only tiny ones do."""
    best = max(size for size in range(1, int(fmt.block or 1) + 1) if width % size == 0)
    return f" (blocks of {best} divide it)" if best >= 8 else ""


def _called(node: fx.Node | None, path: str) -> str:
    role = role_of(node) if node is not None else ""
    return role or (kind(node) if node is not None else "") or path


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items())


def _plain(reason: str) -> str:
    """A reason without the numbers of layers and nodes, so that layers count together."""
    return re.sub(r"\.\d+\b", ".N", reason)
