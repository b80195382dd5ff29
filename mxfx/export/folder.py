"""The artefact as a Hugging Face folder: transformers' Auto classes open it, ``save_pretrained`` writes it.

config.json             ``model_type`` "mxfx", the source's configuration inside
generation_config.json  the source's
tokenizer files         where there is a tokenizer
modeling_mxfx.py        three lines that import mxfx, for programs that never did (``trust_remote_code=True``)
README.md               a model card: what it is, how to open it, the run's table
and the artefact's own files (``mxfx.export.artefact``): the printed program, its weights, the manifest; and that
program as it runs on this kind of machine (``mxfx.export.kept``), which nobody needs who has time
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils.hub import convert_file_size_to_int

from mxfx.export.artefact import SHARD_BYTES, ArtefactError, Opened, save
from mxfx.export.folder_config import ARCHITECTURE, MODEL_TYPE, MxfxConfig
from mxfx.export.kept import emission, write_beside
from mxfx.graph.program import Program
from mxfx.ground.files import read_json, unfinished, write_file
from mxfx.ground.garbage import uncollected
from mxfx.ground.versions import version
from mxfx.pipeline.emit import emitted
from mxfx.runtime.causal_lm import EmittedCausalLM, configs_of

_CODE = '''"""Opens this folder with mxfx. Programs that `import mxfx` first need none of this."""

import mxfx.export.folder as mxfx_folder

MxfxConfig = mxfx_folder.MxfxConfig
MxfxForCausalLM = mxfx_folder.MxfxForCausalLM
'''
_CARD_FILE = "README.md"
_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mxfx, quantized, microscaling]
---
# {name}

{source} in Microscaling formats, made by mxfx {version}: {bits:.2f} bits a weight, everything counted.

```python
import mxfx  # pip install mxfx: registers this kind of model
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

From a terminal: `mxfx generate {folder} --prompt "…"`, `mxfx eval {folder}`, `mxfx serve {folder}`. A program that does
not import mxfx itself is told to by `trust_remote_code=True`, which runs the three lines of `modeling_mxfx.py`:
`lm_eval --model hf --model_args pretrained={folder},trust_remote_code=True`. Nothing here is pickled; the graph is
`program.mxir`, as text, and `emitted-*.mxir` what runs of it: it is made again where it does not fit, or was removed.
{table}"""


class MxfxForCausalLM(EmittedCausalLM):
    """An emitted model that is opened from, and saved to, its folder.

    It is made of what the folder holds, or of the opened folder, whose program is read when somebody asks for it: to
    save it, say. ``ready`` is what the emit stage made of it for the device, where that has run.
    """

    config_class = MxfxConfig

    def __init__(
        self,
        source: Program | Opened,
        device: torch.device | str = "cpu",
        *,
        ready: Program | None = None,
    ) -> None:
        place = torch.device(device)
        ready = _ready(source, place) if ready is None else emitted(ready, place)
        # What a folder gives, nobody else has.
        super().__init__(ready, consume=isinstance(source, Opened))
        self._source = source
        self._kernels = torch.device(device).type
        #: The model card of the folder that it was opened from, which has a run's figures.
        self.card: bytes | None = None
        self.config = config_of(ready)
        self.config.use_cache = bool(getattr(self.generation_config, "use_cache", False))
        self.to(device)

    @cached_property
    def program(self) -> Program:
        """What the folder holds: before the passes of the emit stage that are a device's own."""
        return self._source if isinstance(self._source, Program) else self._source.program()

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **options: Any) -> MxfxForCausalLM:
        """Open a folder that ``save_pretrained`` or ``mxfx run --out`` wrote, on ``device_map`` (the CPU if not given).

        ``use_cache=False`` is what ``generate`` then does by default. Raises ``ArtefactError`` for a folder that is
        none or is damaged, and ``TypeError`` for another ``dtype`` and for an option that would be ignored.
        """
        asked = sorted(name for name, value in options.items() if value and name not in _OPENING)
        if asked:
            raise TypeError(f"an emitted model is opened as it was saved; it cannot honour {', '.join(asked)}")
        with uncollected():
            opened, device = Opened.of(folder), torch.device(_device(options.get("device_map")))
            model = cls(opened, device)
        wanted = options.get("dtype", options.get("torch_dtype"))
        if wanted not in (None, "auto"):
            dtype = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"dtype is {wanted!r}, expected {str(model.dtype).removeprefix('torch.')!r} or 'auto'")
            model.to(dtype)
        if options.get("use_cache") is False:
            model.config.use_cache = model.generation_config.use_cache = False
        model.name_or_path = str(folder)
        card = Path(folder) / _CARD_FILE
        model.card = card.read_bytes() if card.is_file() else None
        return (model, _NOTHING_ODD) if options.get("output_loading_info") else model

    def to(self, *args: Any, **kwargs: Any) -> MxfxForCausalLM:
        """Move to a device; for one of another type the program is emitted anew, since kernels are a device's own.

        Caches made before are not taken afterwards. Raises ``TypeError`` for another dtype.
        """
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type not in (self._kernels, "meta"):
            self._take(_ready(self._source, device), consume=isinstance(self._source, Opened))
            self._kernels = device.type
        super().to(*args, **kwargs)
        return self

    def cuda(self, device: int | torch.device | str | None = None) -> MxfxForCausalLM:
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def cpu(self) -> MxfxForCausalLM:
        return self.to("cpu")

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        is_main_process: bool = True,
        *,
        max_shard_size: int | str = SHARD_BYTES,
        **options: Any,
    ) -> None:
        """Write the folder; what was opened from one and is saved again has the same bytes.

        ``max_shard_size``: bytes of a file of weights, or as in ``"2GB"``; a larger tensor has a file of its own.
        Processes other than the main one write nothing. Raises ``TypeError`` for an option that would be ignored.
        """
        asked = sorted(name for name, value in options.items() if value not in _PLAIN_OPTIONS.get(name, (None, False)))
        if asked:
            raise TypeError(f"save_pretrained of an emitted model takes max_shard_size, not {', '.join(asked)}")
        if not is_main_process:
            return
        shard_bytes = convert_file_size_to_int(max_shard_size)
        save_folder(self.program, folder, generation=self.generation_config, shard_bytes=shard_bytes)
        if self.card is not None:
            write_file(Path(folder) / _CARD_FILE, self.card)


