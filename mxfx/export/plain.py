"""A program as its source model holds it: a state dict, the formats that it lies on, and what the model cannot do.

What other libraries open is the source's own architecture with other weights. So a program can be given to them as far
as its graph is the source's: rounded weights and changes of basis that lie in weights are; transforms at run time and
formats of activations are not, and are listed, each with its reason.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxfx.export.errors import ExportError
from mxfx.export.unpack import unpacked
from mxfx.formats import E8M0, Encoded, Format, ScaleRule
from mxfx.graph.execute import execute
from mxfx.graph.experts import TRANSPOSED
from mxfx.graph.node import info, kind, op_name, path_of, paths_of
from mxfx.graph.program import GENERATION, Program
from mxfx.graph.weights import WeightStore
from mxfx.ground.files import write_json
from mxfx.rewrite.basis import bias_of
from mxfx.rewrite.operands import is_rounded
from mxfx.rewrite.parts import parts, whole
from mxfx.runtime.causal_lm import configs_of, with_floats

_TRANSFORMS = ("hadamard", "block_transform", "transform_quantize", "hadamard_quantize", "norm_quantize")
_PROBE = (2, 12)


@dataclass(frozen=True)
class Plain:
    """A program in the terms of its source model.

    config: the Hugging Face configuration that fits ``state``.
    state: every parameter by its name in the source model, in the dtype that the program runs in.
    formats: parameter → the format whose grid it lies on, blocks along its last axis.
    inputs: module path → format of its quantized input.
    lost: what the source model does not do and the program does, one sentence each.
    mixed: parameters whose parts lie on grids of several formats: none of them is the whole parameter's.
    turned: parameter → format, for those that the source model keeps as ``(…, in, out)``: blocks along the axis before
    the last.
    """

    program: Program
    config: Any
    state: Mapping[str, Tensor]
    formats: Mapping[str, Format]
    inputs: Mapping[str, Format]
    lost: tuple[str, ...]
    mixed: tuple[str, ...] = ()
    turned: Mapping[str, Format] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """The source model with this state, without its computed buffers: to be saved, not run.

        Raises ``ExportError`` for a stored buffer that the program does not hold.
        """
        model = _skeleton(self.config)
        model.load_state_dict(dict(self.state), strict=False, assign=True)
        model.tie_weights()
        bare = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if bare:
            raise ExportError(f"the source model stores {bare[0]}, which the program does not hold")
        return model.eval()

    def write_generation(self, folder: Path) -> None:
        """How the source model generates (the ends of its texts, sampling), as transformers and servers read it."""
        write_json(folder / "generation_config.json", configs_of(self.program)[1].to_diff_dict())

    def embeddings(self) -> frozenset[str]:
        """Names of the token embedding's table, those of a head that shares it included."""
        skeleton = _skeleton(self.config)
        table = skeleton.get_input_embeddings()
        named = skeleton.named_parameters(remove_duplicate=False)
        return frozenset(name for name, parameter in named if table is not None and parameter is table.weight)

    def linears(self) -> tuple[str, ...]:
        """Paths of the source model's linears."""
        return tuple(path for path, module in _skeleton(self.config).named_modules() if isinstance(module, nn.Linear))

    def tied_copies(self) -> frozenset[str]:
        """Names under which the source model lists a tensor again: files hold it once, under its first name."""
        skeleton = _skeleton(self.config)
        first = {name for name, _ in skeleton.named_parameters()}
        return frozenset(name for name, _ in skeleton.named_parameters(remove_duplicate=False) if name not in first)

    def simulated(self, input_ids: Tensor) -> Tensor:
        """Float32 logits of the program on this state, its activations in full precision."""
        twin = self.program.copy()
        store = twin.weights
        rounded = {n: t if n in store.constants else t.to(self.program.dtype).float() for n, t in store.items()}
        twin.weights = WeightStore(rounded, store.aliases, constants=store.constants)
        twin.dtype = torch.float32
        return execute(twin, input_ids, quantize=False)

    def probe(self) -> Tensor:
        """Token ids to compare on, int64 ``(2, 12)``, the same each time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(int(self.config.vocab_size), _PROBE, generator=generator)


def plain(program: Program) -> Plain:
    """See ``Plain``. Raises ``ExportError`` for a lowered program, whose concepts are gone."""
    program = unpacked(program)
    if "lowered" in program.facts:
        raise ExportError("the program is lowered: linears and norms cannot be told any more; export one that is not")
    config = source_config(program)
    skeleton = _skeleton(config)
    if _shares_head(skeleton) and not _agree(program, skeleton):
        config.tie_word_embeddings = False
        skeleton = _skeleton(config)
    state = _state(program, skeleton)
    rounded = _rounded(program)
    formats = {name: fmt for name, fmt in rounded.items() if name in state and fmt is not None}
    mixed = tuple(name for name, fmt in rounded.items() if fmt is None)
    turned = {n.removesuffix(TRANSPOSED): f for n, f in rounded.items() if n.endswith(TRANSPOSED) and f is not None}
    return Plain(program, config, state, formats, _inputs(program), tuple(_lost(program)), mixed, turned)


def on_grid(weight: Tensor, fmt: Format) -> Encoded:
    """Codes and scales of a weight that lies on the grid of ``fmt`` along its last axis: they decode to its bits.

    Exponents are found anew, by least error: the rule that chose them may choose others for what it rounded.
    """
    searched = replace(fmt, scale=E8M0(ScaleRule.MSE)) if isinstance(fmt.scale, E8M0) else fmt
    encoded = searched.encode(weight.float())
    if not torch.equal(fmt.decode(encoded), weight.float()):
        raise ExportError(
            f"a weight of shape {tuple(weight.shape)} is said to be in {fmt} and does not lie on its grid"
        )
    return encoded


def source_config(program: Program) -> Any:
    """The source model's configuration, as transformers builds it from what the program keeps."""
    from transformers import AutoConfig

    values = dict(program.source.config)
    for key in ("transformers_version", "_attn_implementation", "_name_or_path", "loss_type", GENERATION):
        values.pop(key, None)
    return AutoConfig.for_model(str(values.pop("model_type")), **with_floats(values))


