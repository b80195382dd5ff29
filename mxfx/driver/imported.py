"""``mxfx import``: a checkpoint that another tool quantized, as an emitted model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxfx.config import loads
from mxfx.driver.options import DTYPES, check_dtype
from mxfx.driver.pretrained import Loaded, ModelError, load_checked, load_tokenizer
from mxfx.export.folder import save_folder
from mxfx.export.nvfp4 import find_nvfp4
from mxfx.formats import E4M3
from mxfx.graph.node import info, path_of
from mxfx.graph.program import Program
from mxfx.graph.trace import trace
from mxfx.ground.errors import reason_of
from mxfx.ground.files import new_folder, read_json, why_not_new
from mxfx.ops.catalogue import spec
from mxfx.passes import InsertFakeQuant, RoundWeights
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Rewriter
from mxfx.rewrite.operands import mark_rounded
from mxfx.rewrite.parts import whole

#: ``(type, bits, group size)`` of compressed-tensors → format.
_FORMATS = {("float", 4, 32): "mxfp4_e2m1@32", ("float", 8, 32): "mxfp8_e4m3@32", ("float", 4, 16): "nvfp4"}


def import_checkpoint(folder: Path, out: Path, dtype: str | None = None) -> Iterator[str]:
    """Read with transformers and compressed-tensors, annotate, write to ``out``; yields what was found, line by line.

    The emitted model runs in ``dtype``, else in that of the checkpoint's ``config.json``. Quantized weights keep their
    values bit for bit; activations are rounded as the checkpoint's configuration asks, by this project's rule for
    scales. Raises ``ModelError`` for another kind of checkpoint or another format, one that lacks weights, a precision
    that its weights leave, and a folder that is not new; ``ConfigError`` for a ``dtype`` that is none.
    """
    if dtype is not None:
        check_dtype(dtype)
    if (why := why_not_new(out)) is not None:
        raise ModelError(f"{out} {why}; give a new folder with --out")
    config = _config(folder)
    groups = _groups(folder, config)
    dtype, whose = (dtype, "as asked") if dtype is not None else _own_dtype(folder, config)
    from transformers import CompressedTensorsConfig

    def read(dtype: str) -> Loaded:
        return load_checked(folder, dtype, quantization_config=CompressedTensorsConfig(dequantize=True))

    loaded = read(dtype)
    if loaded.warnings:
        raise ModelError(f"{loaded.warnings[0]}; expected a whole checkpoint")
    model = loaded.model
    model.config.quantization_config = None
    program = trace(model, name=str(folder))
    rules, lines = _rules(program, groups)
    text = "[[pass]]\nname = 'annotate'\npartial = true\n" + rules
    annotated = PassManager().run(program, loads(text, str(folder)).completed()).program
    if dtype == "float16":
        _check_range(folder, annotated, read("float32").model)
    rest = [RoundWeights(), *([InsertFakeQuant()] if "input =" in rules else [])]
    result = PassManager().run(_with_nvfp4_as_it_is(annotated, folder), rest)
    moved = [name for name in program.weights if not torch.equal(program.weights[name], whole(result.program, name))]
    if moved:
        raise ModelError(f"{folder}: {moved[0]} does not lie on the grid that config.json names")
    yield from lines
    yield f"runs in {dtype}, {whose}"
    tokenizer = load_tokenizer(folder)
    with new_folder(out) as partial:
        save_folder(result.program, partial, tokenizer=tokenizer)
    yield f"written to {out}"


def _with_nvfp4_as_it_is(program: Program, folder: Path) -> Program:
    """With the NVFP4 weights known to be rounded: rounding them anew would find other scales for them."""
    rw = Rewriter(program.copy(), "import")
    for node in rw.program.products():
        annotation = info(node).formats.get("weight")
        if annotation is None or not isinstance(annotation.format.scale, E4M3):
            continue
        name = rw.program.weight_of(node)
        if find_nvfp4(rw.program.weights[name]) is None:
            raise ModelError(f"{folder}: {name} does not lie on the grid that config.json names")
        mark_rounded(rw, node, "weight")
    return rw.program


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no config.json that can be read: {reason_of(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{folder / 'config.json'}: expected an object, it holds {type(found).__name__}")
    return found


def _own_dtype(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    """The precision that a checkpoint says it is of, with who says so."""
    text = config.get("text_config") or {}
    named = next((part[key] for part in (config, text) for key in ("dtype", "torch_dtype") if part.get(key)), None)
    if named is None:
        return "float32", "since its config.json names no dtype; --dtype gives another"
    if named not in DTYPES:
        raise ModelError(f"{folder / 'config.json'}: no graph runs in dtype {named!r}; give one of {DTYPES} by --dtype")
    return named, "the dtype of its config.json"


def _check_range(folder: Path, program: Program, exact: nn.Module) -> None:
    """Raise ``ModelError`` where float16, of all precisions the one with few exponents, does not hold a weight's codes.

    ``exact`` is the same model in float32.
    """
    for node in program.products():
        name = program.weight_of(node)
        if "weight" in info(node).formats and not torch.equal(program.weights[name].float(), exact.get_parameter(name)):
            raise ModelError(f"{folder}: {name} has values outside float16's range; give --dtype bfloat16 or float32")


def _groups(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("quantization_config") or {}
    if found.get("quant_method") != "compressed-tensors":
        raise ModelError(
            f"{folder} is no compressed-tensors checkpoint: its quant_method is {found.get('quant_method')}"
        )
    if found.get("kv_cache_scheme") is not None:
        raise ModelError(
            f"{folder / 'config.json'}: kv_cache_scheme asks for a quantized cache, which no format here stands for; "
            "expected null: the model would be measured without"
        )
    return found


def _rules(program: Program, groups: Mapping[str, Any]) -> tuple[str, list[str]]:
    paths = [path_of(node) for node in program.graph.nodes if spec(node).concept == "linear"]
    ignored = [path for path in paths if _targeted(path, groups.get("ignore") or [])]
    rules, lines = "", []
    for name, group in groups["config_groups"].items():
        weight, input_ = _format(group.get("weights")), _format(group.get("input_activations"))
        chosen = [p for p in paths if p not in ignored and _targeted(p, group["targets"])]
        if weight is None or not chosen:
            raise ModelError(f"group {name!r}: expected MXFP4, MXFP8 or NVFP4 weights of at least one linear")
        rules += "[[pass.rule]]\nmatch = '" + "|".join(map(re.escape, chosen)) + "'\n"
        rules += f"weight = '{weight}'\n" + (f"input = '{input_}'\n" if input_ is not None else "")
        lines.append(f"{len(chosen)} linears: weights {weight}, inputs {input_ or 'float'}")
    return rules, lines


def _targeted(path: str, targets: list[str]) -> bool:
    return any(
        target == "Linear" or target == path or (target.startswith("re:") and re.match(target[3:], path) is not None)
        for target in targets
    )


def _format(args: Mapping[str, Any] | None) -> str | None:
    if args is None:
        return None
    key = (args.get("type"), args.get("num_bits"), args.get("group_size"))
    if key not in _FORMATS:
        raise ModelError(
            f"{args.get('num_bits')}-bit {args.get('type')} in groups of {args.get('group_size')} is no MX"
        )
    return _FORMATS[key]
