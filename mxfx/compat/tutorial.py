"""The tutorial's TOML (Mase, PLENA) as a front end: each key becomes part of a pipeline or is refused by
name.

| dialect | pipeline |
| --- | --- |
| ``weight_…``, ``data_in_…``, ``bias_…`` | rule of ``annotate``: ``weight``, ``input``, ``bias`` |
| ``qk_matmul``, ``av_matmul``, ``kv_cache`` | ``q``, ``probs``, ``kv`` |
| ``softmax``, ``rope`` | ``softmax`` (the scores before it), ``rope`` (its input) |
| ``[gptq]`` | ``gptq``, ``[model] name``, ``[calibration]`` |
| ``quantile_search`` or ``clip_search_y`` | ``exponents = "sweep"``: both ask for searched scales |
| ``gptq = true`` | ``gptq`` takes these weights; if no selector says so, it takes all that have a format |
| ``clip_search = true`` | scale rule ``/mse`` of the weight |
| ``[rotation_search]`` | ``rotation-search`` |
| ``name = "mxint_rotate"`` | ``online-rotation`` |
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from mxfx.compat.selectors import Chosen, read_selector, shadowed
from mxfx.compat.table import Table
from mxfx.compat.widths import Written, read_format
from mxfx.config.locate import Cursor, Document, KeyPath, Mark, read_toml
from mxfx.config.options import listed
from mxfx.config.pipeline import (
    SETTINGS,
    CalibrationConfig,
    ModelConfig,
    Pipeline,
    from_document,
    register_passes,
)
from mxfx.config.spec import PassSpec
from mxfx.ground.nearest import did_you_mean

_BLOCKS = ("gptq", "rotation_search")
_REFUSED_BLOCKS = {
    "token_collector": "it records prompts of a server; give text by [gptq] dataset = 'file:PATH'",
    "rotation": "no version of Mase reads it; use [rotation_search]",
}
_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj", "kv_cache")
_ONE_MODEL = "mxfx compiles one precision for prefill and decode"


class PassArgs(dict):
    """The dictionary that the tutorial's own loader makes, which also knows where each key stands."""

    at: Cursor = Cursor("pass_args", {})


def load_quant_config(path: str | Path) -> PassArgs:
    """Read a TOML file of the tutorial into the ``pass_args`` of ``quantize_module_transform_pass``.

    Everything is checked here: raises ``ConfigError`` with ``FILE:LINE:COLUMN``.
    """
    document = read_toml(path)
    from_tutorial(document.value, document.root)
    raw = dict(document.value)
    args = PassArgs(by=raw.pop("by", "regex_name"))
    if "gptq" in raw:
        args["gptq"] = deepcopy(raw.pop("gptq"))
    args.update({key: {"config": deepcopy(value)} for key, value in raw.items()})
    args.at = document.root
    return args


def load_any(path: str | Path) -> Pipeline:
    """Read a pipeline file or a TOML file of the tutorial, whichever it is."""
    document = read_toml(path)
    return from_tutorial(document.value, document.root) if is_tutorial(document) else from_document(document)


def is_tutorial(document: Document) -> bool:
    """Whether a file is in the dialect: it has ``by``, or selectors or blocks and no ``[[pass]]``."""
    raw = document.value
    if "by" in raw or "pass" in raw:
        return "by" in raw
    blocks = (*_BLOCKS, *_REFUSED_BLOCKS)
    selectors = (value for key, value in raw.items() if key not in SETTINGS)
    return any(key in blocks for key in raw) or any(isinstance(v, dict) and "name" in v for v in selectors)


def from_pass_args(pass_args: Mapping[str, Any]) -> Pipeline:
    """The pipeline of ``pass_args``, from ``load_quant_config`` or from the tutorial's own loader.

    There selectors and ``rotation_search`` arrive wrapped as ``{"config": …}``. Raises ``ConfigError``.
    """
    at = getattr(pass_args, "at", PassArgs.at)
    return from_tutorial({key: _unwrapped(value) for key, value in pass_args.items()}, at)


