"""``--to gguf``: one file for llama.cpp and everything built on it.

MXFP4 is a type of GGUF; an MXINT weight in blocks of 32 is a Q4_0 or Q8_0 weight whose scales happen to be powers of
two, held exactly while float16 holds the scale. Names, layout and configuration keys are those by which transformers
reads the file back, inverted: a permutation is found by sending numbers through the reader, so no architecture is
spelled out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfx.export.errors import ExportError
from mxfx.export.plain import Plain, on_grid
from mxfx.export.prove import opened, same_logits, same_values
from mxfx.export.target import Target, register
from mxfx.formats import E8M0, Format, IntElement

FILE = "model.gguf"


def refuse(given: Plain) -> str | None:
    from gguf import MODEL_ARCH_NAMES
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if given.lost:
        return given.lost[0]
    if given.inputs:
        path, fmt = next(iter(given.inputs.items()))
        return f"the input of {path} in {fmt}: a GGUF reader rounds activations by its own rules (leave `input` out)"
    if given.config.model_type not in GGUF_SUPPORTED_ARCHITECTURES:
        return f"transformers reads no GGUF of architecture {given.config.model_type!r}, so it could not be proved"
    if given.config.model_type not in MODEL_ARCH_NAMES.values():
        return f"GGUF has no architecture of the name {given.config.model_type!r}"
    if given.turned:
        return f"the source model keeps {next(iter(given.turned))} as (in, out): its blocks run along the first axis"
    if given.mixed:
        return f"the parts of {given.mixed[0]} are in several formats: it stores one for the whole"
    odd = next(((n, f) for n, f in given.formats.items() if _type_of(f, given.state[n]) is None), None)
    if odd is None:
        return None
    width = given.state[odd[0]].shape[-1]
    return f"{odd[0]} in {odd[1]} has rows of {width}: it knows MXFP4, MXINT4 and MXINT8 in whole blocks of 32"


def _type_of(fmt: Format | None, weight: Tensor) -> Any:
    """GGUF's type for a tensor; None for a format that it lacks."""
    from gguf import GGMLQuantizationType as Type

    if fmt is None:
        return (
            Type.F32
            if weight.dim() < 2
            else {torch.bfloat16: Type.BF16, torch.float16: Type.F16}.get(weight.dtype, Type.F32)
        )
    if fmt.block != 32 or weight.shape[-1] % 32 or not isinstance(fmt.scale, E8M0):
        return None
    if isinstance(fmt.element, IntElement):
        return {4: Type.Q4_0, 8: Type.Q8_0}.get(fmt.bits)
    return Type.MXFP4 if fmt.element.name == "e2m1" else None


