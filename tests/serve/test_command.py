"""The command, in a process of its own, on a bundle whose graph ONNX Runtime runs."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mara_deploy.commands import serve
from mara_deploy.serve import http
from mara_deploy.serve.app import Server
from mara_deploy.serve.settings import ServeSettings
from mara_deploy.serve.worker import Worker
from mara_runtime import AlignedDecoder, DecodeConfig
from tests.serve.servers import reciting_decoder, same, user
from tests.unit import helpers, written_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{i}" for i in range(written_model.SHAPE.vocab_size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return written_model.write_bundle(
        tmp_path_factory.mktemp("served") / "small", always_head=False, tokenizer=tokenizer, chat_template=template
    )


@pytest.fixture
def process(folder):
    argv = [sys.executable, "-m", "mara_deploy.commands.serve", str(folder), "--port", "0", "--threads", "1"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "export"), str(ROOT / "runtime")])
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as process:
        yield process
        process.kill()


def url_of(process):
    """Where it listens; what it said before."""
    said = []
    for line in process.stderr:
        said.append(line.strip())
        if "listening at " in line:
            return line.split()[-1], said
    pytest.fail("\n".join(said))


def test_serves_what_the_decoder_answers_and_ends_with_its_last_answer(folder, process):
    url, said = url_of(process)
    assert f"mara-serve: opening {folder} …" in said
    assert "mara-serve: model small:other" in said
    decoder = AlignedDecoder(folder, threads=1)
    configs = [
        DecodeConfig(max_new_tokens=20),
        DecodeConfig(max_new_tokens=12, agents={"other": 1.0}, threshold=1.0, fallback="last"),
        DecodeConfig(max_new_tokens=30, agents={"agent": 1.0, "other": -0.5}, strategy="max_prob"),
        DecodeConfig(max_new_tokens=9, align=False),
    ] * 3

    def ask(i, config):
        knobs = {} if config.align else {"align": False}
        if config.agents:
            knobs |= {"agents": dict(config.agents), "threshold": config.threshold, "strategy": config.strategy}
        knobs |= {"fallback": config.fallback} if config.fallback else {}
        body = {"model": "small", "messages": user(prompts[i]), "max_tokens": config.max_new_tokens, "mara": knobs}
        return httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()

    prompts = [" ".join(WORDS[1 + (7 * i + j) % 22] for j in range(2 + i)) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(12), configs))
    for prompt, config, answer in zip(prompts, configs, found, strict=True):
        choice = answer["choices"][0]
        same(decoder.generate(user(prompt), config), choice["message"]["content"], choice["finish_reason"])
    process.send_signal(signal.SIGTERM)
    left = process.stderr.read().splitlines()
    assert process.wait(20) == 0
    assert left[-1] == "mara-serve: ended"
    assert [json.loads(line)["status"] for line in left[:-1]] == [200] * 12


TURNED_DOWN = [
    (b"{", 400),
    (b"[" * 100_000, 400),
    (b'{"model": 1, "messages": []}', 400),
    (b'{"model": "small", "messages": "hello"}', 400),
    (b'{"model": "big", "messages": []}', 404),
    (b'{"model": "small", "messages": [{"role": "user", "content": "w1"}], "mara": {"agents": "nobody"}}', 400),
    (b" " * (10 << 20), 413),
]
GOOD = {"model": "small", "messages": user("w1 w2"), "max_tokens": 4}


def a_bad_time(url, pid):
    """Requests of every bad kind. Returns how many of them are HTTP, and the server's memory after them (MiB)."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(500)]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
    for each in sockets[:100]:
        each.sendall(head + b"Content-Le")  # writes its headers slowly
    body = json.dumps({**GOOD, "max_tokens": 50, "stream": True}).encode()
    whole = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    for each in sockets[100:110]:
        each.sendall(head + whole + body[:9])  # its body
    for each in sockets[110:114]:
        each.sendall(head + whole + body)  # reads nothing
    with httpx.Client(base_url=url, timeout=30, headers={"Content-Type": "application/json"}) as client:
        for content, status in TURNED_DOWN:
            found = client.post("/chat/completions", content=content)
            assert (found.status_code, found.json()["error"]["type"]) == (status, "invalid_request_error")
        assert client.post("/chat/completions", json=GOOD).status_code == 200
    for flood in sockets[400:410]:
        with contextlib.suppress(OSError):  # it is cut off
            flood.sendall(head + b"".join(b"X-%d: %d\r\n" % (i, i) for i in range(20_000)))
    for each in sockets:
        each.close()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return 10 + 4 + len(TURNED_DOWN) + 1, pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_after_bad_requests_of_every_kind_it_is_as_before(process):
    url, _ = url_of(process)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    rounds = [a_bad_time(url, process.pid) for _ in range(8)]
    page = httpx.get(f"{url.removesuffix('/v1')}/metrics").text
    assert 'mara_places_in_use{bundle="small"} 0.0' in page
    assert 'mara_queue{bundle="small"} 0.0' in page
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    reader.join()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(logged) == sum(count for count, _ in rounds)
    assert {line["status"] for line in logged} == {200, 400, 404, 413, 499}
    # The first rounds are a warm-up. Bodies of 4 MiB each that were kept since would be 24; the allocator may hold two.
    assert rounds[-1][1] < rounds[1][1] + 15


def test_the_first_signal_drains_and_the_second_ends(tmp_path):
    decoder = reciting_decoder(tmp_path)
    server = Server([Worker("tiny", decoder, ServeSettings(), print)], ServeSettings(), print)
    uvicorn = http.Uvicorn(http.uvicorn.Config(server.app()), server)
    for ends in (False, True):
        uvicorn.handle_exit(signal.SIGTERM, None)
        assert (server.draining, uvicorn.should_exit) == (True, ends)


def test_a_port_in_use_and_two_bundles_of_one_name_are_refused(folder, tmp_path, capsys):
    with serve._bound("127.0.0.1", 0) as taken:
        taken.listen()
        assert serve.main([str(folder), "--port", str(taken.getsockname()[1])]) == 2
    shutil.copytree(folder, tmp_path / folder.name)
    assert serve.main([str(folder), str(tmp_path / folder.name), "--port", "0"]) == 2
    assert serve.main([str(helpers.make_bundle(tmp_path / "mute")), "--port", "0", "--engine", "cpu"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    for line, named in zip(errors, ("cannot listen", f"two bundles have the name {folder.name}", "mute"), strict=True):
        assert named in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--host", "no.such.host.invalid"], "--host is 'no.such.host.invalid'"),
        (["--port", "0"], "no bundle"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_one_line(tmp_path, capsys, arguments, named):
    assert serve.main([str(tmp_path / "nothing"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert named in lines[-1], lines
    assert lines[-1].startswith("mara-serve: error: ")