def _skeleton(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _state(program: Program, skeleton: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    names = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, parameter in names.items():
        twin = next((n for n, p in names.items() if p is parameter and n in program.weights), None)
        if name in program.weights or twin is not None:
            tensor = program.weights[name if name in program.weights else twin]
        elif f"{name}{TRANSPOSED}" in program.weights:
            tensor = program.weights[f"{name}{TRANSPOSED}"].mT
        elif name in parts(program):
            tensor = whole(program, name)
        elif f"{name}{TRANSPOSED}" in parts(program):
            tensor = whole(program, f"{name}{TRANSPOSED}").mT
        elif (neutral := _neutral(skeleton, name, parameter)) is not None:
            tensor = neutral
        else:
            raise ExportError(f"the program has no weight {name}, which the source model needs")
        if tensor.shape != parameter.shape:
            raise ExportError(f"{name} is {tuple(tensor.shape)} in the program, {tuple(parameter.shape)} in the model")
        state[name] = tensor.detach().cpu().to(program.dtype).contiguous()
    known = {*names, *(part for held in parts(program).values() for part in held)}
    for node in program.products():
        bias = bias_of(node)
        if bias is not None and bias not in known:
            raise ExportError(
                f"{path_of(node)} adds {bias}, for which the source model has no place: fuse-norm put the bias of a "
                "norm there; leave that norm out of its select"
            )
    return state


def _neutral(skeleton: nn.Module, name: str, parameter: nn.Parameter) -> Tensor | None:
    """The value at which a norm's gain or bias does nothing, for one that a pass folded away: what its module starts
    from. None for a parameter of another module.
    """
    owner = skeleton.get_submodule(name.rpartition(".")[0])
    if parameter.dim() != 1 or any(True for _ in owner.children()) or isinstance(owner, nn.Linear):
        return None
    fresh = copy.deepcopy(owner).to_empty(device="cpu")
    skeleton._init_weights(fresh)
    return fresh.get_parameter(name.rpartition(".")[2]).detach().float()


def _rounded(program: Program) -> dict[str, Format | None]:
    """Weight → format, for weights that lie on a grid along their last axis; None where their parts lie on several."""
    found: dict[str, Format | None] = {}
    for node in program.graph.nodes:
        annotation = info(node).formats.get("weight")
        if annotation is not None and is_rounded(node, "weight"):
            name = program.weight_of(node)
            for alias in (name, *program.weights.tied_to(name)):
                found[alias] = annotation.format
    for source, held in parts(program).items():
        of_parts = {found.pop(part, None) for part in held}
        if of_parts != {None}:
            found[source] = of_parts.pop() if len(of_parts) == 1 else None
    return found


def _shares_head(skeleton: nn.Module) -> bool:
    output, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    return output is not None and embedding is not None and output.weight is embedding.weight


def _agree(program: Program, skeleton: nn.Module) -> bool:
    """Whether embedding and head, one tensor in the source, still are equal."""
    shared = id(skeleton.get_output_embeddings().weight)
    names = [name for name, p in skeleton.named_parameters(remove_duplicate=False) if id(p) == shared]
    first, *rest = [program.weights[name] for name in names if name in program.weights]
    return all(torch.equal(first, other) for other in rest)


def _inputs(program: Program) -> dict[str, Format]:
    return {
        paths_of(node)[-1]: info(node).formats["input"].format
        for node in program.graph.nodes
        if "input" in info(node).formats and kind(node) == "linear"
    }


def _lost(program: Program) -> list[str]:
    found: Counter[str] = Counter()
    for node in program.graph.nodes:
        if kind(node) in _TRANSFORMS:
            found[f"a transform at run time ({op_name(node)})"] += 1
        for operand, annotation in info(node).formats.items():
            if kind(node) == "attention":
                found[f"attention's {operand} in {annotation.format}"] += 1
            elif operand != "weight" and not (kind(node) == "linear" and operand == "input"):
                found[f"{kind(node) or op_name(node)}'s {operand} in {annotation.format}"] += 1
    return [f"{what}, {count} times" for what, count in found.items()]
