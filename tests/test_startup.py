"""Reading pipelines and refusing what is wrong imports little: seconds that everybody would wait for."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG_A = Path(__file__).parents[1] / "passes_configs" / "tutorial_a_rtn.toml"
_RUN = """
import sys
from mxfx.cli import main
sys.argv = ["mxfx", *sys.argv[1:]]
try:
    main()
except SystemExit as error:
    code = error.code or 0
heavy = ["torch", "torch._dynamo", "sympy", "networkx", "transformers", "lm_eval", "datasets", "triton"]
print(code, *(name for name in heavy if name in sys.modules), file=sys.stderr)
"""


def imported(*args: object) -> list[str]:
    """Exit code of ``mxfx …`` and the slow packages that it imported."""
    done = subprocess.run([sys.executable, "-c", _RUN, *map(str, args)], capture_output=True, text=True, check=False)
    return done.stderr.splitlines()[-1].split()


@pytest.mark.parametrize(
    "args",
    [
        ("config", "show", CONFIG_A),
        ("config", "show", CONFIG_A, "--device", "cuda", "--set", "pass.annotate.rule[0].weight=mxint8@32"),
        ("config", "schema"),
        ("passes",),
        ("passes", "gptq"),
    ],
    ids=["show", "show for CUDA", "schema", "passes", "one pass"],
)
def test_options_and_contracts_of_passes_are_read_without_torch(args: tuple[object, ...]) -> None:
    assert imported(*args) == ["0"]


@pytest.mark.parametrize("pass_", ['name = "gptq"\ndamp = "much"', 'name = "gptq"', 'name = "gpt"'])
def test_a_pipeline_is_refused_without_torch(pass_: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(f"[[pass]]\n{pass_}\n")
    code, *slow = imported("run", file, "--model", "some/model")
    assert code == "2" and "torch" not in slow


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", __file__])
def test_a_model_that_is_no_folder_is_refused_without_torch(name: str) -> None:
    code, *slow = imported("generate", name, "--prompt", "x")
    assert code == "2" and "torch" not in slow


def test_config_show_takes_less_than_a_second_and_a_half_of_processor_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert imported("config", "show", CONFIG_A)[0] == "0"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_what_was_put_off_is_all_there_once_torch_is_needed() -> None:
    """No stand-in may be left anywhere: one in a table or a default would be taken for the thing itself."""
    code = """
import gc
from mxfx.cli.start import LATE
LATE.install()
from mxfx.config.pipeline import register_passes
register_passes()
from mxfx.ground.late import Later
count = lambda: sum(type(one) is Later for one in gc.get_objects())
before = count()
import mxfx.graph.trace
gc.collect()
print(before > 100, count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0"]


def test_a_pass_runs_with_imports_that_came_late() -> None:
    passes = "raise-norm,raise-rope,raise-attention,fuse-norm,lower"
    command = [sys.executable, "-m", "mxfx", "opt", "llama-tiny", "--verify-each", "--passes", passes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "facts attention-raised, lowered, norms-fused" in done.stdout and "mxfx.rms_norm" not in done.stdout


@pytest.mark.parametrize(
    "args",
    [
        ("run", "nowhere.toml"),
        ("run", CONFIG_A, "--device", "mps"),
        ("run", CONFIG_A, CONFIG_A),
        ("config", "show", __file__),
    ],
    ids=["no file", "device", "two of one name", "no TOML"],
)
def test_a_refusal_that_needs_no_pass_does_not_import_torch(args: tuple[object, ...]) -> None:
    assert imported(*args) == ["2"]


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "mxfx", "run", "nowhere.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "nowhere.toml" in done.stderr


def test_the_version_is_said_without_torch() -> None:
    assert imported("--version") == ["0"]


def test_a_shell_completes_commands_of_the_module_too() -> None:
    environment = {**os.environ, "_MXFX_COMPLETE": "complete_bash", "COMP_WORDS": "mxfx conf", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "mxfx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout.split(), done.stderr) == (["config"], "")
