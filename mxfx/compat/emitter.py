"""What a file of the dialect asks for -> the passes of a pipeline, each option with the key that it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mxfx.compat.selectors import WHY_NOT_PROBS, Chosen, shadowed
from mxfx.compat.table import Table
from mxfx.compat.widths import Written, read_format
from mxfx.config import options
from mxfx.config.locate import Cursor, KeyPath, Mark
from mxfx.config.options import listed
from mxfx.config.phases import PhasesConfig
from mxfx.config.pipeline import CalibrationConfig, ModelConfig, Pipeline
from mxfx.config.spec import PassSpec
from mxfx.ground.nearest import did_you_mean
from mxfx.ground.phases import PHASES

#: Types of matmul that a search may name.
SITES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"),
    *("qk_matmul", "av_matmul", "kv_cache"),
)
_ONE_MODEL = "a search scores the whole model, which has one precision in it for prefill and decode"
_DECISIONS = "rotation_decisions.json"
#: Operands inside attention, in words.
_INNER = {"q": "queries", "probs": "probabilities", "softmax": "scores"}


class Emitter:
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
        self.phased = any(one.phase for one in self.chosen)
        optimized = self._gptq() if self.gptq is not None else self._without_gptq()
        search = self._rotation_search() if self.search is not None else []
        rules = self._annotate()
        operands = {key for one in self.chosen for key in one.formats}
        specs = [*rules, *optimized]
        # An embedding and a head that share a tensor keep it where they agree, and else each rounds one of its own.
        specs += self._plain("round-weights", operands & {"weight", "bias"}, {"untie": True})
        rotations = [*search, *self._online_rotations()]
        specs += rotations
        if self.phased:
            self._refuse_spelled_out()
        specs += self._plain("expand-attention", operands & _INNER.keys(), of=_is_spelled_out)
        # A rotated cache is quantized by insert-fake-quant: the rotation back stands between it and attention.
        activations = {"input", "q", "probs", "softmax", "rope"} | ({"kv", "k", "v"} if rotations else set())
        specs += self._plain("insert-fake-quant", operands & activations)
        specs += self._plain("quantize-kv-cache", operands & {"kv", "k", "v"}, of=_has_cache)
        phases = self._phases() if self.phased else None
        root = Cursor(self.at.source, self.marks)
        return Pipeline(specs, self.model, self.calibration, phases=phases, root=root).completed()

    def _refuse_spelled_out(self) -> None:
        """Raise ``ConfigError`` for operands inside attention: what is spelled out for them has no cache."""
        for one in filter(_is_spelled_out, self.chosen):
            for operand in (key for key in one.formats if key in _INNER):
                raise one.formats[operand].at.error(
                    f"{one.table.what} rounds {_INNER[operand]} of attention, which is spelled out for it and has no "
                    "cache that goes from prefill to decode",
                    "bypass = true, or a file without phases",
                )

    def _annotate(self) -> list[PassSpec]:
        """The rules of ``annotate``; those of a file with phases are in the phases, each with all of its own."""
        rules, marks = ([], {}) if self.phased else _rules(self.chosen, ())
        if not rules and not self.phased:
            return []
        # Files of the dialect are shared between families: a selector may speak of modules that this one lacks.
        return [self._spec("annotate", {"rule": rules, "unmatched": "warn"}, marks)]

    def _phases(self) -> PhasesConfig:
        """What prefill and decode have of their own: everything."""
        handoffs = {one.handoff: one.table for one in self.chosen if one.handoff}
        if len(handoffs) > 1:
            raise handoffs["requantize"].at.error(
                "selectors hand caches over in two ways: what a prefill has is kept, and is rounded to decode's format",
                "one kv_cache_handoff for all, and a prefill's kv_cache for all or none",
            )
        raw: dict[str, Any] = {"handoff": next(iter(handoffs), "keep")}
        for phase in PHASES:
            mine = [one for one in self.chosen if one.phase in ("", phase)]
            rules, marks = _rules(mine, ("phases", phase))
            raw[phase] = {"rule": rules}
            self.marks.update(marks if self.at.marks else {})
        found: PhasesConfig = options.read_dataclass(PhasesConfig, raw, Cursor(self.at.source, self.marks) / "phases")
        return found

    def _plain(
        self,
        name: str,
        wanted: set[str],
        options: Mapping[str, Any] | None = None,
        of: Callable[[Chosen], bool] = lambda one: True,
    ) -> list[PassSpec]:
        """A pass with fixed options, if a selector for which `of` holds sets an operand that the pass works on."""
        givers = [one for one in self.chosen if wanted & one.formats.keys() and of(one)]
        return [self._spec(name, dict(options or {}), {(): _mark(givers[0].table.at)})] if givers else []

    def _spec(self, name: str, raw: dict[str, Any], marks: dict[KeyPath, Mark]) -> PassSpec:
        found = marks if self.at.marks else {}
        return PassSpec.read(name, raw, Cursor(self.at.source, found))

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
                "device_map_aware": "mxfx streams the model layer by layer whatever its placement",
                "min_expert_calibration_hits": "mixture-of-experts layers are not calibrated by expert",
            }
        )
        phase = self._calibrated(table)
        _take_machine(table)
        self._set_model(table)
        self._set_calibration(
            table,
            dataset=_dataset(table.take("dataset", str, "wikitext2")),
            samples=table.take("nsamples", int, 128),
            length=table.take("seqlen", int, 256),
        )
        by_weight, by_output = table.take("quantile_search", bool, True), table.take("clip_search_y", bool, False)
        weights = self._gptq_weights(table, phase, search=by_weight and not by_output)
        if not weights:
            table.close()
            return []
        raw: dict[str, Any] = {
            "select": _either(weights),
            # The scale that leaves least error in the output, or the one that the format's rule finds.
            "exponents": "sweep" if by_output else "rule",
            "batch_size": table.take("cali_batch_size", int, 32),
            # What the products will really read is the better guide to rounding; Mase has no such key.
            "quantized_inputs": table.take("quantized_inputs", bool, True),
        }
        raw |= {} if phase is None else {"phase": phase}
        sources = {"exponents": "clip_search_y", "batch_size": "cali_batch_size", "phase": "phase"}
        for key in ("max_layers", "checkpoint_dir"):
            value = table.take(key, int if key == "max_layers" else str)
            if value is not None:
                raw[key] = value
                sources[key] = key
        table.close()
        marks: dict[KeyPath, Mark] = {(): _mark(table.at)}
        marks |= {(key,): _mark(table.at / source) for key, source in sources.items()}
        return [self._spec("gptq", raw, marks)]

    def _calibrated(self, table: Table) -> str | None:
        """The phase whose weights GPTQ makes, with its formats; None for both."""
        phase: str = table.take("phase", str, "both")
        if phase not in (*PHASES, "both"):
            raise (table.at / "phase").error(f"phase = {phase!r}", "one of both, decode, prefill")
        if phase == "both":
            return None
        if not self.phased:
            problem = f"phase = {phase!r}, and no selector has a bucket 'prefill' or 'decode'"
            table.fail("phase", problem, 'phase = "both", or buckets')
        if any(one.phase not in ("", phase) and "weight" in one.formats for one in self.chosen):
            table.warn(
                "phase", f"the weights of both phases have formats: where these agree, both get those of {phase}"
            )
        return phase

    def _gptq_weights(self, table: Table, phase: str | None, *, search: bool) -> list[str]:
        """Patterns of the selectors that GPTQ takes; those without a weight format get that of ``weight_config``.

        With ``search`` their scales are those of the smaller error of the weight (``/mse``).
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
        if written is None and inner.left:
            return []
        if written is None:
            raise inner.at.error("[gptq.weight_config] gives no format", "weight_width and weight_block_size")
        mine = [one for one in self.chosen if phase is None or one.phase in ("", phase)]
        flagged = [one for one in mine if one.gptq]
        taken = flagged or [one for one in mine if one.kind == "linear" and "weight" in one.formats]
        if not taken:
            raise table.at.error("[gptq] has no weights to work on", "selectors of linears, with gptq = true")
        for one in taken:
            _agree(one, written)
            if search:
                own = one.formats["weight"]
                one.formats["weight"] = replace(own, text=f"{own.element}/mse")
        return list(dict.fromkeys(self._shadowed(one) for one in taken))

    def _shadowed(self, one: Chosen) -> str:
        """The pattern of a selector without what earlier ones of its phase have taken."""
        mine = [other for other in self.chosen if other.phase in ("", one.phase)]
        return shadowed(mine, mine.index(one))

    def _rotation_search(self) -> list[PassSpec]:
        table = self.search
        assert table is not None
        table.refuse(
            {
                "score_phase": _ONE_MODEL,
            }
        )
        _take_machine(table)
        self._set_model(table)
        raw: dict[str, Any] = {}
        samples, length = table.take("calib_nsamples", int, 32), table.take("calib_seqlen", int, 1024)
        if self.gptq is None:
            dataset = _dataset(table.take("calib_data", str, "wikitext2"))
            self._set_calibration(table, dataset=dataset, samples=samples, length=length)
        else:
            raw |= {"samples": samples, "length": length, **self._own_data(table, samples, length)}
        raw |= _given(table, {"improvement_eps": ("improvement_eps", float)})
        cached, file = table.take("cache_winners", bool, True), table.take("cache_path", str)
        if file is None and self.gptq is not None and "checkpoint_dir" in self.gptq:
            file = str(Path(self.gptq.take("checkpoint_dir", str)) / _DECISIONS)
        if cached and file is not None:
            raw["cache_path"] = file
        sites = table.take("matmul_types", tuple[str, ...])
        if sites is not None:
            raw["sites"] = _check_sites(table, sites)
        table.close()
        sources = {
            "dataset": "calib_data",
            "samples": "calib_nsamples",
            "length": "calib_seqlen",
            "sites": "matmul_types",
        }
        marks: dict[KeyPath, Mark] = {(): _mark(table.at)}
        marks |= {(key,): _mark(table.at / sources.get(key, key)) for key in raw}
        return [self._spec("rotation-search", raw, marks)]

    def _own_data(self, table: Table, samples: int, length: int) -> dict[str, str]:
        """The data set that the search reads, unless its samples are some of those that GPTQ calibrates on."""
        have, named = self.calibration, table.take("calib_data", str)
        dataset = str(have.dataset) if named is None else _dataset(named)
        shared = dataset == have.dataset and samples <= have.samples and length <= have.length
        return {} if shared else {"dataset": dataset}

    def _online_rotations(self) -> list[PassSpec]:
        specs = []
        for one in self.chosen:
            if one.rotated:
                raw: dict[str, Any] = {"select": self._shadowed(one)}
                raw |= {"sites": list(one.rotated)} if one.kind == "attention" else {}
                specs.append(self._spec("online-rotation", raw, {(): _mark(one.table.at / "name")}))
        return specs

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


