"""Loading a Hugging Face model and its tokenizer, from the hub or a folder, with one clear error."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxfx.config.pipeline import no_model
from mxfx.ground.errors import MxfxError, reason_of
from mxfx.ground.files import read_json
from mxfx.ground.hub import reached

_NAMED = 3


class ModelError(MxfxError, ValueError):
    """A model or tokenizer cannot be loaded; the message names it and says what to do."""


@dataclass(frozen=True)
class Loaded:
    """A model, and what is wrong with it: weights that its checkpoint lacks are random numbers."""

    model: nn.Module
    warnings: tuple[str, ...]


def load_model(
    name: str | Path, dtype: str = "bfloat16", *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """A causal LM in eval mode on the CPU; warns of weights that the checkpoint lacks. Raises ``ModelError``."""
    loaded = load_checked(name, dtype, revision=revision, trust_remote_code=trust_remote_code)
    for warning in loaded.warnings:
        warnings.warn(warning, stacklevel=2)
    return loaded.model


def load_checked(
    name: str | Path,
    dtype: str = "bfloat16",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Loaded:
    """As ``load_model``, the warnings kept. ``trust_remote_code`` comes from the command line only; ``options`` go to
    ``from_pretrained``.

    Raises ``ModelError``, also for a checkpoint whose weights have other shapes than its configuration says.
    """
    from transformers import AutoModelForCausalLM

    _check_inside(Path(name))
    with _reading("model", name):
        model, found = AutoModelForCausalLM.from_pretrained(
            str(name),
            dtype=getattr(torch, dtype),
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    if found["mismatched_keys"]:
        key, stored, expected = sorted(found["mismatched_keys"])[0]
        raise ModelError(
            f"the model {str(name)!r} does not fit its config.json: weight {key!r} is {tuple(stored)} in the "
            f"checkpoint and {tuple(expected)} by the configuration; give the folder that save_pretrained wrote"
        )
    missing = sorted(found["missing_keys"])
    said = ()
    if missing:
        some = ", ".join(missing[:_NAMED]) + (" …" if len(missing) > _NAMED else "")
        said = (f"the checkpoint of {str(name)!r} lacks {len(missing)} weights, which are random now: {some}",)
    return Loaded(model.eval(), said)


def load_meta_model(
    name: str | Path, dtype: str = "bfloat16", *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model's structure on the meta device: its configuration is read, none of its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _reading("model", name):
        config = AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
        return model.eval()


def check_fits(
    name: str | Path, weights: Iterable[torch.Tensor], *, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Raise ``ModelError`` for a model of which more is held than the machine has memory; of ``weights``, meta tensors
    in the precision that they are loaded in, none is taken.

    A tensor that lies in the checkpoint's safetensors as it is used, in shape and dtype, is mapped: the system reads
    its pages when they are asked for, and drops them when it needs room. Held is what has to be made in memory: tensors
    of another precision, stacks of experts that lie one by one, what the checkpoint lacks. Of a hub model that was not
    downloaded yet, those are taken for held whose precision is not that of its configuration.
    """
    weights = list(weights)
    stored = _stored(name, revision)
    if stored is None:
        stated = _stated_dtype(name, revision, trust_remote_code)
        stored = Counter(_like(t) for t in weights if t.dtype == stated)
    held = 0
    for tensor in weights:
        if stored[_like(tensor)]:
            stored[_like(tensor)] -= 1
        else:
            held += tensor.nbytes
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if held > there:
        needed = sum(t.nbytes for t in weights)
        raise ModelError(
            f"the model {str(name)!r} has {needed / 1e9:,.0f} GB of weights by its configuration, {held / 1e9:,.0f} GB "
            f"of which its safetensors do not hold in the precision asked for, and this machine "
            f"{there / 1e9:,.0f} GB of memory: expected model.dtype as the checkpoint has it; `mxfx check` needs no "
            "weights"
        )


_Like = tuple[torch.dtype, tuple[int, ...]]


def _like(tensor: torch.Tensor) -> _Like:
    return tensor.dtype, tuple(tensor.shape)


