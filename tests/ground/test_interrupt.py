"""Ctrl-C and SIGTERM end a command at once, wherever it is, with one line, its code and no half-written file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Run
from tests.local_model import save_model, save_texts

_ENDED = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated (SIGTERM)")}

#: Commands whose model takes long to load, each in a process of its own that finds everything imported: where it
#: waits, which signal, its model and its folder come in. It says that it is there, and gets the signal.
_LOADING = """
import hashlib, json, os, signal, sys, threading, time
import transformers
import mxfx.api
from mxfx import cli
from mxfx.ground import files

# Who runs tests in a shell's background ignores SIGINT, and so would this.
signal.signal(signal.SIGINT, signal.default_int_handler)

def told():
    print(time.time(), flush=True)
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()

def in_c():
    told()
    hashlib.pbkdf2_hmac("sha512", b"", b"", 1 << 26)

def swallowed():
    told()
    try:
        time.sleep(30)
    except BaseException:
        pass
    time.sleep(30)

def in_del():
    class Deleted:
        def __del__(self):
            told()
            time.sleep(30)
    Deleted()
    time.sleep(30)

def wrapped():
    told()
    try:
        time.sleep(30)
    except BaseException as error:
        raise RuntimeError("no model") from error

def in_a_thread():
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool:
        told()
        pool.submit(time.sleep, 30).result()

def written():
    def pieces():
        yield b"half"
        in_c()
    files.write_file(files.Path(out) / "file", pieces())

def load(*args, **options):
    globals()[where]()

transformers.AutoTokenizer.from_pretrained = load
print("ready", flush=True)
while line := sys.stdin.readline():
    where, number, model, out = json.loads(line)
    child = os.fork()
    if not child:
        for name, stream in (("said", 1), ("errors", 2)):
            os.dup2(os.open(out + "-" + name, os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["mxfx", "generate", model, "--prompt", out]
        cli.main()
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def loading() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _LOADING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.mark.parametrize(
    ("where", "number"),
    [
        *((where, signal.SIGINT) for where in ("in_c", "swallowed", "in_del", "wrapped", "in_a_thread", "written")),
        # Elsewhere the path is the same.
        *((where, signal.SIGTERM) for where in ("in_c", "wrapped")),
    ],
)
def test_a_signal_ends_what_loads_a_model(
    where: str, number: signal.Signals, loading: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert loading.stdin is not None and loading.stdout is not None
    model, out = save_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    loading.stdin.write(json.dumps([where, number, str(model), str(out)]) + "\n")
    loading.stdin.flush()
    code = int(loading.stdout.readline())
    said, errors = ((tmp_path / f"out-{name}").read_text() for name in ("said", "errors"))
    assert (code, errors.splitlines()[-1]) == _ENDED[number], errors
    assert not any(word in errors for word in ("Traceback", "ignored", "error:"))
    # Whoever was not woken sleeps for 30 seconds.
    assert time.time() - float(said) < 20
    assert list(out.iterdir()) == []


def _heard() -> None:
    """What a shell's background ignores is heard."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("number", _ENDED)
def test_a_signal_ends_a_run_whose_folder_the_next_run_takes(number: signal.Signals, mxfx: Run, tmp_path: Path) -> None:
    source, texts, out = save_model(tmp_path / "source"), save_texts(tmp_path / "texts"), tmp_path / "out"
    file = tmp_path / "long.toml"
    file.write_text(
        "[calibration]\nsamples = 2\nlength = 32\n[[pass]]\nname = 'annotate'\npartial = true\n"
        "[[pass.rule]]\nmatch = '.*_proj'\nweight = 'mxint4@32'\ninput = 'mxint4@32'\n"
        "[[pass]]\nname = 'insert-fake-quant'\n[[pass]]\nname = 'distill'\nsteps = 100000\ncheckpoint_every = 1000\n"
    )
    given = ("run", file, "--model", source, "--data", texts, "--out", out)
    command = [sys.executable, "-m", "mxfx", *given]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=_heard)
    assert run.stderr is not None
    said = ""
    while "100000 steps" not in said:
        line = run.stderr.readline()
        assert line, said
        said += line
    time.sleep(1)
    sent = time.monotonic()
    run.send_signal(number)
    try:
        _, rest = run.communicate(timeout=60)
    finally:
        run.kill()
    assert time.monotonic() - sent < 6
    assert (run.returncode, rest.strip().splitlines()[-1]) == _ENDED[number]
    assert "Traceback" not in rest
    assert not list(out.rglob("*.part"))
    assert mxfx(*given, "--set", "pass.distill.steps=2").code == 0
