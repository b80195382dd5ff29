"""Reading pipelines and refusing what is wrong imports little: seconds that everybody would wait for."""

from __future__ import annotations

import os
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


def test_config_show_imports_nothing_but_torch() -> None:
    assert imported("config", "show", CONFIG_A) == ["0", "torch"]


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
