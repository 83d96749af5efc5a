"""The command, in a process of its own, on a bundle whose graph ONNX Runtime runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
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
