"""``--to compressed-tensors``: packed weights as vLLM, SGLang and transformers read them.

Written with the library's own configuration classes, read back by transformers through its decompressors. An MXINT
weight is an integer weight in groups whose scales happen to be powers of two: ``pack-quantized`` holds it exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxfx.export.errors import ExportError
from mxfx.export.nvfp4 import find_nvfp4
from mxfx.export.plain import Plain, on_grid
from mxfx.export.prove import opened, same_logits, same_values
from mxfx.export.target import Target, register
from mxfx.formats import E4M3, E8M0, FloatElement, Format, IntElement

_NVFP4 = "nvfp4-pack-quantized"


def refuse(given: Plain) -> str | None:
    if given.lost:
        return given.lost[0]
    if given.turned:
        return f"the source model keeps {next(iter(given.turned))} as (in, out): its blocks run along the first axis"
    if not given.formats:
        return "no weight is rounded; --to hf writes a plain model"
    if given.mixed:
        return f"the parts of {given.mixed[0]} are in several formats: it stores one for the whole"
    kinds = {scheme_of(fmt) for fmt in _linear(given).values()}
    if None in kinds:
        odd = next(f"{name} in {fmt}" for name, fmt in _linear(given).items() if scheme_of(fmt) is None)
        return f"{odd}: it knows MXFP4 and MXFP8 (e4m3) in blocks of 32, NVFP4, and integers of 4 and 8 bits"
    if (ragged := _ragged(given)) is not None:
        return f"{ragged}: its readers take rows of whole blocks"
    if len(kinds) > 1:
        return f"weights in {len(kinds)} formats ({', '.join(sorted(map(str, kinds)))}); its reader takes one a file"
    if _NVFP4 in kinds and given.inputs:
        return (
            "inputs in nvfp4: its readers divide them by one number fixed at calibration, and here that number is each "
            "call's own; a model with NVFP4 weights alone can be written"
        )
    strange = {f for path, f in given.inputs.items() if _stem(f) != _stem(given.formats.get(f"{path}.weight"))}
    return f"inputs in {next(iter(strange))}, which differ from their weights' format" if strange else None


def _ragged(given: Plain) -> str | None:
    """A weight whose rows are no whole number of blocks."""
    linear = ((name, fmt, given.state[name].shape[-1]) for name, fmt in _linear(given).items())
    odd = ((n, f, width) for n, f, width in linear if f.block is not None and width % f.block)
    return next((f"{name} in {fmt} has rows of {width}" for name, fmt, width in odd), None)


def scheme_of(fmt: Format) -> str | None:
    """The library's name of a weight format; None if it has none."""
    element = fmt.element
    if isinstance(fmt.scale, E4M3):
        return _NVFP4
    if not isinstance(fmt.scale, E8M0):
        return None
    if isinstance(element, IntElement) and fmt.block is not None and element.bits in (4, 8):
        return "pack-quantized"
    if isinstance(element, FloatElement) and fmt.block == 32:
        return {"e2m1": "mxfp4-pack-quantized", "e4m3": "mxfp8-quantized"}.get(element.name)
    return None


