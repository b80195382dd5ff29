"""Mase's tutorial 7, "MX post-training quantization", with mxfx: W4 A4 KV4 in MXINT4, three ways, each measured.

    .venv/bin/python tools/tutorial.py                 SmolLM2-135M from a Python package; an hour or more on 2 cores
    .venv/bin/python tools/tutorial.py --short         the same in minutes: few tokens, three types in the search
    .venv/bin/python tools/tutorial.py --model unsloth/Llama-3.2-1B --device cuda      the tutorial's own model

The three files are the tutorial's, byte for byte. Its script runs with its imports changed; here it is told again, step
by step, with local texts in place of the hub's, and two plots. Figures, plots and what the passes keep go to --out.

A  round to nearest: every linear of the decoder and the KV cache in MXINT4, blocks of 32.
B  + GPTQ: weights are rounded so that outputs on calibration text change least.
C  + greedy search for online rotations: kinds of matmul whose activations have outliers meet their format rotated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxfx.compat import load_quant_config, quantize_module_transform_pass
from mxfx.evaluation.evaluate import evaluate
from mxfx.evaluation.scoring import FloatLogits

CONFIGS = Path(__file__).resolve().parents[1] / "passes_configs"
FILES = {"A": "tutorial_a_rtn.toml", "B": "tutorial_b_gptq.toml", "C": "tutorial_c_rotation_search.toml"}
ADDS = {"A": "round to nearest", "B": "+ GPTQ", "C": "+ rotation search"}
#: The tutorial's page: word perplexity of Llama-3.2-1B on wikitext, by lm-eval.
THEIRS = {"float": 12.8835, "A": 54.8872, "B": 31.0363, "C": 20.4134}


@dataclass(frozen=True)
class Sizes:
    """How much is read: calibration samples of so many tokens, tokens that are evaluated, types that are searched."""

    samples: int
    length: int
    evaluated: int | None
    window: int
    types: tuple[str, ...] | None


FULL = Sizes(32, 512, None, 2048, None)
SHORT = Sizes(4, 128, 2000, 512, ("down_proj", "o_proj", "kv_cache"))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = _parse(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    sizes = SHORT if given.short else FULL
    model_name, calibration, evaluation = _materials(given)
    tokenizer = AutoTokenizer.from_pretrained(model_name)

    def fresh_model() -> Any:
        return (
            AutoModelForCausalLM.from_pretrained(model_name, dtype=getattr(torch, given.dtype)).eval().to(given.device)
        )

    print("Float: what everything is compared with")
    reference = FloatLogits(fresh_model)

    def measured(model: Any) -> dict[str, float]:
        found = evaluate(
            model, tokenizer, eval_data=evaluation, limit_tokens=sizes.evaluated, max_length=sizes.window,
            reference=reference,
        )  # fmt: skip
        return {
            "word_perplexity": found.word_perplexity,
            "token_perplexity": found.token_perplexity,
            "kl": 0.0 if found.divergence is None else found.divergence.mean,
            "tokens": found.tokens,
        }

    figures = {"float": measured(fresh_model())}
    print(f"  word perplexity {figures['float']['word_perplexity']:.4f}")
    for name in FILES:
        print(f"Configuration {name}: {ADDS[name]}, {FILES[name]}")
        pass_args = quantization(name, str(model_name), calibration, given.out, sizes)
        quantized, _ = quantize_module_transform_pass(fresh_model(), pass_args)
        figures[name] = measured(quantized)
        ratio = figures[name]["word_perplexity"] / figures["float"]["word_perplexity"]
        print(f"  word perplexity {figures[name]['word_perplexity']:.4f}, {ratio:.3f} x float")
    decided = json.loads((given.out / "rotation_decisions.json").read_text(encoding="utf-8"))
    result = {"model": str(model_name), "figures": figures, "search": decided}
    (given.out / "tutorial.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(recap(figures, decided)))
    print("\n".join(f"written: {file}" for file in [given.out / "tutorial.json", *plots(figures, decided, given.out)]))
    return result


def quantization(name: str, model_name: str, calibration: str, out: Path, sizes: Sizes) -> dict[str, Any]:
    """The tutorial's file as ``pass_args``, its data set and places changed to local ones."""
    args = deepcopy(load_quant_config(CONFIGS / FILES[name]))
    if "gptq" in args:
        # B and C share a folder: C finds the weights that B solved for, and searches at once.
        args["gptq"] |= {"model_name": model_name, "dataset": f"file:{calibration}", "nsamples": sizes.samples}
        args["gptq"] |= {"seqlen": sizes.length, "checkpoint_dir": str(out / "gptq")}
    if "rotation_search" in args:
        args["rotation_search"] |= {"calib_nsamples": sizes.samples, "calib_seqlen": sizes.length}
        args["rotation_search"] |= {"cache_path": str(out / "rotation_decisions.json")}
        args["rotation_search"] |= {} if sizes.types is None else {"matmul_types": list(sizes.types)}
    return args