def _unwrapped(value: Any) -> Any:
    return value["config"] if isinstance(value, Mapping) and value.keys() == {"config"} else value


def from_tutorial(raw: Mapping[str, Any], at: Cursor) -> Pipeline:
    """The pipeline that a parsed file of the dialect stands for. Raises ``ConfigError``."""
    register_passes()
    top = Table("the file", raw, at)
    by = _by(top)
    top.refuse(_REFUSED_BLOCKS)
    gptq = _block(top, "gptq")
    search = _block(top, "rotation_search")
    keys = [key for key in raw if key not in ("by", *_BLOCKS)]
    for key in keys:
        if not isinstance(raw[key], Mapping):
            names = ("by", *_BLOCKS)
            top.fail(key, f"unknown key {key!r}", f"{listed(names)} or a quoted selector", did_you_mean(key, names))
    chosen = [read_selector(key, Table(f"the selector {key!r}", raw[key], at / key), by) for key in keys]
    return _Emitter(chosen, gptq, search, at).pipeline()


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


class _Emitter:
    """Puts the passes together. Each emitted option remembers the key of the dialect that it came from."""

    def __init__(self, chosen: list[Chosen], gptq: Table | None, search: Table | None, at: Cursor) -> None:
        self.chosen = chosen
        self.gptq = gptq
        self.search = search
        self.at = at
        self.model = ModelConfig()
        self.calibration = CalibrationConfig()
        self.marks: dict[KeyPath, Mark] = dict(at.marks)

    def pipeline(self) -> Pipeline:
        optimized = self._gptq() if self.gptq is not None else self._without_gptq()
        search = self._rotation_search() if self.search is not None else []
        rules = self._annotate()
        operands = {key for one in self.chosen for key in one.formats}
        specs = [*rules, *optimized]
        specs += self._plain("round-weights", operands & {"weight", "bias"})
        rotations = [*search, *self._online_rotations()]
        specs += rotations
        specs += self._plain("expand-attention", operands & {"q", "probs", "softmax"})
        # A rotated cache is quantized by insert-fake-quant: the rotation back stands between it and attention.
        activations = {"input", "q", "probs", "softmax", "rope"} | ({"kv", "k", "v"} if rotations else set())
        specs += self._plain("insert-fake-quant", operands & activations)
        specs += self._plain("quantize-kv-cache", operands & {"kv", "k", "v"})
        root = Cursor(self.at.source, self.marks)
        return Pipeline(specs, self.model, self.calibration, root=root).completed()

    # -- annotate
    # -----------------------------------------------------------------------------------------------------

    def _annotate(self) -> list[PassSpec]:
        rules: list[dict[str, str]] = []
        marks: dict[KeyPath, Mark] = {}
        for index, one in enumerate(self.chosen):
            if not one.formats:
                continue
            place: KeyPath = ("rule", len(rules))
            header = _mark(one.table.at)
            marks |= {(): header, place: header, (*place, "match"): header}
            marks |= {(*place, key): _mark(written.at) for key, written in one.formats.items()}
            rules.append(
                {
                    "match": shadowed(self.chosen, index),
                    **{key: written.text for key, written in one.formats.items()},
                }
            )
        return [self._spec("annotate", {"rule": rules}, marks)] if rules else []

    def _plain(self, name: str, wanted: set[str]) -> list[PassSpec]:
        """A pass without options, if any selector sets one of the operands that it works on."""
        givers = [one for one in self.chosen if wanted & one.formats.keys()]
        return [self._spec(name, {}, {(): _mark(givers[0].table.at)})] if givers else []

    def _spec(self, name: str, raw: dict[str, Any], marks: dict[KeyPath, Mark]) -> PassSpec:
        found = marks if self.at.marks else {}
        return PassSpec.read(name, raw, Cursor(self.at.source, found))

    # -- gptq ------------------------------------------------------------------------------------------------
    # ---------

    def _without_gptq(self) -> list[PassSpec]:
        for one in self.chosen:
            if one.gptq:
                one.table.fail("gptq", "gptq = true, and the file has no [gptq] table", "a [gptq] table, or no flag")
        return []

    def _gptq(self) -> list[PassSpec]:
        table = self.gptq
        assert table is not None
        table.refuse(
            {
                "device": "the machine is chosen on the command line: --device cuda:0; delete the line",
                "hf_token": "secrets do not belong in a file: set the environment variable HF_TOKEN",
                "device_map_aware": "mxfx streams the model layer by layer whatever its placement",
                "min_expert_calibration_hits": "mixture-of-experts layers are not calibrated by expert",
            }
        )
        table.require("phase", str, "both", _ONE_MODEL)
        self._set_model(table)
        self._set_calibration(
            table,
            dataset=_dataset(table.take("dataset", str, "wikitext2")),
            samples=table.take("nsamples", int, 128),
            length=table.take("seqlen", int, 256),
        )
        searched = [table.take("quantile_search", bool, True), table.take("clip_search_y", bool, False)]
        raw: dict[str, Any] = {
            "select": _either(self._gptq_weights(table)),
            "exponents": "sweep" if any(searched) else "rule",
            "batch_size": table.take("cali_batch_size", int, 32),
            # The dialect has no such option; what the products will really read is the better guide to rounding.
            "quantized_inputs": True,
        }
        sources = {"exponents": "quantile_search", "batch_size": "cali_batch_size"}
        for key in ("max_layers", "checkpoint_dir"):
            value = table.take(key, int if key == "max_layers" else str)
            if value is not None:
                raw[key] = value
                sources[key] = key
        table.close()
        marks: dict[KeyPath, Mark] = {(): _mark(table.at)}
        marks |= {(key,): _mark(table.at / source) for key, source in sources.items()}
        return [self._spec("gptq", raw, marks)]

    def _gptq_weights(self, table: Table) -> list[str]:
        """Patterns of the selectors that GPTQ takes; those without a weight format get that of
        ``weight_config``.
        """
        family = table.need("format", str)
        if family not in ("mxint", "mxfp"):
            raise (table.at / "format").error(f"unknown format {family!r}", "'mxint' or 'mxfp'")
        inner = table.table("weight_config")
        if inner is None:
            raise table.at.error("[gptq] lacks the table 'weight_config'", "[gptq.weight_config]")
        inner.what = "[gptq.weight_config]"
        written = read_format(inner, "weight", family)
        inner.close()
        if written is None:
            raise inner.at.error("[gptq.weight_config] gives no format", "weight_width and weight_block_size")
        flagged = [one for one in self.chosen if one.gptq]
        taken = flagged or [one for one in self.chosen if one.kind == "linear" and "weight" in one.formats]
        if not taken:
            raise table.at.error("[gptq] has no weights to work on", "selectors of linears, with gptq = true")
        for one in taken:
            _agree(one, written)
        return [shadowed(self.chosen, self.chosen.index(one)) for one in taken]

    # -- rotation
    # -----------------------------------------------------------------------------------------------------

    def _rotation_search(self) -> list[PassSpec]:
        table = self.search
        assert table is not None
        table.refuse(
            {
                "device": "the machine is chosen on the command line: --device cuda:0; delete the line",
                "score_phase": _ONE_MODEL,
            }
        )
        self._set_model(table)
        raw: dict[str, Any] = {}
        if self.gptq is None:
            self._set_calibration(
                table,
                dataset=_dataset(table.take("calib_data", str, "wikitext2")),
                samples=table.take("calib_nsamples", int, 32),
                length=table.take("calib_seqlen", int, 512),
            )
        else:
            self._check_calib_data(table)
            raw |= _given(table, {"samples": ("calib_nsamples", int), "length": ("calib_seqlen", int)})
        raw |= _given(table, {"improvement_eps": ("improvement_eps", float), "cache_path": ("cache_path", str)})
        if not table.take("cache_winners", bool, True):
            raw.pop("cache_path", None)
        sites = table.take("matmul_types", tuple[str, ...])
        if sites is not None:
            raw["sites"] = _check_sites(table, sites)
        table.close()
        sources = {"samples": "calib_nsamples", "length": "calib_seqlen", "sites": "matmul_types"}
        marks: dict[KeyPath, Mark] = {(): _mark(table.at)}
        marks |= {(key,): _mark(table.at / sources.get(key, key)) for key in raw}
        return [self._spec("rotation-search", raw, marks)]

    def _check_calib_data(self, table: Table) -> None:
        dataset = table.take("calib_data", str)
        if dataset is not None and _dataset(dataset) != self.calibration.dataset:
            problem = f"calib_data = {dataset!r}, and [gptq] calibrates on {self.calibration.dataset!r}"
            table.fail("calib_data", problem, "one calibration set for the pipeline")

    def _online_rotations(self) -> list[PassSpec]:
        specs = []
        for index, one in enumerate(self.chosen):
            if one.rotated:
                raw: dict[str, Any] = {"select": shadowed(self.chosen, index)}
                raw |= {"sites": ["kv_cache"]} if one.kind == "attention" else {}
                specs.append(self._spec("online-rotation", raw, {(): _mark(one.table.at / "name")}))
        return specs

    # -- settings
    # -----------------------------------------------------------------------------------------------------

    def _set_model(self, table: Table) -> None:
        name = table.take("model_name", str)
        if name is None:
            return
        if self.model.name not in (None, name):
            table.fail("model_name", f"model_name = {name!r}, and [gptq] names {self.model.name!r}", "one model")
        self.model = ModelConfig(name=name)
        self._remember(("model", "name"), table.at / "model_name")

    def _set_calibration(self, table: Table, dataset: str, samples: int, length: int) -> None:
        try:
            self.calibration = CalibrationConfig(dataset, samples, length)
        except ValueError as error:
            raise table.at.error(str(error)) from error
        for key, names in (
            ("dataset", ("dataset", "calib_data")),
            ("samples", ("nsamples", "calib_nsamples")),
            ("length", ("seqlen", "calib_seqlen")),
        ):
            self._remember(("calibration", key), table.at / next((n for n in names if n in table), ""))

    def _remember(self, path: KeyPath, source: Cursor) -> None:
        if self.at.marks:
            self.marks[path] = _mark(source)


