"""``--to model-explorer``: the graph and overlays (format, bits, error, KL, time) for Google's Model Explorer.

``graph.json`` opens in it as it is (``model-explorer graph.json``); ``overlay_*.json`` are node data for its panel.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mxfx.export.errors import ExportError
from mxfx.export.target import Target, register
from mxfx.formats import parse
from mxfx.graph.execute import executable, execute
from mxfx.graph.fake import sizes_text
from mxfx.graph.node import info, op_name, path_of
from mxfx.graph.program import Program
from mxfx.ground.files import write_file

GRAPH = "graph.json"
_COLD, _HOT = "#e8f1fb", "#b2182b"
#: Of formats, in the order of their names.
_COLORS = ("#8dd3c7", "#ffffb3", "#bebada", "#fb8072", "#80b1d3", "#fdb462", "#b3de69", "#fccde5", "#d9d9d9", "#bc80bd")
#: KL takes a run for every quantizer: where that would take longer than these seconds, it is left out, and said.
_PATIENCE = 120.0


def graph_json(program: Program) -> dict[str, Any]:
    """The program as Model Explorer's graph collection; module paths are its nested layers."""
    nodes = [_node(node) for node in program.graph.nodes]
    return {"label": program.source.name, "graphs": [{"id": "program", "nodes": nodes}]}


def overlays(program: Program) -> dict[str, dict[str, float]]:
    """Overlay → node → figure, for the nodes that have one.

    bits: of the narrowest format on a node. ms: wall milliseconds of the node's definition on the probe, here.
    relative error: ‖Δ‖/‖y‖ of the node's value on the probe, with quantizers and without. KL: of the next-token
    distribution in nats a token, from the program without quantizers, where this quantizer alone rounds.
    """
    found: dict[str, dict[str, float]] = {"bits": {}}
    for node in program.graph.nodes:
        formats = info(node).formats.values()
        if formats:
            found["bits"][node.name] = min(annotation.format.bits_per_element for annotation in formats)
    if executable(program) is None:
        found["ms"], values = _timed(program)
        found["relative error"] = _errors(program, values)
        found["KL"] = _divergences(program, sum(found["ms"].values()) / 1e3)
    return found


def refuse(program: Program) -> str | None:
    return None


def write(program: Program, folder: Path, tokenizer: Any) -> tuple[str, ...]:
    _dump(folder / GRAPH, graph_json(program))
    found = overlays(program)
    for name, figures in found.items():
        data = {
            "name": name,
            "results": {node: {"value": figure} for node, figure in figures.items()},
            "gradient": [{"stop": 0, "bgColor": _COLD}, {"stop": 1, "bgColor": _HOT}],
        }
        _dump(folder / f"overlay_{name.replace(' ', '_')}.json", {"program": data})
    colors, results = _format_colors(program, found["bits"])
    _dump(folder / "overlay_format.json", {"program": {"name": "format (bits)", "results": results}})
    notes = ["open it with: model-explorer graph.json", *(f"{color}: {formats}" for formats, color in colors.items())]
    if "KL" in found and not found["KL"] and "quantizers-fused" not in program.facts and _quantizers(program):
        notes.append(
            f"no KL: a run for each of {len(_quantizers(program))} quantizers takes more than {_PATIENCE:.0f} s"
        )
    return tuple(notes)


def _format_colors(
    program: Program, bits: Mapping[str, float]
) -> tuple[dict[str, str], dict[str, dict[str, float | str]]]:
    """A color for each combination of formats, and the nodes in it."""
    named = {
        node.name: ", ".join(sorted({str(annotation.format) for annotation in info(node).formats.values()}))
        for node in program.graph.nodes
        if node.name in bits
    }
    colors = {formats: _COLORS[i % len(_COLORS)] for i, formats in enumerate(sorted(set(named.values())))}
    return colors, {name: {"value": bits[name], "bgColor": colors[formats]} for name, formats in named.items()}


def prove(program: Program, folder: Path) -> Mapping[str, object]:
    """Model Explorer's own classes take the file, and it has the program's nodes and edges."""
    import dacite
    from model_explorer.graph_builder import Graph
    from model_explorer.node_data_builder import GraphNodeData

    (graph,) = json.loads((folder / GRAPH).read_bytes())["graphs"]
    read = dacite.from_dict(Graph, graph)
    edges = sum(len(node.incomingEdges) for node in read.nodes)
    expected = sum(len(node.all_input_nodes) for node in program.graph.nodes)
    if [node.id for node in read.nodes] != [node.name for node in program.graph.nodes] or edges != expected:
        raise ExportError("Model Explorer reads another graph than was written")
    files = sorted(folder.glob("overlay_*.json"))
    for file in files:
        dacite.from_dict(GraphNodeData, json.loads(file.read_bytes())["program"])
    return {"nodes": len(read.nodes), "edges": edges, "overlays": len(files)}


