"""Model in, normalized program out.

``torch.export`` traces a skeleton of the model: a structural copy whose parameters are bfloat16 meta tensors. So
tracing costs no memory, works alike for models on CPU, CUDA and meta, never touches the user's model, and shows
every cast (a float32 trace would hide them: there ``.to(float32)`` is the tensor itself).
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Mapping, Set
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import mxfx.ops  # noqa: F401  (registers the dialect)
from mxfx.graph.conditions import longest_that_holds
from mxfx.graph.constants import KeepLiterals, store_literals
from mxfx.graph.errors import TraceError
from mxfx.graph.experts import experts_forward, find_weight, settle_experts
from mxfx.graph.fake import sizes_text
from mxfx.graph.functional import make_functional
from mxfx.graph.linears import settle_linears
from mxfx.graph.masks import attention_forward, mask_forward, settle_masks, traced_as
from mxfx.graph.mixers import opaque_mixers
from mxfx.graph.node import NodeInfo, kind, set_info
from mxfx.graph.normalize import normalize, remove_dead
from mxfx.graph.pieces import join_pieces
from mxfx.graph.program import GENERATION, NOMINAL_COMPUTE, NOMINAL_MODEL, Program, Source, Symbol
from mxfx.graph.prove import prove_if_possible
from mxfx.graph.refusal import is_mismatch, refusal, rope_type
from mxfx.graph.ropes import frequencies_by_length
from mxfx.graph.weights import WeightStore

_INTERFACE = "mxfx"
_MAX_BATCH = 4096
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)
_SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)
#: Tokens that a model takes that does not say.
_LONGEST = 1 << 17


def trace(model: nn.Module, *, name: str | None = None, proven: bool = True) -> Program:
    """Trace a Hugging Face causal LM (or any module with its call signature) into a ``Program``.

    The program takes ``input_ids``, ``position_ids``, ``attention_mask``, each int64 ``(batch, seq)``, and returns
    logits ``(batch, seq, vocabulary)``; batch and sequence length are dynamic. Its weights share storage with the
    model. Where the model has data, both run on a few tokens and their logits are compared (``proven``).

    Raises ``TraceError`` for a model that is no causal LM or uses what the dialect cannot express, and
    ``UnfaithfulTrace`` if the program computes something else than the model.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "forward"):
        raise TraceError(f"expected a transformers causal LM with a .config, got {type(model).__name__}")
    skeleton, exported, longest = _exported(model)
    module = exported.module(check_guards=False)
    if not make_functional(module.graph):
        module = _functional(exported, skeleton).module(check_guards=False)
    weights, rename = _weights(model, module)
    graph = _adopt_graph(module.graph, module, rename, weights.constants)
    weights = weights.extended(store_literals(graph))
    symbols = (Symbol("batch", 1, _MAX_BATCH), Symbol("seq", 1, longest))
    source = Source(
        name or getattr(config, "name_or_path", "") or type(model).__name__,
        type(model).__name__,
        _configuration(model),
    )
    program = Program(graph, weights, _dtype(model), source, symbols)
    normalize(program)
    join_pieces(program)
    settle_experts(program)
    settle_linears(program)
    _make_optional(program)
    settle_masks(program)
    remove_dead(program.graph)
    _drop_unread(program)
    if proven:
        prove_if_possible(program, model)
    return program


def bind(program: Program, model: nn.Module) -> Program:
    """The program with the weights of ``model``: for a program that was traced on the meta device.

    Raises ``TraceError`` if the model lacks a weight that the program reads, or has it in another shape.
    """
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in _named_tensors(model):
        home = first.setdefault(id(tensor), name)
        tensors[name] = tensor.detach()
        if program.weights.aliases.get(name, name) != home and name in program.weights:
            raise TraceError(f"{name} is tied to {home} in the model and not in the program: trace the model itself")
    found: dict[str, Tensor] = {}
    for name, meta in program.weights.items():
        own = find_weight(tensors, name)
        tensor = meta if own is None else own
        if tensor.shape != meta.shape or (tensor.device.type == "meta" and own is None):
            raise TraceError(f"the model has no weight {name} of shape {tuple(meta.shape)}")
        found[name] = tensor
    bound = program.copy()
    bound.dtype = _dtype(model)
    generation = _configuration(model).get(GENERATION)
    if generation is not None:
        # A model without weights is made from its configuration alone, which does not say how it generates.
        bound.source = replace(bound.source, config={**bound.source.config, GENERATION: generation})
    bound.weights = WeightStore(found, program.weights.aliases, constants=program.weights.constants)
    return bound


def _configuration(model: nn.Module) -> dict[str, object]:
    """Configuration as JSON, with the model's generation config under ``GENERATION`` where it has one."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    generation = getattr(model, "generation_config", None)
    return config if generation is None else {**config, GENERATION: json.loads(generation.to_json_string(False))}


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


class _Logits(nn.Module):
    """The part of a causal LM that a program covers: ids to logits, no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).logits


