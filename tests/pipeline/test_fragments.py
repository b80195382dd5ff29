"""Passes on parts of graphs: each case of ``tests/filecheck/fragments`` has the graph before and the graph after in it.

// PASSES: NAME            the pass, with its options, and those that it needs before it
// PASSES: NAME            of one case alone, where its options differ
// words
the graph before, as ``mxfx opt -`` reads it
// AFTER
what ``mxfx opt -`` prints
// -----                   the next case
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mxfx import cli
from mxfx.config.pipeline import register_passes
from mxfx.graph.text import SEPARATOR, TextError, parse_fragment
from mxfx.graph.weights import WeightStore
from mxfx.pipeline.manager import PassManager
from mxfx.pipeline.opt import opt_fragments, random_ids, read_passes
from mxfx.rewrite import all_passes

pytestmark = pytest.mark.usefixtures("definitions")

FOLDER = Path(__file__).parents[1] / "filecheck" / "fragments"
FILES = sorted(FOLDER.glob("*.mxir"))
PASSES, AFTER = "// PASSES: ", "// AFTER\n"


@dataclass(frozen=True)
class Case:
    """One graph, what is run over it, and what is then printed."""

    passes: str
    before: str
    after: str

    def refused(self, name: str) -> bool:
        """Whether a pass left the graph as it is and said why."""
        return self.after.startswith("// error: ") or f"// {name}: 0 matched, " in self.after


def read(path: Path) -> list[Case]:
    first, _, rest = path.read_text().partition("\n")
    assert first.startswith(PASSES), f"{path.name} names no pass"
    cases = []
    for text in rest.split(f"{SEPARATOR}\n"):
        before, after = text.split(AFTER)
        own = before.partition("\n")[0] if before.startswith(PASSES) else first
        cases.append(Case(own.removeprefix(PASSES), before, after))
    return cases


def graph(text: str) -> str:
    """A text without its comments."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("//"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_pass_makes_of_each_graph_what_the_file_says(path: Path) -> None:
    for case in read(path):
        assert opt_fragments(case.before, case.passes) == case.after


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_case_would_pass_without_the_pass(path: Path) -> None:
    """The mutation: the pass is left out. A refusal leaves the graph as it is, and says so."""
    cases = read(path)
    refusals = 0
    for case in cases:
        assert path.stem in re.findall(r"(?:^|,)([a-z0-9-]+)", case.passes)
        untouched = opt_fragments(case.before, without(case.passes, path.stem))
        refused = case.refused(path.stem)
        refusals += refused
        assert untouched != case.after
        assert refused or graph(untouched) != graph(case.after) or ", now #" in case.after
        if refused and not case.after.startswith("// error: "):
            assert graph(untouched) == graph(case.after)
    assert 3 <= len(cases) <= 6 and 1 <= refusals < len(cases) - 1


def without(passes: str, name: str) -> str:
    """A pipeline up to a pass, that pass left out."""
    return re.split(rf"(?:^|,){name}(?:\{{|,|$)", passes)[0]


def test_every_pass_has_a_file() -> None:
    register_passes()
    passes = {name for name, pass_ in all_passes().items() if pass_.__module__.startswith("mxfx.passes.")}
    assert {path.stem for path in FILES} == passes


def weights_of(case: Case) -> tuple[WeightStore, WeightStore]:
    """The weights of a case before and after its passes."""
    program = parse_fragment(case.before)
    return program.weights, PassManager().run(program, read_passes(case.passes), random_ids(program)).program.weights


