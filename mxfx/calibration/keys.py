"""Keys: what a result depends on, as one hash. A result is used only where its key fits.

A key covers the graph upstream of a node, the weights in it, the data, the options and the environment, and nothing
downstream, so that a later pass or a later layer never makes an earlier result stale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor, fx

from mxfx.graph.node import op_name

#: Raised when the meaning of a stored result changes, so that older ones are not picked up.
SCHEMA = 1


def digest(value: object) -> str:
    """Blake2b (32 hex digits) of a value's canonical JSON. Raises ``TypeError`` for what JSON cannot say."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def token_key(ids: Tensor) -> str:
    """Hash of token ids: shape and values."""
    data = ids.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes()
    return hashlib.blake2b(repr(tuple(ids.shape)).encode() + data, digest_size=16).hexdigest()


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
    }


def upstream(targets: Iterable[fx.Node]) -> list[fx.Node]:
    """The targets and everything that they are computed from, in topological order."""
    needed = set(targets)
    graph = next(iter(needed)).graph
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


@dataclass(frozen=True)
class Cone:
    """The graph upstream of a node as text, and the names of the weights in it.

    Frozen when it is taken: later edits of the graph do not change it.
    """

    text: str
    weights: tuple[str, ...]

    @classmethod
    def of(cls, *targets: fx.Node) -> Cone:
        nodes = upstream(targets)
        weights = tuple(str(node.target) for node in nodes if node.op == "get_attr")
        return cls("\n".join(_line(node) for node in nodes), weights)

    def key(self, hash_of: Callable[[str], str], data: Mapping[str, object]) -> str:
        """The key of what these nodes compute, given the hashes of the weights and of the ``data``."""
        return digest(
            {"graph": self.text, "weights": {name: hash_of(name) for name in self.weights}, "data": dict(data)}
        )


def _line(node: fx.Node) -> str:
    target = str(node.target) if node.op in ("get_attr", "placeholder") else op_name(node)
    return f"{node.name} = {node.op} {target} {node.args!r} {dict(node.kwargs)!r}"