def _exported(model: nn.Module) -> tuple[nn.Module, torch.export.ExportedProgram, int]:
    """A skeleton of the model, its export, and the longest sequence that this takes.

    Where a product finds a weight and a float32 buffer, buffers beside weights get the model's dtype in the trace.
    Attention of a model's own may branch on the name of its implementation, and the branches need not agree: the one
    of no name is eager's, which may add linear biases a second time. So that of the model's own name counts.
    """

    def attempt(narrow: Set[int], name: str = _INTERFACE) -> tuple[nn.Module, torch.export.ExportedProgram, int]:
        skeleton = _skeleton(model, narrow, name)
        return skeleton, *_export(skeleton, int(_context(model.config) * frequencies_by_length(skeleton)))

    narrow: Set[int] = frozenset()
    try:
        found = attempt(narrow)
    except TraceError as error:
        holders = [module for module in model.modules() if next(module.parameters(), None) is not None]
        narrow = {id(buffer) for module in holders for buffer in module.buffers(recurse=False)}
        if not narrow or not is_mismatch(error.__cause__):
            raise
        found = attempt(narrow)
    own = getattr(model.config, "_attn_implementation", None)
    if own != "sdpa" or not _has_own_attention(found[1]):
        return found
    with traced_as(own):
        return attempt(narrow, own)