def _ready(source: Program | Opened, device: torch.device) -> Program:
    """The lowered program, of a folder as it was kept."""
    return emission(source, device) if isinstance(source, Opened) else emitted(source, device)


#: Options of transformers' ``from_pretrained`` that are honoured, that say where a folder is found, which was found, or
#: how a model is read and run that is no graph.
_OPENING = frozenset({
    "device_map", "dtype", "torch_dtype", "output_loading_info", "use_cache",
    "cache_dir", "force_download", "local_files_only", "token", "use_auth_token", "proxies", "revision",
    "code_revision", "trust_remote_code", "config", "adapter_kwargs", "_from_auto", "_commit_hash",
    "use_safetensors", "weights_only", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict",
    "offload_buffers", "attn_implementation", "experts_implementation",
})  # fmt: skip

#: Options of transformers' ``save_pretrained`` that ask for what is done anyway.
_PLAIN_OPTIONS: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (None, True),
    "save_peft_format": (None, True, False),
    "save_original_format": (None, True, False),
    "token": (None, False),
}

#: What ``output_loading_info`` reports: an artefact that lacks a weight or has one too many does not open.
_NOTHING_ODD: dict[str, Any] = {
    "missing_keys": set(),
    "unexpected_keys": set(),
    "mismatched_keys": set(),
    "error_msgs": [],
}


def save_folder(
    program: Program,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    generation: GenerationConfig | None = None,
    table: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a program as a Hugging Face folder. ``table`` is the run's, in Markdown, for the model card;
    ``shard_bytes`` bounds a file of weights.

    Raises what ``mxfx.export.artefact.save`` raises.
    """
    folder = Path(folder)
    save(program, folder, shard_bytes=shard_bytes)
    if tokenizer is not None:
        _write_tokenizer(tokenizer, folder)
    stored = generation if generation is not None else configs_of(program)[1]
    _write_json(folder / "generation_config.json", stored.to_diff_dict())
    write_file(folder / "modeling_mxfx.py", _CODE.encode())
    write_card(program, folder, table)
    _write_json(folder / "config.json", config_of(program).to_dict())
    write_beside(folder, program)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Its files, each whole or not at all; a template of another that was there before would be taken for its own."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for stale in (folder / "additional_chat_templates").glob("*.jinja"):
        stale.unlink()
    with unfinished(folder / "tokenizer.part") as partial:
        tokenizer.save_pretrained(partial)
        for file in [path for path in partial.rglob("*") if path.is_file()]:
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def write_card(program: Program, folder: Path, table: str = "") -> None:
    """Write, or write again, the model card; ``table`` is the run's, in Markdown. Raises ``WriteError``."""
    from mxfx.rewrite.size import bits_per_weight

    card = _CARD.format(
        name=Path(program.source.name).name or program.source.architecture,
        source=program.source.name,
        version=version("mxfx"),
        bits=bits_per_weight(program),
        folder="DIR",
        table=f"\n{table}\n" if table else "",
    )
    write_file(folder / _CARD_FILE, card.encode())


def config_of(program: Program) -> MxfxConfig:
    """The configuration of the model that a program makes."""
    return MxfxConfig(source=dict(program.source.config), dtype=program.dtype)


def register() -> None:
    """Let ``AutoModelForCausalLM`` and transformers' server open emitted models; calling it again does nothing."""
    import transformers
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    AutoModelForCausalLM.register(MxfxConfig, MxfxForCausalLM, exist_ok=True)
    setattr(transformers, ARCHITECTURE, MxfxForCausalLM)


def is_folder(folder: str | Path) -> bool:
    """Whether a folder says that mxfx wrote it; an artefact's integrity is checked when it is opened."""
    try:
        return read_json(Path(folder) / "config.json").get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


def _device(given: Any) -> torch.device | str:
    if given is None or given == {}:
        return "cpu"
    if isinstance(given, dict):
        places = set(given.values())
        if len(places) > 1:
            named = ", ".join(sorted(map(str, places)))
            raise ArtefactError(f"device_map spreads the model over {named}; an emitted graph is on one device")
        return _device(places.pop())
    if given == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", given) if isinstance(given, int) else given


def _write_json(path: Path, data: object) -> None:
    write_file(path, (json.dumps(data, indent=2, default=str) + "\n").encode())
