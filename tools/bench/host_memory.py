"""Host memory while a model is quantized from its files: what the process holds beside pages of files.

    python -m tools.bench.host_memory [--gb 30] [--device cuda] [--folder DIR] [--json FILE]

Writes a Llama of random weights of that size to a folder, layer by layer; then, in a process of its own, loads it,
runs annotate, gptq and pack-weights with new weights in mapped files, saves the artefact and proves it in pieces, as
``mxfx run`` does with a model that does not fit. On a CPU ``--gptq-layers 2`` lets gptq take only so many layers, and
round-weights the rest: its solver would take minutes a layer. Prints, after each of them and beside the bar of
two layers and 4 GB: the most anonymous memory that the process held (what the system cannot take back), and the most
of pages of files that were mapped (which it can). Needs disk of three times the size.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from mxfx.api import trace
from mxfx.config import Pipeline
from mxfx.config.emit import EmitConfig
from mxfx.driver.pretrained import load_model
from mxfx.driver.proof import check_saved, logits_of
from mxfx.export.artefact import safetensors_pieces, save
from mxfx.formats import parse
from mxfx.ground.files import write_file, write_json
from mxfx.passes import Annotate, Gptq, PackWeights, RoundWeights, Rule
from mxfx.pipeline.emit import emitted
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context, Selector
from tools.bench.measuring import finish

_BAR = 4e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=30, help="of the model in bfloat16")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--gptq-layers", type=int, help="that gptq takes; all by default")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the model is written; a temporary one by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        finish([_quantize(args)], args.json)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_model(Path(folder) / "model", args.gb, args.hidden)
        # A process that never held what was written.
        command = [sys.executable, "-m", "tools.bench.host_memory", *sys.argv[1:], "--inside"]
        raise SystemExit(subprocess.run([*command, "--folder", folder], check=False).returncode)


def write_model(folder: Path, gb: float, hidden: int) -> None:
    """A folder as ``save_pretrained`` writes it, a file a layer, of about so many bytes."""
    intermediate = hidden * 7 // 2
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    layers = max(2, round(gb * 1e9 / (2 * sum(rows * columns for rows, columns in layer.values()))))
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    weights = _Random(2 * max([8192 * hidden, *(rows * columns for rows, columns in layer.values())]))
    places: dict[str, str] = {}
    for number, names in enumerate(_files(layers, layer)):
        tensors = {name: weights(shape) for name, shape in names.items()}
        file = f"model-{number:05d}.safetensors"
        if number == layers:
            tensors |= {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
            tensors |= {"model.embed_tokens.weight": weights((8192, hidden))}
        else:
            norms = ("input_layernorm", "post_attention_layernorm")
            one = torch.ones(hidden, dtype=torch.bfloat16)
            tensors |= {f"model.layers.{number}.{norm}.weight": one for norm in norms}
        # Nobody needs them behind a crash.
        write_file(folder / file, safetensors_pieces(tensors), flush=False)
        places |= dict.fromkeys(tensors, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def _files(layers: int, layer: dict[str, tuple[int, int]]) -> Iterator[dict[str, tuple[int, int]]]:
    for index in range(layers):
        yield {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    yield {}


class _Random:
    """Random weights as fast as a disk writes: each begins elsewhere in one long row of them."""

    def __init__(self, count: int) -> None:
        self._row = torch.empty(count, dtype=torch.bfloat16).uniform_(-0.05, 0.05)
        self._places = random.Random(0)

    def __call__(self, shape: tuple[int, int]) -> torch.Tensor:
        count = shape[0] * shape[1]
        start = self._places.randrange(len(self._row) - count)
        return self._row[start : start + count].view(shape)


class _Watch:
    """The most that a process held, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.most = {"RssAnon": 0, "RssFile": 0}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        self._ends.set()
        self._thread.join()
        return self.most

    def _look(self) -> None:
        while not self._ends.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.most:
                    self.most[name] = max(self.most[name], 1024 * int(value.split()[0]))


def _quantize(args: argparse.Namespace) -> dict[str, object]:
    model = load_model(args.folder / "model", "bfloat16")
    size = sum(p.nbytes for p in model.parameters())
    layers = model.config.num_hidden_layers
    started, watch = time.perf_counter(), _Watch()
    print(f"{size / 1e9:.3f} GB in {layers} layers", flush=True)
    program = trace(model, proven=False)
    program.weights.keep_in_files(args.folder / "weights")
    ids = torch.randint(3, 8192, (args.samples, args.length), generator=torch.Generator().manual_seed(0))
    ctx = Context(device=torch.device(args.device), tokens=lambda: ids)
    rule = Rule(Selector(r"model\.layers\.\d+\..*_proj"), weight=parse("mxint4@32"))
    passes = [Annotate((rule,)), Gptq(batch_size=4, max_layers=args.gptq_layers), RoundWeights(), PackWeights()]
    packed = PassManager().run(program, Pipeline(passes).completed(), ctx).program
    after: dict[str, float] = {}

    def note(what: str) -> None:
        # At once: a run that is cut off has said that much.
        after[what] = watch.most["RssAnon"] / 1e9
        print(f"{time.perf_counter() - started:.0f} s, {after[what]:.3f} GB held at most after {what}", flush=True)

    note("passes")
    save(packed, args.folder / "artefact")
    note("saving")
    settings = EmitConfig(packed=True)
    logits = logits_of(emitted(packed, ctx.device, settings), ids[:1, :64], ctx.device, whole=False)
    note("running")
    del packed, program, model
    check_saved(args.folder / "artefact", logits, ids[:1, :64], ctx.device, settings, files=args.folder / "proof")
    most = watch.stop()
    bar = 2 * size / layers + _BAR
    return {
        "model GB": size / 1e9,
        "layers": layers,
        "s": time.perf_counter() - started,
        **{f"GB after {what}": held for what, held in after.items()},
        "most GB held": most["RssAnon"] / 1e9,
        "bar GB": bar / 1e9,
        "most GB of files mapped": most["RssFile"] / 1e9,
        "artefact GB": sum(f.stat().st_size for f in (args.folder / "artefact").iterdir()) / 1e9,
    }


if __name__ == "__main__":
    main()
