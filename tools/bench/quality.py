"""Quality of pipelines on a real model: several domains, configurations and seeds in one run.

    python -m tools.bench.quality FILE-or-ARM[;k=v…] … --model DIR --data DIR --domain encyclopedia=DIR
        [--domain code=DIR …] [--chat 50000] [--chat-as top_k=50] [--seeds 0 1 2] [--jobs 3] [--tokens 200000]
        [--domain-tokens 60000] [--device cuda] [--set k=v] [--minutes 9] [--scores DIR] [--saved DIR] [--hooks]
        [--json FILE]

An arm is a line of ``arms.toml`` beside this: a pipeline with what is changed in it, under a short name.

Prints the machine and the versions, then at once, for each configuration and seed: of each domain the ratio of token
perplexities to the float model in the same run, mean KL to it in nats with its standard error, the KL's 99 % quantile,
and how often both hold the same next token for the likeliest; bits a weight, seconds of the passes, peak memory (what
the benchmark itself holds is told apart), and both again for each pass that took a second. At the end a table with
medians over seeds. Of the first domain ``--tokens`` are read at most, of the others ``--domain-tokens`` each (less
where documents are short); ``--chat`` adds the float model's own answers, and each ``--chat-as`` as many drawn
otherwise (``temperature=0.7+top_k=50``), which means over domains leave out. ``--data`` stands for ``wikitext2`` in the
pipelines' calibration; what ``self`` needs is sampled before the clock of the passes starts, and timed apart. No
configuration is begun after ``--minutes``. With ``--jobs`` that many seeds run at a time, a process each; seconds are
then those of a shared device. ``--scores`` keeps every token's score for ``mxfx compare``, ``--saved`` each model as a
packed folder. With ``--hooks`` each pipeline that searched rotations gets a second row: an independent reference of the
tutorial's scheme, module hooks on the Hugging Face model with the same winners, its weights rounded by Mase's formula.
Needs neither the hub nor lm-eval.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers

from mxfx import api
from mxfx.calibration.datasets import TokenSet
from mxfx.calibration.sources import SELF, calibration_tokens
from mxfx.config import Pipeline, apply_overrides
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.driver.texts import FloatTexts
from mxfx.evaluation.compare import write_scores
from mxfx.evaluation.evaluate import Domain, measure, text_domain
from mxfx.evaluation.results import EvalResult
from mxfx.evaluation.scoring import FloatLogits
from mxfx.evaluation.wanted import CHAT, sampling
from mxfx.export.folder import save_folder
from mxfx.graph.program import Program
from mxfx.ground.progress import track
from mxfx.pipeline.manager import Instrument, PassManager, Run, Step
from mxfx.rewrite import Context
from mxfx.rewrite.size import bits_per_weight
from mxfx.runtime.causal_lm import as_causal_lm
from tests.reference.mase_hooks import quantize_activations
from tools.bench.mase_gptq import mase_gptq

#: Name → file and overrides.
ARMS: dict[str, list[str]] = tomllib.loads((Path(__file__).parent / "arms.toml").read_text(encoding="utf-8"))


#: Details of passes that are printed.
_SHOWN = ("held_out_by_step", "averaged_by_step", "held_out_error_by_layer", "bits")


def arm(name: str) -> list[str]:
    """A pipeline's file and what is changed in it; an arm may begin with another's name."""
    if name not in ARMS:
        return [name]
    first, *changes = ARMS[name]
    return [*arm(first), *changes]


@dataclass(frozen=True)
class OnDomain:
    """Figures of one domain; ``ratio`` is to the float model's token perplexity."""

    ratio: float
    kl: float
    kl_stderr: float | None
    p99: float
    agreement: float
    tokens: int