def _stored(name: str | Path, revision: str | None) -> Counter[_Like] | None:
    """How many tensors of each kind a checkpoint's safetensors hold; None for one of the hub that is not here yet.

    Names are no matter: transformers maps tensors of older names too. What cannot be read holds nothing; to say so is
    for the reader.
    """
    from safetensors import SafetensorError, safe_open

    found: Counter[_Like] = Counter()
    files = _safetensors(name, revision)
    for file in files or ():
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, framework="pt") as opened:
            names = opened.keys()
            found.update(_like(opened.get_tensor(name)) for name in names)
    return None if files is None else found


def _safetensors(name: str | Path, revision: str | None) -> list[Path] | None:
    """The files that a checkpoint's weights are read from, in the order in which transformers looks for them."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name)
    whole, index = (
        folder / file if folder.is_dir() else try_to_load_from_cache(str(name), file, revision=revision)
        for file in ("model.safetensors", "model.safetensors.index.json")
    )
    if isinstance(whole, str | Path) and Path(whole).is_file():
        return [Path(whole)]
    if isinstance(index, str | Path) and Path(index).is_file():
        _check_inside(Path(index).parent)
        named = read_json(Path(index))
        files = [Path(index).parent / file for file in dict.fromkeys(named["weight_map"].values())]
        return files if folder.is_dir() or all(file.is_file() for file in files) else None
    return [] if folder.is_dir() else None


def _stated_dtype(name: str | Path, revision: str | None, trust_remote_code: bool) -> torch.dtype | None:
    from transformers import AutoConfig

    with _reading("model", name):
        return AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=trust_remote_code).dtype


def _check_inside(folder: Path) -> None:
    """Raise ``ModelError`` if the index of a checkpoint names files outside its folder."""
    for index in folder.glob("*.index.json") if folder.is_dir() else ():
        named = read_json(index)
        files = named.get("weight_map") if isinstance(named, dict) else None
        for file in files.values() if isinstance(files, dict) else (None,):
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(f"{index}: 'weight_map' must name files of its own folder, it has {file!r}")


def load_tokenizer(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ``ModelError``."""
    from transformers import AutoTokenizer

    with _reading("tokenizer", name):
        return AutoTokenizer.from_pretrained(str(name), revision=revision, trust_remote_code=trust_remote_code)


def refuse_offloaded(model: nn.Module) -> None:
    """Raise ``ModelError`` for a model of which a part lies on disk or waits on the CPU: it has no tensors to trace."""
    places = getattr(model, "hf_device_map", None) or {}
    away = sorted(module or "the whole model" for module, place in places.items() if str(place) in ("disk", "meta"))
    hidden = [name for name, parameter in model.named_parameters() if places and parameter.device.type == "meta"]
    if away or hidden:
        part = away[0] if away else hidden[0]
        raise ModelError(
            f"{type(model).__name__} is offloaded ({part} is not in memory); expected a model whose weights are all on "
            "the CPU or one GPU: load it without device_map and offload_folder"
        )


@contextlib.contextmanager
def _reading(what: str, name: str | Path) -> Iterator[None]:
    """A folder is read, or the hub asked if there can be an answer. Raises ``ModelError``."""
    failed, local = f"the {what} {str(name)!r} cannot be loaded", Path(name).is_dir()
    wrong = None if local else no_model(str(name))
    if wrong is not None:
        raise ModelError("; ".join([f"{failed}: {wrong[0]}", f"expected {wrong[1]}", *filter(None, wrong[2:])]))
    with contextlib.nullcontext() if local else reached() as away:
        try:
            yield
        except Exception as error:
            # transformers, the hub client and safetensors each raise their own kinds.
            if local:
                failed = f"the {what} in folder {str(name)!r} cannot be loaded"
                raise ModelError(f"{failed}: {reason_of(error)}") from error
            hub = f"its cache holds no such model, and {away}" if away is not None else reason_of(error)
            raise ModelError(
                f"{failed}: there is no such folder; of the hub: {hub}\n"
                "  expected: a folder that save_pretrained or `mxfx run --out` wrote, or a hub id that can be reached"
            ) from error
