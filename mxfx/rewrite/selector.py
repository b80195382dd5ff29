"""Which part of a model a pass or a rule speaks of: by name, by role, by layer, by type of node."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakKeyDictionary

from torch import fx

from mxfx.graph.node import kind, layer_of, paths_of
from mxfx.ground.nearest import did_you_mean, nearest
from mxfx.rewrite.roles import role_of

#: Role → the roles that it stands for.
GROUPS = {
    "attention": (
        *("q_proj", "k_proj", "v_proj", "qk_proj", "kv_proj", "qkv_proj"),
        *("o_proj", "latent", "in_proj", "output_gate"),
    ),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}
ROLES = ("embed", "head", "attention", *GROUPS["attention"], *GROUPS["mlp"], "router")

_CLAUSES = ("name", "role", "layers", "except", "type")
_STRUCTURED = re.compile(rf"\s*({'|'.join(_CLAUSES)})\s*:")
_LAYERS = re.compile(r"(-?\d+)(?:\s*-\s*(-?\d+))?")

#: Number of decoder layers of a graph; no pass changes it.
_DEPTHS: WeakKeyDictionary[fx.Graph, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Selector:
    """Nodes that satisfy everything that is said; nothing said is every node.

    ``pattern`` and ``excluded`` are regular expressions that a whole module path must match, or must not
    (``re.fullmatch``). ``role`` names roles (``mxfx.rewrite.roles``) or groups of them, ``layers`` decoder layers, as
    in ``0-3, -1`` (negative ones count from the end), ``type`` concepts such as ``linear``; each any of several.

    As text: a regular expression alone, or clauses, as in ``role: down_proj, o_proj; layers: 0-3; except: .*shared.*``.
    Raises ``ValueError`` for an expression that does not compile, a role that there is not, layers that are no ranges.
    """

    pattern: str = r".*"
    role: str = ""
    layers: str = ""
    excluded: str = ""
    type: str = ""

    def __post_init__(self) -> None:
        _compiled(self.pattern), _compiled(self.excluded)
        for role in _listed(self.role):
            if role not in ROLES and role not in GROUPS:
                known = (*ROLES, *(group for group in GROUPS if group not in ROLES))
                hint = did_you_mean(role, known)
                raise ValueError(
                    f"there is no role {role!r}; expected one of {', '.join(known)}" + (f" ({hint})" if hint else "")
                )
        _ranges(self.layers)

    @classmethod
    def read(cls, text: str) -> Selector:
        """The selector that ``str`` writes so."""
        if not _STRUCTURED.match(text):
            return cls(text)
        given: dict[str, str] = {}
        for clause in filter(str.strip, text.split(";")):
            key, colon, value = (part.strip() for part in clause.partition(":"))
            if not colon or key not in _CLAUSES or key in given:
                raise ValueError(
                    f"{clause.strip()!r} is no clause of a selector; expected each of {', '.join(_CLAUSES)} at most "
                    "once, as in 'role: down_proj; layers: 0-3'"
                )
            given[key] = value
        return cls(
            given.get("name", r".*"),
            given.get("role", ""),
            given.get("layers", ""),
            given.get("except", ""),
            given.get("type", ""),
        )

    def __str__(self) -> str:
        said = {
            "name": "" if self.pattern == r".*" else self.pattern,
            "role": self.role,
            "layers": self.layers,
            "except": self.excluded,
            "type": self.type,
        }
        clauses = [f"{key}: {value}" for key, value in said.items() if value]
        return self.pattern if clauses in ([], [f"name: {self.pattern}"]) else "; ".join(clauses)

    def narrowed(self, *, role: str = "", layers: str = "", excluded: str = "", type: str = "") -> Selector:
        """This selector with what is given besides. Raises ``ValueError`` where both say the same thing."""
        more = {"role": role, "layers": layers, "excluded": excluded, "type": type}
        given = {key: value for key, value in more.items() if value}
        twice = next((key for key in given if getattr(self, key)), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is said twice: in the selector {str(self)!r} and beside it")
        return replace(self, **given)

    def __call__(self, node: fx.Node) -> bool:
        """Whether this selector speaks of ``node``."""
        if not self.names(*paths_of(node)):
            return False
        if self.type and kind(node) not in _listed(self.type):
            return False
        if self.layers and not self._in_layers(node):
            return False
        return not self.role or role_of(node) in self._roles

    def names(self, *paths: str) -> bool:
        """Whether one of the module paths of a node fits, and none is excluded, by the two expressions alone."""
        if not any(map(self._pattern.fullmatch, paths)):
            return False
        return not self.excluded or not any(map(self._excluded.fullmatch, paths))

    def misses(self, nodes: Iterable[fx.Node]) -> str:
        """In words, for a pass whose ``select`` this is, that it speaks of none of ``nodes``; empty where of one."""
        nodes = list(nodes)
        return "" if any(map(self, nodes)) else f"select = {str(self)!r} fits no node; {self.hint(nodes)}"

    def hint(self, nodes: Iterable[fx.Node]) -> str:
        """What it could have spoken of instead of none of ``nodes``: the path nearest in spelling, and the roles that
        there are where it names some. Empty where there is no path.
        """
        nodes = list(nodes)
        paths = dict.fromkeys(path for node in nodes for path in paths_of(node) if path)
        near = nearest(self.pattern.replace("\\", ""), paths, cutoff=0.0)
        if near is None:
            return ""
        roles = ", ".join(sorted({role for node in nodes if (role := role_of(node))}))
        told = f"; of these nodes the roles are {roles}" if self.role and roles else ""
        return f"it is matched against whole module paths such as {near!r}{told}"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return _compiled(self.pattern)

    @cached_property
    def _excluded(self) -> re.Pattern[str]:
        return _compiled(self.excluded)

    @cached_property
    def _roles(self) -> frozenset[str]:
        return frozenset(one for role in _listed(self.role) for one in (role, *GROUPS.get(role, ())))

    def _in_layers(self, node: fx.Node) -> bool:
        layer = layer_of(node)
        if layer is None:
            return False
        depth = _depth(node.graph)
        counted = ((first + depth * (first < 0), last + depth * (last < 0)) for first, last in _ranges(self.layers))
        return any(first <= layer <= last for first, last in counted)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error.msg} at position {error.pos}") from error


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _ranges(text: str) -> list[tuple[int, int]]:
    """First and last layer of each range."""
    found = []
    for part in _listed(text):
        match = _LAYERS.fullmatch(part)
        if match is None:
            raise ValueError(f"layers {part!r} are no range; expected numbers and ranges, as in '0-3, 7, -1'")
        first = int(match[1])
        found.append((first, first if match[2] is None else int(match[2])))
    return found


def _depth(graph: fx.Graph) -> int:
    if graph not in _DEPTHS:
        _DEPTHS[graph] = max((i + 1 for node in graph.nodes if (i := layer_of(node)) is not None), default=0)
    return _DEPTHS[graph]


ALL = Selector()
