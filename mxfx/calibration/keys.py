"""Keys: what a result depends on, as one hash. A result is used only where its key fits.

A key covers the graph upstream of a node, the weights in it, the data, the options and the environment, and nothing
downstream, so that a later pass or a later layer never makes an earlier result stale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata

import torch
from torch import Tensor, fx

from mxfx.graph.node import op_name
from mxfx.ground import ranks

#: Raised when the meaning of a stored result changes, so that older ones are not picked up.
SCHEMA = 2


def digest(value: object) -> str:
    """Blake2b (32 hex digits) of a value's canonical JSON. Raises ``TypeError`` for what JSON cannot say."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return _hex(text.encode())


def token_key(ids: Tensor) -> str:
    """Hash of token ids: shape and values."""
    data = ids.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes()
    return _hex(repr(tuple(ids.shape)).encode() + data)


def _version() -> str:
    """The installed version; a tree that runs without being installed has none."""
    try:
        return metadata.version("mxfx")
    except metadata.PackageNotFoundError:
        return "not installed"


def environment(device: torch.device) -> dict[str, object]:
    """What decides the bytes of a result beside program, options and data: versions, device, determinism flags."""
    on_cuda = device.type == "cuda"
    return {
        "schema": SCHEMA,
        "mxfx": _version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_cuda else torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if on_cuda else None,
        # The order in which a matrix product is summed depends on the number of threads.
        "threads": None if on_cuda else torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        # What several processes measured is added up in another order.
        **({"ranks": ranks.world()} if ranks.world() > 1 else {}),
    }


@dataclass(slots=True)
class _Known:
    """What is known of a node: what it was when it was read, and the digest of it with all of its inputs."""

    node: fx.Node
    name: str
    target: object
    args: object
    kwargs: object
    inputs: list[_Known]
    line: bytes
    made_of: list[str] = field(default_factory=list)
    digest: str = ""

    def unchanged(self) -> bool:
        # FX never edits arguments in place: other arguments are another object.
        node = self.node
        same = node.args is self.args and node.kwargs is self.kwargs and node.target is self.target
        return same and node.name == self.name


class Keys:
    """Keys of what nodes compute, by a Merkle digest a node: of itself, its inputs' digests and its weight's hash.

    Digests are kept. A later call looks whether each node upstream is as it was, and hashes again only those that
    changed and what follows from them; so the keys of all layers together cost little more than that of the last.
    """

    def __init__(self) -> None:
        self._known: dict[fx.Node, _Known] = {}
        self._cones: dict[tuple[fx.Node, ...], list[_Known]] = {}

    def key(self, targets: Iterable[fx.Node], hash_of: Callable[[str], str], data: Mapping[str, object]) -> str:
        """The key of what ``targets`` compute, given the hashes of the weights and of the ``data``.

        Targets in another order have the same key.
        """
        ends = tuple(sorted(set(targets)))
        cone = self._cones.get(ends) or self._read(ends)
        if not all(known.unchanged() for known in cone):
            self._known.clear()
            self._cones.clear()
            cone = self._read(ends)
        self._cones[ends] = cone
        for known in cone:
            weight = [hash_of(str(known.target))] if known.node.op == "get_attr" else []
            made_of = [*weight, *[source.digest for source in known.inputs]]
            if made_of != known.made_of:
                known.made_of = made_of
                known.digest = _hex(known.line + "\n".join(made_of).encode())
        return digest({"graph": [self._known[end].digest for end in ends], "data": dict(data)})

    def _read(self, ends: tuple[fx.Node, ...]) -> list[_Known]:
        """Everything that the ends are computed from, and they themselves, inputs first."""
        found: dict[fx.Node, _Known] = {}
        waiting = list(ends)
        while waiting:
            node = waiting[-1]
            known = self._known.get(node)
            sources = node.all_input_nodes if known is None else [source.node for source in known.inputs]
            before = [source for source in sources if source not in found]
            if before and node not in found:
                waiting += before
                continue
            waiting.pop()
            if known is None:
                inputs = [found[source] for source in sources]
                known = _Known(node, node.name, node.target, node.args, node.kwargs, inputs, _line(node))
                self._known[node] = known
            found[node] = known
        return list(found.values())


def _line(node: fx.Node) -> bytes:
    target = str(node.target) if node.op in ("get_attr", "placeholder") else op_name(node)
    return f"{node.name} = {node.op} {target} {node.args!r} {dict(node.kwargs)!r}\n".encode()


def _hex(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