def _node(node: fx.Node) -> dict[str, Any]:
    attributes = {"path": path_of(node), "passes": ", ".join(info(node).passes)}
    attributes |= {f"format of {operand}": str(a.format) for operand, a in info(node).formats.items()}
    constants = [f"{a}" for a in node.args if not isinstance(a, fx.Node)]
    if constants:
        attributes["constants"] = ", ".join(constants)
    val = node.meta.get("val")
    shape = "×".join(sizes_text(val)) if isinstance(val, Tensor) else ""
    dtype = str(val.dtype).removeprefix("torch.") if isinstance(val, Tensor) else ""
    outputs = [{"id": "0", "attrs": _pairs({"shape": f"{dtype}[{shape}]"})}] if dtype else []
    return {
        "id": node.name,
        "label": str(node.target) if node.op in ("placeholder", "get_attr") else op_name(node),
        "namespace": path_of(node).replace(".", "/"),
        "attrs": _pairs({key: value for key, value in attributes.items() if value}),
        "incomingEdges": [
            {"sourceNodeId": source.name, "targetNodeInputId": str(place)}
            for place, source in enumerate(node.all_input_nodes)
        ],
        "outputsMetadata": outputs,
    }


def _pairs(attributes: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in attributes.items()]


def _probe(program: Program) -> Tensor:
    vocabulary = int(program.source.config.get("vocab_size", 2))  # type: ignore[call-overload]
    return torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))


def _timed(program: Program) -> tuple[dict[str, float], dict[str, Tensor]]:
    milliseconds: dict[str, float] = {}
    values: dict[str, Tensor] = {}
    started = time.perf_counter()

    def observe(node: fx.Node, value: object) -> object:
        nonlocal started
        milliseconds[node.name] = 1e3 * (time.perf_counter() - started)
        if isinstance(value, Tensor) and value.is_floating_point():
            values[node.name] = value
        started = time.perf_counter()
        return value

    execute(program, _probe(program), observe=observe)
    return milliseconds, values


def _errors(program: Program, values: Mapping[str, Tensor]) -> dict[str, float]:
    if "quantizers-fused" in program.facts or "lowered" in program.facts:
        return {}
    errors: dict[str, float] = {}

    def observe(node: fx.Node, value: object) -> object:
        quantized = values.get(node.name)
        if quantized is not None and isinstance(value, Tensor) and float(value.float().norm()) > 0:
            errors[node.name] = float((quantized.float() - value.float()).norm() / value.float().norm())
        return value

    execute(program, _probe(program), quantize=False, observe=observe)
    return {name: error for name, error in errors.items() if error == error}


def _quantizers(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target == torch.ops.mxfx.fake_quantize.default]


def _divergences(program: Program, seconds: float) -> dict[str, float]:
    """KL of each quantizer of activations by itself; ``seconds`` is what one run takes."""
    quantizers = _quantizers(program)
    if "quantizers-fused" in program.facts or "lowered" in program.facts or seconds * len(quantizers) > _PATIENCE:
        return {}
    ids = _probe(program)
    expected = execute(program, ids, quantize=False).float().log_softmax(-1)
    found = {}
    for chosen in quantizers:

        def round_one(node: fx.Node, value: object, chosen: fx.Node = chosen) -> object:
            if node is not chosen:
                return value
            assert isinstance(value, Tensor)
            return parse(str(node.args[1])).fake_quantize(value, int(node.args[2]))

        actual = execute(program, ids, quantize=False, observe=round_one).float().log_softmax(-1)
        kl = torch.nn.functional.kl_div(actual, expected, reduction="none", log_target=True).sum(-1).mean()
        found[chosen.name] = float(kl)
    return found


def _dump(path: Path, data: object) -> None:
    write_file(path, json.dumps(data, allow_nan=False).encode())


register(
    Target(
        "model-explorer",
        "graph and overlays for Google's Model Explorer",
        refuse,
        write,
        prove,
        needs=("model_explorer",),
        of=lambda program: program,
    )
)
