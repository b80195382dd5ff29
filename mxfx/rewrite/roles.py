"""What a weight does in its layer, read from the dataflow: names of modules are a family's own, these are not.

==============  ========================================================================================================
role            the product with a weight that …
==============  ========================================================================================================
``embed``       looks tokens up
``head``        makes the logits
``q_proj``      makes the queries of an attention; ``k_proj``, ``v_proj`` likewise; ``qkv_proj``, ``kv_proj`` make more
``o_proj``      reads what an attention, or another mixer of tokens, made
``latent``      makes the narrow tensor that a query, key or value projection reads (latent attention)
``in_proj``     makes what another mixer of tokens reads (a scan, a convolution)
``output_gate`` makes what the result of an attention, or another mixer of tokens, is multiplied by
``gate_proj``   enters an MLP through its activation; ``up_proj`` beside it, or alone where there is no gate
``gate_up_proj``  makes both
``down_proj``   closes an MLP
``router``      decides which experts a token goes to
==============  ========================================================================================================

``attention`` is the role of an attention itself, whose queries, keys and values carry formats, and the group of all
products around it; ``mlp`` is the group of all products of an MLP. Experts and shared experts have the roles of any
MLP. A product in none of these places has no role.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

from mxfx.ops.catalogue import spec

aten = torch.ops.aten
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor)
_PRODUCTS = (aten.mul.Tensor,)
_CUTS = (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
_ACTIVATIONS = (
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.exp.default,
    aten.softplus.default, aten.hardswish.default, aten.mish.default, aten.leaky_relu.default, aten.elu.default,
    aten.relu6.default, aten.square.default, aten.erf.default, aten.pow.Tensor_Scalar,
)  # fmt: skip
#: Products of two computed values → where the first of them stands.
_MATMULS: dict[object, int] = {aten.bmm.default: 0, aten.matmul.default: 0, aten.baddbmm.default: 1}
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
#: How many ops lie between the products of an attention that is spelled out and its softmax, at most.
_STEPS = 12
#: Calls that read the shape of a tensor and none of its values.
_SHAPES = (
    aten.sym_size.int, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_ones.default,
    aten.new_zeros.default, aten.new_full.default, aten.new_empty.default, aten.empty_like.default,
)  # fmt: skip
#: Calls that take or put rows at places: what only says the places has no feature in the result.
_PLACED = (aten.index.Tensor, aten.index_select.default, aten.index_add.default, aten.gather.default)
#: Calls that keep, move or rescale features: nothing in them is an activation.
_CARRIES = (
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.to.dtype, aten.cat.default, aten.clone.default, aten.select.int,
    aten.contiguous.default, aten.flatten.using_ints, *_CUTS,
)  # fmt: skip
_CARRIERS = ("rms_norm", "layer_norm", "cast", "fake_quantize", "block_transform", "hadamard", "transform_quantize",
             "norm_quantize", "hadamard_quantize", "rope", "rope_quantize")  # fmt: skip


#: Of graphs that nothing changes for a while: node → its role, and node → what its value is made of.
_REMEMBERED: dict[fx.Graph, tuple[dict[fx.Node, str], dict[fx.Node, _Origins]]] = {}
#: What a value is made of: ``product``, ``mixer`` or ``input``, each with whether more was done to it than to move it.
_Origins = frozenset[tuple[str, bool]]


@contextmanager
def roles_remembered(graph: fx.Graph) -> Iterator[None]:
    """While open, each role of a graph is found once; nothing may change what its nodes read."""
    if graph in _REMEMBERED:
        yield
        return
    _REMEMBERED[graph] = ({}, {})
    try:
        yield
    finally:
        del _REMEMBERED[graph]


def role_of(node: fx.Node) -> str:
    """The role of a product with a weight, an embedding or an attention; ``""`` for a node that has none."""
    known, _ = _REMEMBERED.get(node.graph, ({}, {}))
    if node not in known:
        known[node] = _role_of(node)
    return known[node]


def _role_of(node: fx.Node) -> str:
    if spec(node).concept == "attention":
        return "attention"
    if spec(node).concept == "embedding":
        return "embed" if _is_token(spec(node).node_of("indices")) else ""
    if spec(node).product is None:
        return ""
    reach = _Reach(node)
    if reach.output:
        return "head"
    found = _before_mixer(reach)
    if found:
        return found
    if _reads_attention(node):
        return "o_proj"
    return "down_proj" if _closes(node) else _entrance(reach)


def role_made(value: fx.Node, product: fx.Node) -> str:
    """The role that a ``product`` would have if this value, a part of its result, were all of it; ``""`` for none."""
    reach = _Reach(value, product)
    return "head" if reach.output else _before_mixer(reach) or _entrance(reach)


def _before_mixer(reach: _Reach) -> str:
    """The role of what a mixer of tokens reads or is weighed by, or of a router."""
    if any(_Reach(reader).attention for reader in reach.readers):
        return "latent"
    if reach.attention:
        return _projection(reach.attention)
    if reach.routes:
        return "router"
    if reach.mixed:
        return "in_proj"
    return "output_gate" if reach.paired and any(map(_reads_attention, reach.readers)) else ""


def _entrance(reach: _Reach) -> str:
    """The role of what an MLP begins with."""
    if not any(map(_closes, reach.readers)):
        return ""
    if reach.paired:
        return "gate_proj" if reach.activated else "up_proj"
    return "gate_up_proj" if reach.cut else "up_proj"


def _is_token(node: fx.Node | None) -> bool:
    """Whether a value is the input ids, in whatever shape."""
    while node is not None and node.target in _CARRIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node is not None and node.op == "placeholder" and node.target == "input_ids"


def _projection(operands: set[str]) -> str:
    return "".join(name for name in ("q", "k", "v") if name in operands) + "_proj"


def _is_product(node: fx.Node) -> bool:
    return spec(node).product is not None


def _is_mixer(node: fx.Node) -> bool:
    """Whether a call mixes tokens: attention, or an op of the dialect that stands for a layer's own mixer."""
    known = (bool(spec(node).contracts) and not _is_product(node)) or spec(node).concept in ("attention", "mixer")
    return known or bool(spelled_out(node))