def recap(figures: Mapping[str, Mapping[str, float]], decided: Mapping[str, Any]) -> Iterator[str]:
    """The table that the tutorial ends with, and what C decided."""
    base = figures["float"]["word_perplexity"]
    yield f"{'':<6} {'adds':<18} {'word ppl':>10} {'x float':>8} {'KL':>7} {'x float, Llama-3.2-1B (the page)':>34}"
    for name, row in figures.items():
        ratio, theirs = row["word_perplexity"] / base, THEIRS[name] / THEIRS["float"]
        adds = ADDS.get(name, "")
        yield f"{name:<6} {adds:<18} {row['word_perplexity']:>10.4f} {ratio:>8.3f} {row['kl']:>7.4f} {theirs:>34.3f}"
    rotated = ", ".join(decided["winners"]) or "nothing"
    yield f"C rotates {rotated}: calibration perplexity {decided['baseline']:.4f} -> {decided['perplexity']:.4f}"


def plots(figures: Mapping[str, Mapping[str, float]], decided: Mapping[str, Any], out: Path) -> Iterator[Path]:
    """``perplexity.svg`` and ``search.svg``; nothing where matplotlib is not installed, which is said."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: pip install 'mxfx[bench]' brings matplotlib")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    for name, draw in {"perplexity": _draw_perplexity, "search": _draw_search}.items():
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
        draw(axes, figures if name == "perplexity" else decided)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(out / f"{name}.svg")
        pyplot.close(figure)
        yield out / f"{name}.svg"


def _draw_perplexity(axes: Any, figures: Mapping[str, Mapping[str, float]]) -> None:
    names = [name for name in figures if name != "float"]
    here = [figures[name]["word_perplexity"] / figures["float"]["word_perplexity"] for name in names]
    page = [THEIRS[name] / THEIRS["float"] for name in names]
    for offset, values, label in ((-0.2, here, "here"), (0.2, page, "Llama-3.2-1B, the page's chop")):
        bars = axes.bar([i + offset for i in range(len(names))], values, 0.38, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(names)), [f"{name}\n{ADDS[name]}" for name in names])
    axes.set_ylabel("word perplexity, x float")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.legend(frameon=False)


def _draw_search(axes: Any, decided: Mapping[str, Any]) -> None:
    rounds = range(1, len(decided["steps"]) + 1)
    best = [decided["baseline"]]
    for number, step in zip(rounds, decided["steps"], strict=True):
        for site, perplexity in step["perplexity"].items():
            won = site == step["winner"]
            axes.plot(number, perplexity, "o", color="C0" if won else "lightgray", markersize=6 if won else 4)
            if won:
                axes.annotate(f" {site}", (number, perplexity), fontsize=8, va="bottom")
        best.append(best[-1] if step["winner"] is None else step["perplexity"][step["winner"]])
    axes.step(range(len(best)), best, where="post", color="C0", linewidth=1)
    axes.set_xticks(range(len(best)))
    axes.set_xlabel("round (gray: what else was tried)")
    axes.set_ylabel("calibration perplexity")


def _materials(given: argparse.Namespace) -> tuple[str, str, str]:
    """Model, calibration and evaluation texts; those that are not given are the demo's."""
    from tools import assets

    wanted: list[tuple[str | None, Callable[[], Path]]] = [
        (given.model, assets.model_dir),
        (given.calibration, assets.calibration_dir),
        (given.evaluation, assets.evaluation_dir),
    ]
    model, calibration, evaluation = (str(made()) if path is None else path for path, made in wanted)
    return model, calibration, evaluation


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few tokens, three types in the search")
    parser.add_argument("--model", help="folder or hub id (the demo's SmolLM2-135M)")
    parser.add_argument("--calibration", help="folder or file of texts (the demo's articles)")
    parser.add_argument("--evaluation", help="folder or file of texts (other articles)")
    parser.add_argument("--out", type=Path, default=Path("out/tutorial"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="precision that the model is loaded in")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Of this checkout, wherever it is called from.
    import sys

    sys.path.insert(0, str(CONFIGS.parent))
    main()