def _skeleton(model: nn.Module, narrow: Set[int], implementation: str) -> nn.Module:
    """A structural copy without data: bfloat16 meta parameters, meta buffers, its own config.

    The buffers whose identities ``narrow`` holds are bfloat16 too; ``implementation`` names its attention.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        dtype = NOMINAL_MODEL if parameter.is_floating_point() else parameter.dtype
        empty = torch.empty_like(parameter, device="meta", dtype=dtype)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        # Buffers such as inv_freq hold float32 constants whatever the model's dtype.
        nominal = NOMINAL_MODEL if id(buffer) in narrow else NOMINAL_COMPUTE
        dtype = nominal if buffer.is_floating_point() else buffer.dtype
        memo[id(buffer)] = torch.empty_like(buffer, device="meta", dtype=dtype)
    skeleton = copy.deepcopy(model, memo)
    skeleton.eval()
    _register_interfaces()
    for module in skeleton.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = implementation
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = _INTERFACE
    return skeleton


def _context(config: object) -> int:
    """How many tokens a model takes, by what its configuration calls it."""
    fields = ("max_position_embeddings", "max_seq_len", "max_sequence_length")
    return next((int(found) for field in fields if (found := getattr(config, field, None))), _LONGEST)


def _export(skeleton: nn.Module, longest: int) -> tuple[torch.export.ExportedProgram, int]:
    """The exported program and the longest sequence that it takes, at most ``longest``.

    What the exporter cannot prove of its sizes is tried on sizes: ``longest_that_holds``.
    """
    # Distinct tensors: one tensor passed three times would be traced as one input.
    example = tuple(torch.zeros(2, 17, dtype=torch.int64, device="meta") for _ in range(3))
    dims = {0: Dim("batch", min=1, max=_MAX_BATCH), 1: Dim("seq", min=2, max=longest)}

    def exported(deferred: bool) -> torch.export.ExportedProgram:
        with torch.no_grad(), KeepLiterals(), opaque_mixers(skeleton):
            return torch.export.export(
                _Logits(skeleton),
                example,
                strict=False,
                dynamic_shapes=(dims, dims, dims),
                prefer_deferred_runtime_asserts_over_guards=deferred,
            )

    try:
        return exported(False), longest
    except TraceError:
        raise
    except Exception as error:
        if "Constraints violated" in str(error):
            # Where this fails too, the first refusal says more.
            found = None
            with contextlib.suppress(Exception):
                found = exported(True)
            if found is not None:
                with contextlib.suppress(TraceError):
                    return found, longest_that_holds(found, longest)
        raise TraceError(f"torch.export cannot trace {type(skeleton).__name__}: {refusal(error, skeleton)}") from error


def _functional(exported: torch.export.ExportedProgram, skeleton: nn.Module) -> torch.export.ExportedProgram:
    """The program, traced anew without an op that changes its operand; nothing is decomposed beyond that.

    Raises ``TraceError`` if the model changes one of its own tensors: a program keeps no state.
    """
    functional = exported.run_decompositions({})
    signature = functional.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        path, _, name = written[0].removeprefix("model.").rpartition(".")
        kind = rope_type(skeleton, path)
        why = "" if kind is None else f" (RoPE of type {kind!r} depends on the length of its input)"
        raise TraceError(f"the forward pass writes {name} of {path or 'the model'}{why}; a program keeps no state")
    return functional


def _register_interfaces() -> None:
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_INTERFACE, attention_forward)
    AttentionMaskInterface.register(_INTERFACE, mask_forward)
    ExpertsInterface.register(_INTERFACE, experts_forward)


def _has_own_attention(exported: torch.export.ExportedProgram) -> bool:
    """Whether scores are made in a model and its attention came through no interface."""
    called = {node.target for node in exported.graph.nodes}
    return torch.ops.mxfx.attention.default not in called and not called.isdisjoint(_SOFTMAX)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _weights(model: nn.Module, module: fx.GraphModule) -> tuple[WeightStore, Mapping[str, str]]:
    """The store over the model's own tensors, and exported name → store name.

    Ties are found by identity of the model's parameters; the canonical name is the first one that the model lists.
    """
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in _named_tensors(model):
        home = first.setdefault(id(tensor), name)
        if home == name:
            tensors[name] = tensor.detach()
        else:
            aliases[name] = home
    rename: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        target = str(node.target).removeprefix("model.")
        if target in tensors or target in aliases:
            rename[str(node.target)] = target
            continue
        constant = _lookup(module, str(node.target))
        name = f"constants.{node.target}"
        if not isinstance(constant, Tensor) or constant.device.type == "meta":
            raise TraceError(f"the trace reads {node.target!r}, which is no parameter or buffer of the model")
        tensors[name] = constant.detach()
        rename[str(node.target)] = name
    buffers = {name for name, _ in model.named_buffers()} | {n for n in tensors if n.startswith("constants.")}
    return WeightStore(tensors, aliases, constants=frozenset(buffers)), rename


def _make_optional(program: Program) -> None:
    """Let ``position_ids`` and ``attention_mask`` be absent: positions are counted, no mask means no padding."""
    input_ids, position_ids, attention_mask = (n for n in program.graph.nodes if n.op == "placeholder")
    for optional in (position_ids, attention_mask):
        for user in [u for u in optional.users if u.target is torch.ops.aten.sym_size.int]:
            user.update_arg(0, input_ids)
    with program.graph.inserting_after(attention_mask):
        counted = program.graph.call_function(
            torch.ops.mxfx.positions.default, (input_ids, position_ids, attention_mask)
        )
        real = program.graph.call_function(torch.ops.mxfx.real_tokens.default, (input_ids, attention_mask))
    for made, given in ((counted, position_ids), (real, attention_mask)):
        made.meta = {"val": given.meta["val"]}
        set_info(made, NodeInfo())
        given.replace_all_uses_with(made, delete_user_cb=lambda user: user not in (counted, real))
    for node in program.nodes("attention", "position_mask", "places"):
        if kind(node) != "attention":
            node.update_arg(0, input_ids)
        position = {"attention": 3, "position_mask": 1}.get(kind(node))
        if position is not None and _before_copies(node.args[position]) is real:
            # Either takes the mask as it is given: as numbers, as bool, or not at all.
            node.update_arg(position, attention_mask)


def _before_copies(node: object) -> object:
    """The value behind casts and views in its own shape."""
    while isinstance(node, fx.Node) and (
        node.target is torch.ops.aten.to.dtype
        or (node.target in _VIEWS and sizes_text(node.meta["val"]) == sizes_text(node.args[0].meta["val"]))
    ):
        node = node.args[0]
    return node


def _drop_unread(program: Program) -> None:
    """Forget buffers that the model keeps and its logits do not depend on."""
    read = {program.weights.canonical(str(n.target)) for n in program.graph.nodes if n.op == "get_attr"}
    for name in [name for name in program.weights if name not in read]:
        program.weights.drop(name)


def _lookup(module: nn.Module, target: str) -> object:
    found: object = module
    for atom in target.split("."):
        found = getattr(found, atom, None)
    return found


def _adopt_graph(graph: fx.Graph, module: fx.GraphModule, rename: Mapping[str, str], constants: Set[str]) -> fx.Graph:
    """The exported graph with plain placeholders, store names, module paths and fake values on every node."""
    mode = next(v for n in graph.nodes if (v := n.meta.get("val")) is not None and hasattr(v, "fake_mode")).fake_mode
    result = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            (logits,) = tree_leaves(node.args)
            result.output(env[logits])
            continue
        copied = result.node_copy(node, lambda n: env[n])
        env[node] = copied
        copied.meta = {k: v for k, v in node.meta.items() if k in ("val", "stack_trace")}
        if node.op == "placeholder" and node.target != "input_ids":
            copied.args = (None,)
        if node.op == "get_attr":
            attribute = _lookup(module, str(node.target))
            copied.target = rename[str(node.target)]
            copied._rename(copied.target.replace(".", "_"))
            copied.meta["val"] = mode.from_tensor(torch.empty_like(attribute, device="meta"), static_shapes=True)
            if attribute.dtype == NOMINAL_MODEL and copied.target in constants:
                # A constant runs in compute precision; this one was traced in the model's dtype.
                env[node] = result.call_function(torch.ops.mxfx.cast.default, (copied, "model"))
                env[node].meta["val"] = copied.meta["val"]
                set_info(env[node], NodeInfo(path=_module_path(node)))
                copied.meta["val"] = copied.meta["val"].to(NOMINAL_COMPUTE)
        set_info(copied, NodeInfo(path=_module_path(node)))
    return result


def _module_path(node: fx.Node) -> str:
    """Innermost module of the call, without the wrapper's prefix."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    # Nodes that no module made carry a placeholder of torch.export's instead of a path.
    wrapped, _, path = (stack[-1][0] if stack else "").partition(".")
    return path if wrapped == "model" else ""