def spelled_out(node: fx.Node) -> dict[str, object]:
    """The queries and keys, or the values, that a product multiplies in an attention that is spelled out.

    Empty for any other node: such an attention is two products of computed values around a softmax.
    """
    place = _MATMULS.get(node.target)
    if place is None or _is_product(node):
        return {}
    left, right = node.args[place : place + 2]
    frontier = [node]
    for _ in range(_STEPS):
        frontier = [user for one in frontier for user in one.users if user.target not in (*_MATMULS, *_SHAPES)]
        if any(user.target in _SOFTMAX for user in frontier):
            return {"q": left, "k": right}
    above: object = left
    for _ in range(_STEPS):
        if not isinstance(above, fx.Node):
            break
        if above.target in _SOFTMAX:
            return {"v": right}
        above = above.args[0] if above.args else None
    return {}


class _Reach:
    """How far a product's result goes before another product, an attention or the residual stream takes it.

    ``attention`` names the operands that it becomes; ``mixed`` says that another mixer reads it; ``readers`` are the
    products that read it as their input;
    ``routes`` says that it decides which experts are chosen; ``output`` that it becomes the logits; ``paired`` that
    another computed value is multiplied by it, ``activated`` after an activation; ``cut`` that only parts of it go on.
    """

    def __init__(self, start: fx.Node, product: fx.Node | None = None) -> None:
        self.attention: set[str] = set()
        self.readers: list[fx.Node] = []
        self.mixed = self.routes = self.output = self.paired = self.activated = self.cut = False
        self._stacked = spec(product or start).has("experts")
        self._inside: dict[fx.Node, bool] = {start: False}
        self._walk(start)

    def _walk(self, start: fx.Node) -> None:
        queue = list(start.users)
        heapq.heapify(queue)
        seen: set[fx.Node] = set()
        while queue:
            node = heapq.heappop(queue)
            if node in seen:
                continue
            seen.add(node)
            if self._enter(node):
                for user in node.users:
                    heapq.heappush(queue, user)

    def _enter(self, node: fx.Node) -> bool:
        """Take a node in that reads something inside; whether the walk goes on behind it."""
        if node.op == "output":
            self.output = True
            return False
        if node.target in _SHAPES or spec(node).concept == "arange":
            return False
        inside = [source for source in node.all_input_nodes if source in self._inside]
        if _is_product(node):
            self._read(node, inside)
            return False
        if _is_mixer(node):
            operands = {name for source in inside for name in spec(node).names(source)} & {"q", "k", "v"}
            operands |= {name for name, source in spelled_out(node).items() if source in self._inside}
            self.attention |= operands
            self.mixed |= not operands
            return False
        others = [s for s in node.all_input_nodes if s not in self._inside and _is_computed(s)]
        if node.target in _SUMS and others:
            return False
        if node.target in _PLACED and not any(source.meta["val"].is_floating_point() for source in inside):
            return False
        activated = any(self._inside[source] for source in inside)
        if node.target in _PRODUCTS and others and not self.paired:
            self.paired, self.activated = True, activated
        self.cut |= node.target in _CUTS
        self._inside[node] = activated or node.target in _ACTIVATIONS
        return True

    def _read(self, reader: fx.Node, inside: list[fx.Node]) -> None:
        call = spec(reader)
        read = {name for source in inside for name in call.names(source)}
        stacked = call.has("experts")
        # A router picks experts, or weighs what all of them read.
        self.routes |= "experts" in read or (stacked and not self._stacked and self.paired)
        if call.product is not None and call.product.left in read:
            self.readers.append(reader)