@dataclass(frozen=True)
class Result:
    """What one configuration came to with one seed."""

    config: str
    seed: int
    domains: dict[str, OnDomain]
    seconds: float
    sampling_seconds: float = 0.0
    bits_per_weight: float = math.nan
    peak_gb: float = math.nan
    details: dict = field(default_factory=dict)

    @property
    def mean_kl(self) -> float:
        return statistics.fmean(found.kl for name, found in self.domains.items() if _counts(name))

    @property
    def line(self) -> str:
        """What the bars are about, in one line: the first domain's ratio and the worst, the last one's agreement."""
        names = list(filter(_counts, self.domains))
        first, last = names[0], names[-1]
        worst = max(self.domains[name].ratio for name in names)
        return (
            f"{self.config} seed {self.seed}: mean KL {self.mean_kl:.4f}, x {self.domains[first].ratio:.4f} {first}, "
            f"x {worst:.4f} worst, agree {self.domains[last].agreement:.4f} {last}, {self.bits_per_weight:.3f} bits/w, "
            f"{self.seconds:.1f} s (+ {self.sampling_seconds:.1f} s of tokens), peak {self.peak_gb:.1f} GB"
        )


class _Costs(Instrument):
    """Seconds and peak GB of each pass, by its place and name; ``held`` GB were there before the first."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.held = math.nan
        self.of: dict[str, dict[str, float]] = {}

    def enter(self, run: Run) -> None:
        if self._on_gpu:
            self.held = torch.cuda.memory_allocated() / 1e9

    def before(self, step: Step) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def after(self, step: Step) -> None:
        peak = math.nan
        if self._on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 1e9
        seconds = time.perf_counter() - self._began
        self.of[f"{step.index} {step.pass_.name}"] = {"seconds": seconds, "peak_gb": peak}

    @property
    def peak(self) -> float:
        return max((found["peak_gb"] for found in self.of.values()), default=math.nan)

    @property
    def line(self) -> str:
        long = {name: found for name, found in self.of.items() if found["seconds"] >= 1}
        parts = (f"{name} {found['seconds']:.1f} s {found['peak_gb']:.2f} GB" for name, found in long.items())
        return f"{self.held:.2f} GB held before; " + ", ".join(parts)


def _counts(domain: str) -> bool:
    """Whether a domain is one of those that figures over all of them are of."""
    return not domain.startswith(f"{CHAT}:")


def main() -> int:
    args = _arguments()
    _print_machine(args)
    results = _in_processes(args) if args.jobs > 1 else Bench(args).run()
    rows = _medians(results)
    names = list(rows[0]["domains"]) if rows else []
    print(f"\n{'median over seeds':52} {'mean KL':>8} {'bits/w':>6} {'pass s':>7} {'GB':>5}  × float | KL | agreement")
    for row in rows:
        domains = "   ".join("{ratio:.3f} {kl:.4f} {agreement:.3f}".format(**row["domains"][name]) for name in names)
        print(
            f"{row['config']:52} {row['mean_kl']:8.4f} {row['bits_per_weight']:6.2f} {row['seconds']:7.1f} "
            f"{row['peak_gb']:5.1f}  {domains}"
        )
    print(f"domains: {', '.join(names)}")
    if args.json:
        _write(args, results, rows)
    return 0 if rows and all(row["seeds"] == len(args.seeds) for row in rows) else 1


def _write(args: argparse.Namespace, results: list[Result], rows: list[dict]) -> None:
    document = {"results": [asdict(result) for result in results], "medians": rows}
    Path(args.json).write_text(json.dumps(document, indent=2) + "\n")


def _medians(results: list[Result]) -> list[dict]:
    rows = []
    for config in dict.fromkeys(r.config for r in results):
        mine = [r for r in results if r.config == config]
        row = {
            name: statistics.median(getattr(r, name) for r in mine)
            for name in ("mean_kl", "seconds", "bits_per_weight", "peak_gb")
        }
        domains = {
            name: {
                figure: statistics.median(getattr(r.domains[name], figure) for r in mine)
                for figure in ("ratio", "kl", "p99", "agreement")
            }
            for name in mine[0].domains
        }
        rows.append({"config": config, "seeds": len(mine), "domains": domains, **row})
    return rows


def _in_processes(args: argparse.Namespace) -> list[Result]:
    """Each seed in a process of its own, ``--jobs`` at a time; what they found, together."""

    def one(seed: int) -> list[Result]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            own = [*sys.argv[1:], "--jobs", "1", "--seeds", str(seed), "--json", str(file)]
            subprocess.run([sys.executable, "-m", "tools.bench.quality", *own], check=False)
            found = json.loads(file.read_text())["results"] if file.exists() else []
        return [Result(**{**r, "domains": {n: OnDomain(**d) for n, d in r["domains"].items()}}) for r in found]

    with ThreadPoolExecutor(args.jobs) as pool:
        return [result for part in pool.map(one, args.seeds) for result in part]


class Bench:
    """The float program, the domains, and every configuration with every seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._started = time.perf_counter()
        self._tokenizer = load_tokenizer(args.model)
        self._model = load_model(args.model, args.dtype).to(args.device)
        traced = api.trace(self._model, name=args.model)
        self._texts = FloatTexts(self._model, self._tokenizer, args.device, args.cache, lambda: traced)
        self._domains = self._read_domains()
        self._program = PassManager().run(traced, Pipeline([]).completed()).program
        self._float = as_causal_lm(self._program, args.device)
        self._reference = FloatLogits(lambda: self._float)
        self._float_results = {d.name: self._measure(self._float, d, None) for d in self._domains}
        for name, found in self._float_results.items():
            print(f"float on {name}: token ppl {found.token_perplexity:.4f} on {found.tokens:,} tokens", flush=True)
        print(f"ready after {time.perf_counter() - self._started:.0f} s", flush=True)

    def run(self) -> list[Result]:
        results: list[Result] = []
        for entry in self._args.configs:
            for seed in self._args.seeds:
                if time.perf_counter() - self._started > 60 * self._args.minutes:
                    print(f"  {entry} seed {seed}: not begun, {self._args.minutes} minutes are over", flush=True)
                    continue
                try:
                    results += self._configuration(entry, seed)
                except Exception:
                    # One failing configuration must not cost the figures of the others.
                    traceback.print_exc(limit=-6)
                if self._args.json:
                    _write(self._args, results, _medians(results))
        return results

    def _read_domains(self) -> list[Domain]:
        args = self._args
        found = []
        for index, entry in enumerate(args.domain):
            name, _, path = entry.partition("=")
            limit = args.tokens if index == 0 else args.domain_tokens
            found.append(text_domain(name, self._tokenizer, path=path, limit_tokens=limit))
        if args.chat:
            began = time.perf_counter()
            for name in (CHAT, *(f"{CHAT}:{drawn}" for drawn in args.chat_as)):
                found.append(self._texts.chat(args.chat, 2048, sampling(name)))
            print(f"chat: {len(found[-1].windows)} answers in {time.perf_counter() - began:.0f} s", flush=True)
        return found

    def _configuration(self, entry: str, seed: int) -> list[Result]:
        """An entry is ``FILE`` or an arm, or ``…;k=v;k=v`` with overrides of its own."""
        args = self._args
        name, *own = entry.split(";")
        file, *given = arm(name)
        name = Path(name).stem + "".join(f" {o}" for o in own)
        own = [*given, *own]
        overrides = [f"model.name={json.dumps(args.model)}", *args.set, *own, f"calibration.seed={seed}"]
        pipeline = apply_overrides(api.load_pipeline(file), overrides)
        began = time.perf_counter()
        tokens = self._tokens(pipeline)
        ids = tokens.ids
        sampling = time.perf_counter() - began
        ctx = Context(
            seed=seed, device=torch.device(args.device), tokens=lambda: ids, progress=track if args.bars else _plain
        )
        on_gpu = args.device.startswith("cuda")
        if on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
        costs = _Costs(on_gpu)
        began = time.perf_counter()
        done = PassManager([costs]).run(self._program, pipeline, ctx)
        seconds = time.perf_counter() - began
        if args.saved:
            self._save(done.program, Path(args.saved) / f"{name}-{seed}".replace("/", "_").replace(" ", "_"))
        domains = self._on_domains(f"{name}-{seed}", as_causal_lm(done.program, args.device))
        details = {s.pass_.name: s.record.details for s in done.steps if s.pass_.name in ("distill", "allocate-bits")}
        details |= {"passes": costs.of, "held_gb": costs.held}
        details |= {"calibration": tokens.notes} if tokens.notes else {}
        result = Result(name, seed, domains, seconds, sampling, bits_per_weight(done.program), costs.peak, details)
        print(f"  passes: {costs.line}")
        _print(result, [w for s in done.steps for w in s.record.warnings])
        searched = [step.record.details for step in done.steps if "winners" in step.record.details]
        return [result, *([self._hooks(name, seed, ids, searched[0]["winners"])] if args.hooks and searched else [])]

    def _save(self, program: Program, folder: Path) -> None:
        """As `mxfx run` would: packed, with the tokenizer."""
        done = PassManager().run(program, Pipeline([]).emitted(torch.device(self._args.device).type))
        save_folder(done.portable, folder, tokenizer=self._tokenizer)

    def _tokens(self, pipeline: Pipeline) -> TokenSet:
        wanted = pipeline.calibration
        found = calibration_tokens(
            [source if source == SELF else self._args.data for source in wanted.sources],
            self._tokenizer,
            samples=wanted.samples,
            length=wanted.length,
            seed=wanted.seed,
            shares=wanted.shares,
            repeat=wanted.repeat,
            continued=wanted.continued,
            writer=self._texts.samples,
        )
        for note in found.notes:
            print(f"calibration: {note}", flush=True)
        return found

    def _hooks(self, name: str, seed: int, ids: torch.Tensor, winners: list[str]) -> Result:
        model = copy.deepcopy(self._model)
        wide = copy.deepcopy(model).float()
        mase_gptq(wide, ids)
        # Rounded weights are exact in the model's dtype; the rest is equal.
        model.load_state_dict({key: value.to(model.dtype) for key, value in wide.state_dict().items()})
        domains = self._on_domains("", quantize_activations(model, winners))
        result = Result(f"{name} by hooks, rotated {', '.join(winners)}", seed, domains, math.nan)
        _print(result, [])
        return result

    def _on_domains(self, label: str, model: torch.nn.Module) -> dict[str, OnDomain]:
        results = {domain.name: self._measure(model, domain, self._reference) for domain in self._domains}
        if self._args.scores and label:
            write_scores(Path(self._args.scores) / label.replace("/", "_"), results)
        found = {}
        for name, result in results.items():
            assert result.divergence is not None
            ratio = result.token_perplexity / self._float_results[name].token_perplexity
            d = result.divergence
            found[name] = OnDomain(ratio, d.mean, d.stderr, d.p99, d.agreement, result.tokens)
        return found

    def _measure(self, model: torch.nn.Module, domain: Domain, reference: FloatLogits | None) -> EvalResult:
        return measure(model, domain, self._tokenizer, batch_size=self._args.batch, reference=reference)


