"""The tutorial's TOML (Mase, PLENA) as a front end: each key becomes part of a pipeline or is refused by
name.

| dialect | pipeline |
| --- | --- |
| ``weight_…``, ``data_in_…``, ``bias_…`` | rule of ``annotate``: ``weight``, ``input``, ``bias`` |
| ``qk_matmul``, ``av_matmul``, ``kv_cache`` | ``q``, ``probs``, ``kv`` |
| ``softmax``, ``rope`` | ``softmax`` (the scores before it), ``rope`` (cosines and sines) |
| ``qk_norm`` | ``weight``, ``input`` of the attention's norms |
| ``[gptq]`` | ``gptq``, ``[model] name``, ``[calibration]`` |
| ``quantile_search`` | scale rule ``/mse`` of the weights that GPTQ takes: least error of the weight |
| ``clip_search_y`` | ``exponents = "sweep"``: least error of the output, over the Hessian |
| ``prefill``, ``decode``, ``decode_policy``, ``kv_cache_handoff`` | ``[phases]``: ``mxfx.compat.buckets`` |
| ``gptq = true`` | ``gptq`` takes these weights; if no selector says so, it takes all that have a format |
| ``clip_search = true`` | scale rule ``/mse`` of the weight |
| ``[rotation_search]`` | ``rotation-search`` |
| ``name = "mxint_rotate"`` | ``online-rotation`` |
| ``[token_collector]`` | nothing: ``attach_token_collector_pass`` and ``mxfx collect`` read it |
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from mxfx.compat.emitter import Emitter
from mxfx.compat.selectors import read_selector
from mxfx.compat.table import Table
from mxfx.config.locate import Cursor, Document, read_toml
from mxfx.config.options import listed
from mxfx.config.pipeline import SETTINGS, Pipeline, from_document, register_passes
from mxfx.ground.nearest import did_you_mean, nearest

COLLECTOR = "token_collector"
_BLOCKS = ("gptq", "rotation_search", COLLECTOR)
_REFUSED_BLOCKS = {"rotation": "no version of Mase reads it; use [rotation_search]"}


class PassArgs(dict):
    """The dictionary that the tutorial's own loader makes, which also knows where each key stands."""

    at: Cursor = Cursor("pass_args", {})


def load_quant_config(path: str | Path) -> PassArgs:
    """Read a TOML file of the tutorial into the ``pass_args`` of ``quantize_module_transform_pass``.

    Everything is checked here: raises ``ConfigError`` with ``FILE:LINE:COLUMN``.
    """
    document = read_toml(path)
    rest = {key: value for key, value in document.value.items() if key != COLLECTOR}
    if COLLECTOR in document.value:
        _read_collector(Table(f"[{COLLECTOR}]", document.value[COLLECTOR], document.root / COLLECTOR))
    if rest.keys() - {"by"} or COLLECTOR not in document.value:
        from_tutorial(rest, document.root)
    raw = dict(document.value)
    args = PassArgs(by=raw.pop("by", "regex_name"))
    # Callers write into these blocks (`device`, `model_name`); selectors are wrapped, as Mase's passes take them.
    args.update({key: deepcopy(raw.pop(key)) for key in _BLOCKS if key in raw})
    args.update({key: {"config": deepcopy(value)} for key, value in raw.items()})
    args.at = document.root
    return args


def load_any(path: str | Path) -> Pipeline:
    """Read a pipeline file or a TOML file of the tutorial, whichever it is. Raises ``ConfigError``."""
    document = read_toml(path)
    if not is_tutorial(document):
        return from_document(document)
    if document.value.keys() == {"by"}:
        raise (document.root / "by").error(
            "the file has no selectors", "quoted selectors, or [gptq] or [rotation_search]"
        )
    return from_tutorial(document.value, document.root)