def _rules(chosen: Sequence[Chosen], below: KeyPath) -> tuple[list[dict[str, str]], dict[KeyPath, Mark]]:
    """Rules of ``annotate`` for selectors, and where each option of them was written, by its path ``below``."""
    rules: list[dict[str, str]] = []
    marks: dict[KeyPath, Mark] = {}
    for index, one in enumerate(chosen):
        if not one.formats:
            continue
        place: KeyPath = (*below, "rule", len(rules))
        header = _mark(one.table.at)
        marks |= {below: header, place: header, (*place, "match"): header}
        marks |= {(*place, key): _mark(written.at) for key, written in one.formats.items()}
        written = {key: given.text for key, given in one.formats.items()}
        rules.append({"match": shadowed(chosen, index), **written})
    return rules, marks


def _is_spelled_out(one: Chosen) -> bool:
    """Whether the attention that a selector means has operands inside it to round; a rotated query is outside."""
    return bool({"probs", "softmax"} & one.formats.keys()) or ("q" in one.formats and "qk_matmul" not in one.rotated)


def _has_cache(one: Chosen) -> bool:
    """Whether keys and values reach one node of attention as they are."""
    return "kv_cache" not in one.rotated and not _is_spelled_out(one)


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


def _take_machine(table: Table) -> None:
    """Keys that callers of Mase set: ``device`` is read by ``quantize_module_transform_pass``, a token by nobody."""
    table.ignore("device")
    if table.take("hf_token", str | None) is not None:
        table.warn("hf_token", "hf_token is not read: set the environment variable HF_TOKEN")


def _check_sites(table: Table, sites: tuple[str, ...]) -> list[str]:
    for index, site in enumerate(sites):
        if site not in SITES:
            at = table.at / "matmul_types" / index
            raise at.error(f"unknown matmul type {site!r}", f"one of {listed(SITES)}", did_you_mean(site, SITES))
    if "av_matmul" in sites:
        table.warn("matmul_types", f"av_matmul is not rotated: {WHY_NOT_PROBS}")
    return [site for site in sites if site != "av_matmul"]