def write(given: Plain, folder: Path, tokenizer: Any) -> tuple[str, ...]:
    from huggingface_hub import save_torch_state_dict

    linear = _linear(given)
    scheme = next(scheme for fmt in linear.values() if (scheme := scheme_of(fmt)))
    state: dict[str, Tensor] = {}
    tied = given.tied_copies()
    for name, tensor in given.state.items():
        if name in tied:
            continue
        if name in linear:
            state |= _packed(name.removesuffix(".weight"), tensor, linear[name], scheme)
        else:
            state[name] = tensor
    config = given.config
    config.dtype = given.program.dtype
    config.architectures = [given.program.source.architecture]
    config.quantization_config = _config(given, linear, scheme)
    config.save_pretrained(folder)
    given.write_generation(folder)
    save_torch_state_dict(state, folder, max_shard_size="4GB", metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    notes = [f"{len(linear)} weights packed as {scheme}"]
    if given.inputs:
        notes.append(
            f"its readers round the inputs of {len(given.inputs)} linears in the same format, by the library's own "
            "rule for scales"
        )
    if scheme == _NVFP4:
        notes.append("each tensor has a scale of its own; a reader that fuses q, k, v or gate, up takes one for all")
    kept = [name for name in given.formats if name not in linear]
    if kept:
        notes.append(f"{kept[0]} lies on its grid and is stored in {given.program.dtype}: only linears are packed")
    return tuple(notes)


def prove(given: Plain, folder: Path) -> Mapping[str, object]:
    from transformers import CompressedTensorsConfig

    read = opened(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    named = {n: p.detach() for n, p in read.named_parameters(remove_duplicate=False)}
    if set(named) != set(given.state):
        raise ExportError(f"transformers reads other parameters: {sorted(set(named) ^ set(given.state))[:3]}")
    return same_values(given, named) | same_logits(given, read) | _stored(folder, _linear(given))


def _stored(folder: Path, linear: Mapping[str, Format]) -> dict[str, object]:
    """No tensor that the configuration calls quantized is float in the files: every target has its codes there."""
    from safetensors import safe_open

    kinds: dict[str, str] = {}
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        total += file.stat().st_size
        with safe_open(file, "pt") as opened:
            kinds |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    for name in linear:
        found = [kinds[n] for n in (name, f"{name}_packed") if n in kinds]
        if len(found) != 1 or found[0] in ("F64", "F32", "BF16", "F16"):
            raise ExportError(f"{name} is to be quantized, and the files hold it as {' and '.join(found) or 'nothing'}")
    return {"bytes": total}


def _linear(given: Plain) -> dict[str, Format]:
    """Formats of the linears' weights; an embedding's, or one that it shares with the head, is not packed."""
    shared = given.embeddings()
    return {name: fmt for name, fmt in given.formats.items() if name not in shared}


def _packed(path: str, weight: Tensor, fmt: Format, scheme: str) -> dict[str, Tensor]:
    if scheme == _NVFP4:
        return _nvfp4(path, weight)
    encoded = on_grid(weight, fmt)
    assert encoded.scales is not None
    if scheme == "mxfp4-pack-quantized":
        return {f"{path}.weight_packed": fmt.pack(encoded.codes), f"{path}.weight_scale": encoded.scales}
    if scheme == "mxfp8-quantized":
        codes = encoded.codes.view(torch.float8_e4m3fn)
        return {f"{path}.weight": codes, f"{path}.weight_scale": encoded.scales}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scale = torch.exp2(encoded.scales.float() - 127).to(weight.dtype)
    return {
        f"{path}.weight_packed": pack_to_int32(encoded.codes, fmt.bits),
        f"{path}.weight_scale": scale,
        f"{path}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _nvfp4(path: str, weight: Tensor) -> dict[str, Tensor]:
    found = find_nvfp4(weight)
    if found is None:
        why = (
            "its reader decodes NVFP4 to bfloat16: compile with model.dtype = 'bfloat16'"
            if weight.dtype != torch.bfloat16
            else "under every scale of the tensor some number that lies halfway between two of bfloat16 reads back as "
            "the other one (rare for nvfp4, frequent for nvfp4/four-over-six)"
        )
        raise ExportError(f"{path}.weight in nvfp4 has no codes that read back as its bits; {why}")
    return {
        f"{path}.weight_packed": found.packed,
        f"{path}.weight_scale": found.scales,
        f"{path}.weight_global_scale": found.divisor,
    }


def _config(given: Plain, linear: Mapping[str, Format], scheme: str) -> dict[str, object]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    fmt = next(iter(linear.values()))
    integer = isinstance(fmt.element, IntElement)
    common: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": "int" if integer else "float",
        "strategy": "tensor_group" if scheme == _NVFP4 else "group",
        "group_size": fmt.block,
        "symmetric": True,
    }
    if not integer:
        dtype = torch.float8_e4m3fn if scheme == _NVFP4 else torch.uint8
        common |= {"scale_dtype": dtype, "zp_dtype": dtype}
    paths = [name.removesuffix(".weight") for name in linear]
    groups: dict[str, Any] = {}
    for rounds in (True, False):
        if targets := [path for path in paths if (path in given.inputs) is rounds]:
            inputs = QuantizationArgs(**common, dynamic=True) if rounds else None
            groups[f"group_{len(groups)}"] = QuantizationScheme(
                targets=targets, weights=QuantizationArgs(**common), input_activations=inputs, format=scheme
            )
    config = QuantizationConfig(
        config_groups=groups,
        format=scheme,
        quantization_status="compressed",
        ignore=[path for path in given.linears() if path not in paths],
    )
    return config.to_dict()


def _stem(fmt: Format | None) -> tuple[str, int | None] | None:
    return None if fmt is None else (fmt.element.name, fmt.block)


register(
    Target(
        "compressed-tensors",
        "packed weights for vLLM, SGLang, transformers",
        refuse,
        write,
        prove,
        needs=("compressed_tensors",),
    )
)