def only_collects(path: str | Path) -> bool:
    """Whether a file has nothing but a ``[token_collector]``, which is checked. Raises ``ConfigError``."""
    document = read_toml(path)
    if COLLECTOR not in document.value or not document.value.keys() <= {"by", COLLECTOR}:
        return False
    _read_collector(Table(f"[{COLLECTOR}]", document.value[COLLECTOR], document.root / COLLECTOR))
    return True


def is_tutorial(document: Document) -> bool:
    """Whether a file is in the dialect: it has ``by``, or selectors or blocks and no ``[[pass]]``.

    A misspelt table of mxfx is no selector, though it has a ``name`` as ``[model]`` does.
    """
    raw = document.value
    if "by" in raw or "pass" in raw:
        return "by" in raw
    blocks = (*_BLOCKS, *_REFUSED_BLOCKS)
    selectors = (value for key, value in raw.items() if nearest(key, SETTINGS, cutoff=0.75) is None)
    return any(key in blocks for key in raw) or any(isinstance(v, dict) and "name" in v for v in selectors)


def from_pass_args(pass_args: Mapping[str, Any]) -> Pipeline:
    """The pipeline of ``pass_args``, from ``load_quant_config`` or from the tutorial's own loader.

    There selectors and ``rotation_search`` arrive wrapped as ``{"config": …}``. Raises ``ConfigError``.
    """
    at = getattr(pass_args, "at", PassArgs.at)
    return from_tutorial({key: unwrapped(value) for key, value in pass_args.items()}, at)


def unwrapped(value: Any) -> Any:
    """What ``{"config": …}`` holds, with what a caller wrote beside it; anything else as it is."""
    if not isinstance(value, Mapping) or not isinstance(value.get("config"), Mapping):
        return value
    return {**value["config"], **{key: given for key, given in value.items() if key != "config"}}


def from_tutorial(raw: Mapping[str, Any], at: Cursor) -> Pipeline:
    """The pipeline that a parsed file of the dialect stands for. Raises ``ConfigError``."""
    register_passes()
    top = Table("the file", raw, at)
    by = _by(top)
    top.refuse(_REFUSED_BLOCKS)
    gptq = _block(top, "gptq")
    search = _block(top, "rotation_search")
    _check_collector(top)
    keys = [key for key in raw if key not in ("by", *_BLOCKS)]
    for key in keys:
        if not isinstance(raw[key], Mapping):
            names = ("by", *_BLOCKS)
            top.fail(key, f"unknown key {key!r}", f"{listed(names)} or a quoted selector", did_you_mean(key, names))
    tables = [(key, Table(f"the selector {key!r}", raw[key], at / key)) for key in keys]
    chosen = [one for key, table in tables for one in read_selector(key, table, by)]
    return Emitter(chosen, gptq, search, at).pipeline()


def _read_collector(table: Table) -> None:
    """Check a ``[token_collector]``. It imports torch, which no other table needs."""
    from mxfx.compat.collector import read_collector

    read_collector(table)


def _check_collector(top: Table) -> None:
    """A collector is no pass: it is checked, and whoever reads the file is told who runs it."""
    table = _block(top, COLLECTOR)
    if table is None:
        return
    _read_collector(table)
    does = f"[{COLLECTOR}] records what a model is called with"
    how = "`mxfx collect SOURCE --model M --config FILE`, or attach_token_collector_pass in Python"
    if top.raw.keys() <= {"by", COLLECTOR}:
        top.fail(COLLECTOR, f"{does}, and the file says nothing else: there is nothing to compile", how)
    top.warn(COLLECTOR, f"{does}: no pass does; {how}")


def _by(top: Table) -> str:
    by = top.take("by", str, "regex_name")
    if by not in ("regex_name", "name"):
        problem = "selecting by module class" if by == "type" else f"by = {by!r}"
        top.fail("by", f"{problem} is not supported: mxfx matches by module path", "'regex_name' or 'name'")
    return by


def _block(top: Table, name: str) -> Table | None:
    table = top.table(name)
    if table is not None:
        table.what = f"[{name}]"
    return table
