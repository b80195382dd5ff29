"""One of two processes is killed at any of their meetings: the other says so and ends, and the next start goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SWEEP = """
import contextlib, os, shutil, signal, socket, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mxfx.api import trace
from mxfx.config import Pipeline
from mxfx.formats import parse
from mxfx.graph.tiny import tiny
from mxfx.ground import ranks
from mxfx.passes import Annotate, Rule
from mxfx.passes.gptq import Gptq
from mxfx.pipeline.manager import PassManager
from mxfx.rewrite import Context, Selector, apply

folder, points = Path(sys.argv[1]), int(sys.argv[2])
tokens = torch.randint(3, 128, (4, 8), generator=torch.Generator().manual_seed(3))
rule = Rule(Selector(".*_proj"), weight=parse("mxint4@32"))
program = trace(tiny("llama-tiny", layers=2), proven=False)
program = PassManager().run(program, Pipeline([Annotate((rule,))]).completed()).program

def work(rank, victim, kill_at):
    met, together = [0], ranks._together
    @contextlib.contextmanager
    def counted():
        met[0] += 1
        if rank == victim and met[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with together():
            yield
    ranks._together = counted
    ranks.start()
    try:
        found = apply(Gptq(checkpoint_dir=folder / "cache", batch_size=2), program, Context(tokens=lambda: tokens))
    except ranks.RankError as error:
        (folder / f"said-{rank}").write_text(str(error))
        return ranks.RankError.exit_code
    weights = found.program.weights
    about = [weights.hash(name) for name in sorted(weights)]
    (folder / f"made-{rank}").write_text("\\n".join(about))
    (folder / f"met-{rank}").write_text(f"{met[0]} {found.record.details['resumed_layers']}")
    return 0

def run(victim=None, kill_at=0):
    '''Two processes; how each of them ended.'''
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in (0, 1):
        child = os.fork()
        if not child:
            signal.alarm(120)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 99
            try:
                code = work(rank, victim, kill_at)
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

def made():
    first, second = ((folder / f"made-{rank}").read_text() for rank in (0, 1))
    assert first == second, "ranks differ"
    return first

assert run() == [0, 0]
whole, meetings = made(), int((folder / "met-0").read_text().split()[0])
step = max(1, meetings // points)
most = 0
for victim in (0, 1):
    for kill_at in range(step, meetings + 1, step):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        codes = run(victim, kill_at)
        assert codes[victim] == -signal.SIGKILL, f"{victim} at {kill_at}: {codes}"
        assert codes[1 - victim] == ranks.RankError.exit_code, f"{victim} at {kill_at}: the other ended with {codes}"
        assert "another process of this run ended" in (folder / f"said-{1 - victim}").read_text()
        assert run() == [0, 0] and made() == whole, f"{victim} killed at {kill_at}: other weights"
        most = max(most, int((folder / "met-0").read_text().split()[1]))
print(meetings, most)
"""


@pytest.mark.parametrize("points", [3, pytest.param(1000, marks=pytest.mark.thorough)])
def test_a_process_killed_at_any_meeting_ends_both_and_the_next_start_goes_on(tmp_path: Path, points: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SWEEP, str(tmp_path), str(points)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    meetings, resumed = map(int, done.stdout.split())
    assert meetings > 20, "one a sum, one a stack of rounded rows"
    assert resumed == 1, "the first of two layers was there when a late kill came"