def write(given: Plain, folder: Path, tokenizer: Any) -> tuple[str, ...]:
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / FILE, given.config.model_type)
    writer.add_name(Path(given.program.source.name).name)
    _add_config(writer, given.config)
    told = "no tokenizer was given: llama.cpp needs one in the file"
    if tokenizer is not None:
        told = _add_tokenizer(writer, tokenizer, given.config.vocab_size)
    count = 0
    for name, hf_name, unread in _names(given):
        weight = unread(given.state[hf_name])
        kind = _type_of(given.formats.get(hf_name), weight)
        count += hf_name in given.formats
        writer.add_tensor(name, _bytes(weight, given.formats.get(hf_name), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (f"{count} weights packed", told)


def prove(given: Plain, folder: Path) -> Mapping[str, object]:
    read = opened(folder, gguf_file=FILE)
    # No window shows in a few tokens.
    windows = [getattr(config, "sliding_window", None) for config in (given.config, read.config)]
    if windows[0] != windows[1]:
        raise ExportError(
            f"the model's sliding_window is {windows[0]}, which a reader of the file takes for {windows[1]}"
        )
    named = {n: p.detach() for n, p in read.named_parameters(remove_duplicate=False)}
    size = (folder / FILE).stat().st_size
    return same_values(given, named) | same_logits(given, read) | {"bytes": size}


def _bytes(weight: Tensor, fmt: Format | None, kind: Any) -> np.ndarray:
    """A tensor as GGUF stores it: float32 and float16 as numbers, all else as bytes (rows, bytes of a row)."""
    from gguf import GGMLQuantizationType as Type

    if fmt is None:
        if kind == Type.BF16:
            return weight.contiguous().view(torch.uint8).numpy()
        return weight.to(torch.float16 if kind == Type.F16 else torch.float32).numpy()
    encoded = on_grid(weight, fmt)
    assert encoded.scales is not None
    codes, scales = encoded.codes.unflatten(-1, (-1, 32)), encoded.scales.unsqueeze(-1)
    if kind == Type.MXFP4:
        head, body = scales, _halves(codes)
    else:
        power = torch.exp2(scales.float() - 127)
        half = power.to(torch.float16)
        zero = (codes == 0).all(-1, keepdim=True)
        if not bool((half.float() == power)[~zero].all()):
            raise ExportError("a block's scale is outside of float16, in which GGUF stores it; take another target")
        head = torch.where(zero, 0, half).to(torch.float16).view(torch.uint8)
        body = _halves(codes + 8) if kind == Type.Q4_0 else codes.view(torch.uint8)
    return torch.cat((head, body), -1).flatten(-2).numpy()


def _halves(codes: Tensor) -> Tensor:
    """Nibbles of a block of 32: the first 16 codes low, the last 16 high."""
    nibbles = codes.to(torch.uint8) & 0xF
    return nibbles[..., :16] | (nibbles[..., 16:] << 4)


def _names(given: Plain) -> list[tuple[str, str, Any]]:
    """GGUF name, source name, and the function that undoes what the reader does to the tensor."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    model = given.model()
    processor = TENSOR_PROCESSORS.get(given.config.model_type, TensorProcessor)(config=given.config.to_dict())
    mapping = get_gguf_hf_weights_map(model, processor)
    tied = given.tied_copies()
    found = [
        (name, hf_name, _undo(processor, name, mapping, given.state[hf_name]))
        for name, hf_name in mapping.items()
        if hf_name in given.state and hf_name not in tied
    ]
    missing = set(given.state) - tied - {hf_name for _, hf_name, _ in found}
    if missing:
        raise ExportError(f"GGUF has no name for {min(missing)}")
    return found


def _undo(processor: Any, name: str, mapping: Mapping[str, str], tensor: Tensor) -> Any:
    """The inverse of the reader's change of a tensor: a permutation of its elements, plus a constant."""
    numbers = np.arange(tensor.numel(), dtype=np.float64).reshape(tuple(tensor.shape))
    read = processor.process(weights=numbers.copy(), name=name, tensor_key_mapping=mapping, parsed_parameters={})
    weights = torch.from_numpy(np.asarray(read.weights, dtype=np.float64))
    if weights.shape != tensor.shape:
        raise ExportError(f"the reader of {name} changes its shape, which cannot be undone")
    shift = float(weights.min())
    order = (weights - shift).flatten().long()
    if not torch.equal(order.sort().values, torch.arange(order.numel())):
        raise ExportError(f"the reader of {name} does more than move its elements, which cannot be undone")

    def unread(value: Tensor) -> Tensor:
        # A gain near 1 has fewer digits than what it is more than 1, and these are bfloat16's.
        value = value.float() - shift if shift else value
        source = torch.empty_like(value).flatten()
        source[order] = value.flatten()
        return source.reshape(value.shape)

    return unread


def _add_config(writer: Any, config: Any) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    kind = config.model_type
    # llama.cpp takes heads to divide the hidden size where these are missing.
    widths = {f"attention.{name}_length": "head_dim" for name in ("key", "value")}
    for key, attribute in (widths | GGUF_TO_TRANSFORMERS_MAPPING["config"][kind]).items():
        value = _attribute(config, attribute) if attribute else None
        if value is None:
            continue
        full = f"{kind}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)


def _attribute(config: Any, name: str) -> object:
    if name == "rope_theta":
        parameters = getattr(config, "rope_parameters", None) or {}
        return parameters.get("rope_theta", getattr(config, name, None))
    return getattr(config, name, None)


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> str:
    """Tokens, types and merges of a byte-level BPE; what a user should know of it. Raises ``ExportError`` for another
    kind of tokenizer.
    """
    import json

    from gguf import TokenType

    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = {"model": {"type": type(tokenizer).__name__}} if backend is None else json.loads(backend.to_str())
    if data["model"]["type"] != "BPE" or "ByteLevel" not in _kinds(data["pre_tokenizer"]):
        raise ExportError(f"the tokenizer is a {data['model']['type']}, and only BPE over bytes is written, as GPT-2's")
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]

    def kind(i: int) -> TokenType:
        # Tokens of a chat's template are marked special where they are added, and need have no role.
        if i in special or (i in added and added[i].special):
            return TokenType.CONTROL
        return TokenType.USER_DEFINED if i in added else TokenType.NORMAL if i in by_id else TokenType.UNUSED

    writer.add_tokenizer_model("gpt2")
    cut = _cut(data["pre_tokenizer"])
    writer.add_tokenizer_pre(cut or "default")
    writer.add_token_list(tokens)
    writer.add_token_types([kind(i) for i in range(size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
    said = tokenizer("a").input_ids
    for token, begins_or_ends in (("bos", said[:1]), ("eos", said[-1:])):
        index = getattr(tokenizer, f"{token}_token_id")
        if index is not None:
            getattr(writer, f"add_{token}_token_id")(index)
            getattr(writer, f"add_add_{token}_token")(begins_or_ends == [index])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    if cut is None:
        return (
            "llama.cpp's name for how this tokenizer cuts a text into words is not known here: the file says "
            "'default', so compare llama-tokenize with the tokenizer before you trust it"
        )
    return f"the tokenizer cuts a text into words as llama.cpp's {cut!r}"


#: One pattern for words, as Llama 3 and Qwen 2 write it, up to how many digits make a word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BY_PATTERN = {_WORDS.replace("DIGITS", "{1,3}"): "llama-bpe", _WORDS.replace("DIGITS", ""): "qwen2"}


def _cut(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name (``tokenizer.ggml.pre``) for the way in which a text is cut before pieces are merged."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        if not before:
            return "gpt-2"
        alone = len(before) == 1 and before[0]["type"] == "Digits" and before[0]["individual_digits"]
        return "smollm" if alone else None
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated" or before[0]["invert"]:
        return None
    return _BY_PATTERN.get(before[0]["pattern"].get("Regex"))


def _kinds(part: Any) -> set[str]:
    """What a pre-tokenizer is made of."""
    if part is None:
        return set()
    return {part["type"]}.union(*map(_kinds, part.get("pretokenizers", ())))


register(Target("gguf", "one file for llama.cpp", refuse, write, prove, needs=("gguf",)))
