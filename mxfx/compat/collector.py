"""``[token_collector]``: keys of the dialect, and the functions of Mase and PLENA that they go to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mxfx.calibration.collector import TokenCollector, as_loader
from mxfx.calibration.datasets import load_tokens
from mxfx.compat.table import Table
from mxfx.compat.tutorial import COLLECTOR
from mxfx.config.locate import Cursor, read_toml
from mxfx.driver.pretrained import load_tokenizer


def read_collector(table: Table, model: nn.Module | None = None) -> TokenCollector:
    """The collector that a ``[token_collector]`` asks for, attached to nothing. Raises ``ConfigError``."""
    given = {
        "target_nsamples": table.need("target_nsamples", int),
        "seqlen": table.need("seqlen", int),
        "save_path": table.need("save_path", str),
        "overwrite": table.take("overwrite", bool, False),
        "min_prefill_tokens": table.take("min_prefill_tokens", int, 8),
        "raise_on_full": table.take("raise_on_full", bool, False),
    }
    table.close()
    for key in ("target_nsamples", "seqlen"):
        if given[key] < 1:
            table.fail(key, f"{key} = {given[key]}", "1 or more")
    return TokenCollector(model, **given)


def collector_of_file(path: Path) -> TokenCollector:
    """That of a file's ``[token_collector]``. Raises ``ConfigError``, also where there is none."""
    document = read_toml(path)
    if COLLECTOR not in document.value:
        raise document.root.error("the file has no [token_collector]", "one with target_nsamples, seqlen, save_path")
    return read_collector(Table("[token_collector]", document.value[COLLECTOR], document.root / COLLECTOR))


def attach_token_collector_pass(network: nn.Module, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Listen to what ``network`` is called with, as ``config``, a ``[token_collector]``, says.

    Returns ``(network, {"collector": collector})``. Where the network is quantized afterwards, the collector goes over
    to the emitted model. Raises ``ConfigError``, ``FileExistsError``.
    """
    table = Table("[token_collector]", config, Cursor("token_collector", {}))
    return network, {"collector": read_collector(table, network).attach()}


def get_loaders(
    name: str,
    nsamples: int = 128,
    seed: int = 0,
    seqlen: int = 2048,
    model: str = "",
    hf_token: str | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Calibration samples as Mase's function of this name gives them: ``(ids, target)``, int64 ``(1, seqlen)`` each.

    ``name`` is what ``dataset`` of ``[gptq]`` takes; a ``file:`` of a collector needs no ``model``, whose tokenizer
    reads the others. Raises ``DatasetError``, ``ModelError``.
    """
    source = name.removeprefix("file:")
    tokenizer = None if source.endswith(".pt") else load_tokenizer(model)
    return as_loader(load_tokens(source, tokenizer, samples=nsamples, length=seqlen, seed=seed).ids)
