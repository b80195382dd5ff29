"""Passes from other packages: installed for real, refused on a clash, held to their promise like any other."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from mxfx import api, cli
from mxfx.config import RAISE_PASSES
from mxfx.passes.fuse_norm import FuseNorm
from mxfx.pipeline.instruments import NumericsError
from mxfx.rewrite import Context, Rewriter, load_plugins
from mxfx.rewrite.pass_ import _REGISTRY, ENTRY_POINT_GROUP

EXAMPLE = Path(__file__).parents[1] / "plugin_example"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class FuseNormTwice(FuseNorm):
    """Wrong on purpose: the gain goes into the linears twice, and no shape shows it."""

    name: ClassVar[str] = "fuse-norm-twice"

    def run(self, rw: Rewriter, ctx: Context) -> None:
        gains = {n: rw.weights.master(rw.program.weight_of(n)) for n in rw.program.nodes("rms_norm")}
        super().run(rw, ctx)
        for norm, gain in gains.items():
            for linear in norm.users:
                name = rw.program.weight_of(linear)
                rw.set_weight(name, rw.weights.master(name) * gain)


@dataclass(frozen=True)
class OtherFuseNorm(FuseNorm):
    """A second pass under a name that is taken."""


class Entry:
    """An entry point as ``importlib.metadata`` gives it."""

    group = ENTRY_POINT_GROUP

    def __init__(self, found: type) -> None:
        self.name, self.value, self.found = found.__name__, f"plug_in:{found.__name__}", found

    def load(self) -> type:
        return self.found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Entry]]:
    """What is put into this list counts as installed; afterwards it was never there."""
    known, entries = dict(_REGISTRY), []
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: list(entries) if group == ENTRY_POINT_GROUP else []
    )
    yield entries
    _REGISTRY.clear()
    _REGISTRY.update(known)


def test_an_installed_package_adds_its_pass(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(EXAMPLE, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True, text=True)
    opt = "from mxfx.cli import main; main()"
    passes = ["opt", "llama-tiny", "--passes", "fold-scale", "--print-ir-after-change", "--verify-each"]
    said = subprocess.run(
        [sys.executable, "-c", opt, *passes, "--check-numerics"],
        env={**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    assert "pass 1 'fold-scale' (--passes:1:1): 2 matched" in said.stdout
    assert said.stdout.count("- %mul_") == 2 and "aten.mul.Tensor(%sin, 1.0)" in said.stdout


def test_a_name_that_is_taken_is_an_error_that_names_both(installed: list[Entry]) -> None:
    installed.append(Entry(OtherFuseNorm))
    with pytest.raises(ValueError, match=r"'fuse-norm' is taken by mxfx.passes.fuse_norm.FuseNorm; rename .*OtherFuse"):
        load_plugins()


def test_an_entry_point_that_is_no_pass_is_an_error(installed: list[Entry]) -> None:
    installed.append(Entry(dict))
    with pytest.raises(TypeError, match=r"entry point dict = plug_in:dict of group mxfx.passes is no Pass class"):
        load_plugins()


def test_a_gain_folded_twice_is_stopped_by_its_promise(installed: list[Entry]) -> None:
    installed.append(Entry(FuseNormTwice))
    with pytest.raises(NumericsError, match=r"pass 2 'fuse-norm-twice' .*float64 twin.*first difference: linear = "):
        api.optimize("llama-tiny", "raise-norm,fuse-norm-twice", check_numerics=True)
    said = CliRunner().invoke(cli.app, ["opt", "llama-tiny", "--passes", "raise-norm,fuse-norm-twice"])
    assert said.exit_code == 0, "without the check nothing shows it"


def test_bisect_finds_the_pass_that_folds_twice(installed: list[Entry], tmp_path: Path) -> None:
    from tests.local_model import save_model

    installed.append(Entry(FuseNormTwice))
    file = tmp_path / "p.toml"
    file.write_text(
        f'[model]\nname = "{save_model(tmp_path / "llama")}"\ndtype = "float32"\n'
        '[[pass]]\nname = "fuse-norm-twice"\n[[pass]]\nname = "rotate-residual"\n'
    )
    culprit = api.find_culprit(file, api.RunOptions(), max_kl=1e-4)
    assert culprit.pass_.name == "fuse-norm-twice"
    assert (
        culprit.commands[1].startswith("mxfx opt ") and f"--stop-after {len(RAISE_PASSES) + 1}" in culprit.commands[1]
    )