def rotation(order: int, size: int) -> Tensor:
    """A Hadamard matrix on each block of an axis (Sylvester's construction), float64."""
    blocks = torch.ones(1, 1, dtype=torch.float64)
    while len(blocks) < order:
        blocks = torch.cat([torch.cat([blocks, blocks], 1), torch.cat([blocks, -blocks], 1)])
    return torch.block_diag(*[blocks / order**0.5] * (size // order))


def on_grid(weight: Tensor) -> Tensor:
    """Rounded to nearest in mxint4@32: integers from -8 to 7 times two to the exponent of a block's largest, less 2."""
    blocks = weight.double().unflatten(-1, (-1, 32))
    unit = 2.0 ** (blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)
    return ((blocks / unit).round().clamp(-8, 7) * unit).flatten(-2)


#: File, case, and what its weights must be, as a function of what they were.
FORMULAS: dict[tuple[str, int], dict[str, Callable[[WeightStore], Tensor]]] = {
    ("round-weights", 0): {"w": lambda w: on_grid(w["w"])},
    ("fuse-norm", 0): {"w": lambda w: w["w"].double() * w["g"].double()},
    ("fuse-norm", 1): {n: lambda w, n=n: w[n].double() * w["g"].double() for n in "qk"},
    ("fuse-norm", 3): {
        "q": lambda w: w["q"].double() * (w["g"].double() + 1),
        "c": lambda w: w["c"].double() + w["q"].double() @ w["b"].double(),
        "k": lambda w: w["k"].double() * (w["g"].double() + 1),
        "b_bias": lambda w: w["k"].double() @ w["b"].double(),
    },
    ("center-residual", 0): {
        "e": lambda w: w["e"].double() - w["e"].double().mean(1, keepdim=True),
        "a": lambda w: w["a"].double(),
        "o": lambda w: w["o"].double() - w["o"].double().mean(0, keepdim=True),
        "c": lambda w: w["c"].double() - w["c"].double().mean(),
    },
    ("rotate-value", 1): {
        "v": lambda w: rotation(16, 32).T @ w["v"].double(),
        "b": lambda w: w["b"].double() @ rotation(16, 32),
        "o": lambda w: w["o"].double() @ rotation(16, 64),
    },
    ("rotate-residual", 0): {
        "e": lambda w: w["e"].double() @ rotation(32, 64),
        "a": lambda w: w["a"].double() @ rotation(32, 64),
        "b": lambda w: w["b"].double(),
        "o": lambda w: rotation(32, 64).T @ w["o"].double(),
        "h": lambda w: w["h"].double() @ rotation(32, 64),
    },
    ("transform-embedding", 0): {
        "e": lambda w: w["e"].double() @ rotation(32, 64),
        "h": lambda w: w["h"].double(),
    },
    ("transform-inputs", 0): {n: lambda w, n=n: w[n].double() @ rotation(32, 64) for n in "qk"},
    ("fold-constants", 0): {"folded.o": lambda w: w["g"].double() + 1},
    ("fuse-hadamard-quant", 0): {"hadamard.32": lambda w: rotation(32, 32)},
}


@pytest.mark.parametrize(("name", "number"), FORMULAS, ids=str)
def test_weights_are_what_the_formula_says(name: str, number: int) -> None:
    before, after = weights_of(read(FOLDER / f"{name}.mxir")[number])
    for weight, formula in FORMULAS[name, number].items():
        torch.testing.assert_close(after[weight].double(), formula(before), rtol=1e-6, atol=1e-6)


def test_scales_go_from_one_weight_into_the_other() -> None:
    before, after = weights_of(read(FOLDER / "scale-channels.mxir")[0])
    scale = after["d"].double().norm(dim=0) / before["d"].double().norm(dim=0)
    assert scale.std() > 0.01
    torch.testing.assert_close(after["u"].double(), before["u"].double() / scale[:, None], rtol=1e-5, atol=1e-6)
    # With alpha = 0 the columns that are read are equally large afterwards.
    torch.testing.assert_close(after["d"].norm(dim=0), after["d"].norm(dim=0).mean().expand(96), rtol=1e-5, atol=0)


def test_channels_are_dealt_alike_to_all_that_share_them() -> None:
    before, after = weights_of(read(FOLDER / "permute-channels.mxir")[0])
    order = [int((before["u"] == row).all(1).nonzero()) for row in after["u"]]
    assert sorted(order) == list(range(96)) != order
    assert torch.equal(after["g"], before["g"][order]) and torch.equal(after["d"], before["d"][:, order])


@pytest.mark.parametrize("name", ["fuse-norm", "rotate-residual", "permute-channels"])
def test_another_change_of_the_same_size_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: every weight goes as far in the other direction."""
    case = read(FOLDER / f"{name}.mxir")[0]
    right = WeightStore.set
    monkeypatch.setattr(
        WeightStore,
        "set",
        lambda store, weight, tensor, by, **rest: right(
            store, weight, 2 * store[weight].double() - tensor.double(), by, **rest
        ),
    )
    said = opt_fragments(case.before, case.passes)
    assert re.sub(", now #.*", "", said) == re.sub(", now #.*", "", case.after)
    hashes = [re.findall(", now (#.*)", text) for text in (said, case.after)]
    assert len(hashes[0]) == len(hashes[1]) and not set(hashes[0]) & set(hashes[1])


LINEAR = (
    "weights\n  @w : f32[4, 8]\ngraph\n  %x = input : bf16[batch, 8]\n  %y = aten.linear(%x, @w) : bf16[batch, 4]\n"
)


def test_the_command_reads_parts_of_graphs_from_standard_input() -> None:
    said = CliRunner().invoke(cli.app, ["opt", "-"], input=f"{LINEAR}  return %y\n{SEPARATOR}\n{LINEAR}  return %y\n")
    assert said.exit_code == 0 and said.stdout.count("graph\n") == 2 and SEPARATOR in said.stdout


def test_weights_follow_from_seed_and_name() -> None:
    first, second, other = (parse_fragment(f"{LINEAR}  return %y\n", seed).weights.hash("w") for seed in (0, 0, 1))
    assert first == second != other


def test_an_error_has_its_line_in_the_whole_text_its_column_and_a_caret() -> None:
    text = f"{LINEAR}  return %y\n{SEPARATOR}\ngraph\n  %x = input : bf16[batch, 8]\n  return %z\n"
    with pytest.raises(TextError) as raised:
        opt_fragments(text, "")
    assert str(raised.value) == "line 10, column 12: %z is read before it is defined\n    return %z\n             ^"