def _print(result: Result, warnings: list[str]) -> None:
    print(f"  {result.line}")
    for name, d in result.domains.items():
        error = "" if d.kl_stderr is None else f" ± {d.kl_stderr:.4f}"
        print(f"    {name:14} × {d.ratio:.4f}  KL {d.kl:.4f}{error}  99 % {d.p99:.2f}  agree {d.agreement:.4f}")
    for of, details in result.details.items():
        shown = {key: details[key] for key in _SHOWN if key in details} if isinstance(details, dict) else {}
        if shown:
            print(f"    {of}: {json.dumps(shown)}")
    for warning in warnings:
        print(f"    warning: {warning}")
    sys.stdout.flush()


def _plain(items, *_, **__):
    return iter(items)


def _print_machine(args) -> None:
    name = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}, {versions}, python {platform.python_version()}")
    print(f"model {args.model} in {args.dtype}; calibration {args.data}; domains {', '.join(args.domain)}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help=f"files, or arms: {', '.join(ARMS)}")
    for name in ("--model", "--data"):
        parser.add_argument(name, required=True)
    parser.add_argument("--domain", action="append", required=True, help="NAME=FILE or NAME=FOLDER")
    parser.add_argument("--chat", type=int, default=0, help="tokens of the float model's own answers")
    parser.add_argument("--chat-as", action="append", default=[], help="how more answers are drawn: top_k=50")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--domain-tokens", type=int, default=60_000)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="where sampled texts are kept; the user's cache otherwise")
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--saved", type=Path, help="each model as a packed folder in this one")
    parser.add_argument("--bars", action="store_true", help="progress bars of the passes")
    parser.add_argument("--hooks", action="store_true")
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
