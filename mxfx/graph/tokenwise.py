"""Does a node treat each token by itself? What does not, and is no attention, needs a state that no cache holds."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mxfx.graph.node import kind, op_name, operands

#: Ops of the dialect that look at more than one token, or at where a token stands.
_ACROSS = frozenset({"arange", "places", "position_mask", "real_tokens"})
_ATTENTION = frozenset({"attention", "cached_attention"})
#: Ops that only rename, reorder or copy axes, or look something up for each token.
_SHAPES = """view _unsafe_view reshape flatten unflatten transpose permute t unsqueeze squeeze expand expand_as alias
contiguous clone split split_with_sizes chunk unbind getitem repeat repeat_interleave new_zeros new_ones new_full
zeros_like ones_like full_like sym_size to _to_copy embedding item scalar_tensor view_as"""
#: Ops with an axis ``dim`` along which they mix, cut or join.
_ALONG = """softmax _softmax log_softmax _log_softmax cumsum cumprod sum mean amax amin max min argmax argmin topk
sort std var norm logsumexp prod slice select narrow cat concat stack gather scatter slice_scatter select_scatter
index_select flip roll any all var_mean std_mean"""
_PRODUCTS = "linear matmul mm bmm addmm baddbmm _grouped_mm"
_NORMS = "layer_norm native_layer_norm rms_norm _fused_rms_norm"
_POINTWISE = """where masked_fill type_as glu rsub multiply divide true_divide subtract polar complex view_as_complex
view_as_real real imag softplus"""


def mixes_tokens(node: fx.Node, length: object) -> str | None:
    """Why a node other than attention may let tokens see each other; None if it surely does not.

    ``length`` is the symbolic size of the sequence axis.
    """
    if node.op != "call_function" or kind(node) in _ATTENTION:
        return None
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "mxfx":
        # Numbers of channels or experts are no positions.
        if kind(node) == "mixer":
            return "it mixes tokens through a state of its own"
        counted = kind(node) != "arange" or not all(isinstance(bound, int) for bound in node.args[1:])
        return "it counts positions by itself" if kind(node) in _ACROSS and counted else None
    if not any(_has(val, length) for operand in node.all_input_nodes for val in _tensors(operand)):
        return None
    name = _name(node)
    if name in f"{_SHAPES} {_NORMS}".split() or _is_pointwise(node):
        return None
    if name == "index" and not _has(_tensors(node.all_input_nodes[0])[0], length):
        # A table that is looked up for each token.
        return None
    if name in _ALONG.split():
        return _along(node, length)
    if name in _PRODUCTS.split():
        return _contracted(node, length)
    return f"{op_name(node)} may mix tokens"


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", "")


def _is_pointwise(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", "") == "_operator"
    return torch.Tag.pointwise in node.target.tags or _name(node) in _POINTWISE.split()


def _along(node: fx.Node, length: object) -> str | None:
    given = operands(node)
    dims = given.get("dim", given.get("dims"))
    source = next(val for operand in node.all_input_nodes for val in _tensors(operand))
    axes = [dims] if isinstance(dims, int) else dims if isinstance(dims, list | tuple) and dims else range(source.dim())
    if any(_depends(source.shape[axis], length) for axis in axes):
        return f"{op_name(node)} mixes tokens along axis {dims}"
    return None


def _contracted(node: fx.Node, length: object) -> str | None:
    tensors = [val for operand in node.all_input_nodes for val in _tensors(operand)]
    first, second = tensors[-2:] if _name(node) in ("addmm", "baddbmm") else tensors[:2]
    across = second.shape[-1] if _name(node) == "linear" or second.dim() == 1 else second.shape[-2]
    if _depends(first.shape[-1], length) or _depends(across, length):
        return f"{op_name(node)} sums over tokens"
    return None


def _tensors(node: fx.Node) -> list[Tensor]:
    val = node.meta.get("val")
    return [v for v in (val if isinstance(val, list | tuple) else (val,)) if isinstance(v, Tensor)]


def _has(val: Tensor, length: object) -> bool:
    return any(_depends(size, length) for size in val.shape)


def _depends(size: object, length: object) -> bool:
    if isinstance(size, int):
        return False
    return bool(size.node.expr.free_symbols & length.node.expr.free_symbols)