def _is_computed(node: fx.Node) -> bool:
    """Whether a value depends on tokens: it has their number among its sizes, which nothing made of weights has."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and any(not isinstance(size, int) for size in val.shape)


def _reads_attention(node: fx.Node) -> bool:
    """Whether a product's input comes from a mixer of tokens, through no other product."""
    return any(kind == "mixer" for kind, _ in _origins(node))


def _closes(node: fx.Node) -> bool:
    """Whether a product reads the inside of an MLP: products, through an activation, and nothing else.

    What reads the residual stream comes from the embedding too, through its sums.
    """
    found = _origins(node)
    return {kind for kind, _ in found} == {"product"} and any(bent for _, bent in found)


def _origins(node: fx.Node) -> _Origins:
    """What a product's input is made of: the nearest products, mixers, embeddings and placeholders."""
    product = spec(node).product
    start = spec(node).node_of(product.left) if product is not None else None
    if start is None:
        return frozenset()
    _, known = _REMEMBERED.get(node.graph, ({}, {}))
    pending = [start]
    while pending:
        source = pending[-1]
        missing = [] if source in known else [s for s in _parts(source) if s not in known]
        if missing:
            pending += missing
            continue
        if pending.pop() not in known:
            known[source] = _origin(source) or frozenset(
                (kind, bent or not _carries(source)) for part in _parts(source) for kind, bent in known[part]
            )
    return known[start]


def _origin(source: fx.Node) -> _Origins:
    """The nearest thing that a value comes from, where it is that itself."""
    if _is_product(source):
        return frozenset({("product", False)})
    if _is_mixer(source):
        return frozenset({("mixer", False)})
    if source.op == "placeholder" or spec(source).concept == "embedding":
        return frozenset({("input", False)})
    return frozenset()


def _parts(source: fx.Node) -> list[fx.Node]:
    """What a value on the way to an origin is computed from."""
    return [] if source.target in _SHAPES or _origin(source) else source.all_input_nodes


def _carries(source: fx.Node) -> bool:
    return source.target in _CARRIES or spec(source).concept in _CARRIERS