def _mark(at: Cursor) -> Mark:
    return Mark(at.place(of_key=True), at.place())


def _either(patterns: list[str]) -> str:
    return patterns[0] if len(patterns) == 1 else "|".join(f"(?:{pattern})" for pattern in patterns)


def _dataset(name: str) -> str:
    return name.removeprefix("file:")


def _given(table: Table, wanted: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    values = {option: table.take(key, hint) for option, (key, hint) in wanted.items()}
    return {option: value for option, value in values.items() if value is not None}


def _agree(one: Chosen, written: Written) -> None:
    """A selector that GPTQ takes has the format of ``[gptq.weight_config]``, or gets it."""
    own = one.formats.setdefault("weight", written)
    if own.element != written.element:
        raise own.at.error(
            f"{one.table.what} wants weights in {own.element}, "
            f"and [gptq.weight_config] ({written.at.place()}) makes {written.element}",
            "the same format in both",
        )


def _check_sites(table: Table, sites: tuple[str, ...]) -> list[str]:
    for index, site in enumerate(sites):
        if site in _SITES:
            continue
        at = table.at / "matmul_types" / index
        if site in ("qk_matmul", "av_matmul"):
            raise at.error(f"rotating {site} is not supported: only linears and kv_cache", f"one of {listed(_SITES)}")
        raise at.error(f"unknown matmul type {site!r}", f"one of {listed(_SITES)}", did_you_mean(site, _SITES))
    return list(sites)
