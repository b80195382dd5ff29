"""`mxfx serve` under 16 streaming clients: no error, no output of another's prompt, memory that stays."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from openai import APIConnectionError, APIStatusError, OpenAI

from mxfx.config import loads
from mxfx.driver.pretrained import load_model, load_tokenizer
from mxfx.export.folder import save_folder
from mxfx.graph.trace import trace
from mxfx.pipeline.manager import PassManager
from tests.local_model import save_model

CLIENTS = 16
_TOKENS = 12
_PIPELINE = """
[[pass]]
name = "annotate"
  [[pass.rule]]
  match = '.*_proj'
  weight = "mxint4@32/mse"
  input = "mxint4@32/mse"
  [[pass.rule]]
  match = '.*self_attn'
  kv = "mxint4@16/mse"
[[pass]]
name = "round-weights"
[[pass]]
name = "insert-fake-quant"
[[pass]]
name = "quantize-kv-cache"
"""


@dataclass
class Server:
    """The process that serves, and where."""

    process: subprocess.Popen
    url: str
    model: str

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    @property
    def resident_mb(self) -> float:
        """Memory that the process holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stream(self, client: OpenAI, prompt: str) -> str:
        chunks = client.completions.create(model=self.model, prompt=prompt, max_tokens=_TOKENS, stream=True)
        return "".join(choice.text for chunk in chunks for choice in chunk.choices)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    source = save_model(tmp_path_factory.mktemp("source") / "m")
    program = PassManager().run(trace(load_model(source), name=str(source)), loads(_PIPELINE).completed()).program
    folder = tmp_path_factory.mktemp("emitted") / "model"
    save_folder(program, folder, tokenizer=load_tokenizer(source))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("log") / "log").open("w+")
    command = [sys.executable, "-m", "mxfx", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        running = Server(process, url, str(folder))
        for _ in range(240):
            assert process.poll() is None, Path(log.name).read_text()[-2000:]
            try:
                running.client().models.list()
                break
            except APIConnectionError:
                time.sleep(0.5)
        yield running
    finally:
        process.terminate()
        process.wait(timeout=30)


@dataclass
class Load:
    """What clients that stream at once for a while came back with."""

    answers: int = 0
    mixed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def stream_for(server: Server, expected: dict[str, str], seconds: float, at_least: int) -> Load:
    """`CLIENTS` clients, each with prompts in an order of its own, until the time is over."""
    load, lock, end = Load(), threading.Lock(), time.monotonic() + seconds
    prompts = list(expected)

    def work(index: int) -> None:
        client = server.client()
        done = 0
        while done < at_least or time.monotonic() < end:
            prompt = prompts[(index + done) % len(prompts)]
            try:
                answer = server.stream(client, prompt)
            except Exception as error:
                with lock:
                    load.errors.append(f"{type(error).__name__}: {error}")
                return
            with lock:
                load.answers += 1
                if answer != expected[prompt]:
                    load.mixed.append(f"{prompt!r}: {answer!r}, expected {expected[prompt]!r}")
            done += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=seconds + 300)
    assert not any(thread.is_alive() for thread in threads)
    return load


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[str, str]:
    """What each prompt is answered with when nobody else asks."""
    client = server.client()
    found = {f"w{i} w{i + 7} w{2 * i}": server.stream(client, f"w{i} w{i + 7} w{2 * i}") for i in range(4, 4 + CLIENTS)}
    assert len(set(found.values())) > CLIENTS // 2
    return found


def test_sixteen_streams_at_once_are_sixteen_answers(server: Server, expected: dict[str, str]) -> None:
    load = stream_for(server, expected, seconds=0, at_least=2)
    assert (load.errors, load.mixed, load.answers) == ([], [], 2 * CLIENTS)


@pytest.mark.thorough
def test_a_minute_of_sixteen_streams_takes_no_more_memory(server: Server, expected: dict[str, str]) -> None:
    stream_for(server, expected, seconds=10, at_least=1)
    before = server.resident_mb
    load = stream_for(server, expected, seconds=60, at_least=1)
    after = server.resident_mb
    print(f"{load.answers} answers, {before:.0f} MB before, {after:.0f} MB after")
    assert (load.errors, load.mixed) == ([], []) and load.answers > 2 * CLIENTS
    assert after < 1.03 * before + 10


def test_the_model_that_is_served_is_listed(server: Server) -> None:
    assert [model.id for model in server.client().models.list()] == [server.model]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "w1", "no_such_option": 1},
        {"prompt": "w1", "max_tokens": "many"},
        {"prompt": "w1", "stream": "perhaps"},
        {"prompt": "w1", "max_tokens": -8},
        {"prompt": ""},
        {"prompt": "w5 " * 300},
    ],
)
def test_a_bad_request_is_an_error_of_the_protocol(server: Server, body: dict) -> None:
    with pytest.raises(APIStatusError) as caught:
        server.client().post("/completions", body={"model": server.model, **body}, cast_to=object)
    assert 400 <= caught.value.status_code < 500
    assert caught.value.body
    assert server.stream(server.client(), "w5 w6")


def test_what_a_chat_needs_is_said_where_the_tokenizer_lacks_it(server: Server) -> None:
    with pytest.raises(APIStatusError, match="chat_template is not set") as caught:
        server.client().chat.completions.create(model=server.model, messages=[{"role": "user", "content": "w1"}])
    assert caught.value.status_code == 400


@pytest.mark.parametrize("asked", [10_000, None])
def test_an_answer_ends_where_the_model_s_context_does(server: Server, asked: int | None) -> None:
    """256 positions: transformers' server goes on behind them, where no position was ever trained."""
    options = {} if asked is None else {"max_tokens": asked}
    for i in range(5, 12):
        found = server.client().completions.create(model=server.model, prompt=f"w{i} " * 250, **options)
        assert found.usage is not None and found.usage.total_tokens <= 256
        if found.choices[0].finish_reason == "length":
            assert found.usage.total_tokens == 256
            return
    raise AssertionError("every answer ended before the context was full")
