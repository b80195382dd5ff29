"""The wheel, beside nothing but what it depends on: it carries its data, and runs where no package of ours is."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.local_model import save_model, save_texts

_ROOT = Path(__file__).parent.parent
_PIPELINE = """
[model]
name = "MODEL"
dtype = "float32"
[[pass]]
name = "annotate"
  [[pass.rule]]
  match  = '.*_proj'
  weight = "mxint4@32"
  input  = "mxint4@32"
[[pass]]
name = "round-weights"
[[pass]]
name = "insert-fake-quant"
"""
#: Packages that are installed where tests run and that no user needs to have.
_STRANGERS = ("gguf", "compressed_tensors", "matplotlib", "hypothesis", "pytest", "torchao", "fastapi", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(_ROOT / "mxfx", source / "mxfx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(_ROOT / "tests" / "plugin_example", source / "tests" / "plugin_example")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    said = subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages as a bare environment has them: the wheel, and links to what it depends on at run time."""
    site = tmp_path_factory.mktemp("bare")
    for found in _needed():
        for file in found.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not top.endswith(".pth") and not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def _needed(*extras: str) -> Iterator[metadata.Distribution]:
    """Every distribution that pyproject.toml's dependencies and some of its extras bring on this machine."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    waiting = [*map(Requirement, (*project["dependencies"], *(line for name in extras for line in optional[name])))]
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            name = canonicalize_name(wanted.name)
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found = metadata.distribution(name)
            if extra == "":
                yield found
            brought = [Requirement(line) for line in found.requires or ()]
            waiting += [one for one in brought if one.marker is None or one.marker.evaluate({"extra": extra})]


def _python(bare: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without the packages of the environment that runs the tests: ``-S`` leaves only the standard library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    given = kept | {"PYTHONPATH": str(bare), "MXFX_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-S", *arguments], cwd=folder, env=given, capture_output=True, text=True, timeout=300
    )


def test_the_wheel_carries_its_templates_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.parts[0] for name in names} == {"mxfx"}
    here = {path.relative_to(_ROOT) for path in (_ROOT / "mxfx").rglob("*") if path.is_file()}
    assert names == {path for path in here if "__pycache__" not in path.parts}


def test_the_bare_environment_has_nothing_else(bare: Path, tmp_path: Path) -> None:
    script = (
        f"import importlib.util as u; print([n for n in {_STRANGERS!r} if u.find_spec(n)], u.find_spec('mxfx').origin)"
    )
    assert _python(bare, tmp_path, "-c", script).stdout.split() == ["[]", str(bare / "mxfx" / "__init__.py")]


@pytest.fixture(scope="module")
def ran(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a tiny model was run, evaluated and saved by the bare environment."""
    folder = tmp_path_factory.mktemp("ran")
    model, texts = save_model(folder / "llama"), save_texts(folder / "texts")
    (folder / "w4a4.toml").write_text(_PIPELINE.replace("MODEL", str(model)))
    evaluated = ("--eval", "wikitext", "--eval-data", str(texts), "--out", "out")
    said = _python(bare, folder, "-m", "mxfx", "run", "w4a4.toml", *evaluated)
    assert said.returncode == 0, said.stderr
    return folder


def test_it_runs_a_local_model_and_reports(ran: Path) -> None:
    assert "<h3>Coverage</h3>" in (ran / "out" / "report.html").read_text()


def test_it_generates(bare: Path, ran: Path) -> None:
    said = _python(bare, ran, "-m", "mxfx", "generate", "out", "--prompt", "w1 w2", "--greedy", "--max-new-tokens", "4")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("w")


@pytest.mark.parametrize(
    ("command", "extra"),
    [(("export", "out", "--to", "gguf", "--out", "x"), "mxfx[export]"), (("serve", "out"), "mxfx[serve]")],
)
def test_what_needs_more_names_the_extra_that_brings_it(
    bare: Path, ran: Path, command: tuple[str, ...], extra: str
) -> None:
    said = _python(bare, ran, "-m", "mxfx", *command)
    assert said.returncode != 0 and "Traceback" not in said.stderr
    assert f"pip install '{extra}'" in " ".join((said.stdout + said.stderr).split())


#: What only `mxfx serve` imports.
_SERVER = ("protocol.py", "serve.py")


def test_every_import_belongs_to_a_dependency() -> None:
    """Exports and the server may import what their extra brings; kernels ask for Triton before they import it."""
    given, exported, served = (
        {file.parts[0].removesuffix(".py") for found in _needed(*extras) for file in found.files or ()} | {"triton"}
        for extras in ((), ("export",), ("serve",))
    )
    for path in (_ROOT / "mxfx").rglob("*.py"):
        allowed = exported if path.parent.name == "export" else served if path.name in _SERVER else given
        strange = _imported(path) - allowed - sys.stdlib_module_names - {"mxfx"}
        assert not strange, f"{path.relative_to(_ROOT)} imports {strange}"


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names
