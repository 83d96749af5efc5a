"""Clients that others wrote, unchanged: answers, streams, errors, and going away in the middle."""

import asyncio
import json
import shutil
import subprocess
import time
from pathlib import Path

import openai
import pytest

from mara_deploy.serve.keys import Keys
from mara_runtime import DecodeConfig
from tests.serve.servers import reciting_decoder, serving, table_decoder, texts, user

NODE = Path(__file__).parent / "clients"
CHAT = {"model": "tiny", "messages": user("hello"), "max_tokens": 16}
ENDLESS = {**CHAT, "model": "slow", "max_tokens": 150, "stream": True}
"""takes three seconds"""
ERRORS = {
    "value": ("BadRequestError", 400, "invalid_value", "top_p"),
    "model": ("NotFoundError", 404, "model_not_found", "model"),
    "key": ("AuthenticationError", 401, "invalid_api_key", None),
    "busy": ("RateLimitError", 429, "queue_full", None),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """With a key, one place per bundle and no queue."""
    folder = tmp_path_factory.mktemp("bundles")
    decoders = {"tiny": table_decoder(folder / "tiny"), "slow": reciting_decoder(folder / "slow", pass_s=0.02)}
    with serving(decoders, keys=Keys(["secret"]), conversations=1, queue=0) as running:
        yield running


@pytest.fixture
def served(running):
    """Whoever was there before has left."""
    yield running
    left = time.monotonic()
    running.until(lambda: running.metric("mara_places_in_use") == 0)
    assert time.monotonic() - left < 2
    assert running.defects == []


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    decoder = table_decoder(tmp_path_factory.mktemp("alone") / "tiny")
    return decoder.generate(user("hello"), DecodeConfig(max_new_tokens=16)).text


def failure(work):
    with pytest.raises(openai.APIStatusError) as caught:
        work()
    error = caught.value
    return type(error).__name__, error.status_code, error.code, error.param


def test_openai_in_python(served, expected):
    with served.openai(api_key="secret") as client, served.openai(api_key="wrong") as other:
        create = client.chat.completions.create
        assert create(**CHAT).choices[0].message.content == expected
        found = {
            "value": failure(lambda: create(**CHAT, top_p=2)),
            "model": failure(lambda: create(**{**CHAT, "model": "none"})),
            "key": failure(other.models.list),
        }
        with create(**ENDLESS) as chunks:
            next(iter(chunks))
            found["busy"] = failure(lambda: create(**{**CHAT, "model": "slow"}))
    assert found == ERRORS


def test_openai_in_python_asynchronously(served, expected):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="secret", max_retries=0) as client:
            chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT, stream=True)]
            endless = asyncio.create_task(client.chat.completions.create(**{**ENDLESS, "stream": False}))
            await asyncio.sleep(0.2)
            assert served.metric("mara_places_in_use") == 1
            endless.cancel()
            await asyncio.gather(endless, return_exceptions=True)
            return texts(chunks)

    assert asyncio.run(ask()) == expected


def test_openai_in_node(served, expected, tmp_path):
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    folder = shutil.copytree(NODE, tmp_path / "node")
    try:
        install = ["npm", "ci", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=10000"]
        subprocess.run(install, cwd=folder, check=True, capture_output=True, text=True, timeout=60)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot fetch the client: {error.stderr!r}"[:300])
    command = ["node", "openai.mjs", f"{served.url}/v1", "secret"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == ["tiny", "tiny:agent", "tiny:other", "slow", "slow:agent", "slow:other"]
    for way in ("chat", "chat_stream", "response", "response_stream"):
        assert found[way] == expected, way
    assert found["mara"]["agents"] == {"other": 1.0}
    assert {name: tuple(error) for name, error in found["errors"].items()} == ERRORS


def curl(served, *arguments, key="secret", path="/v1/chat/completions", body=CHAT, stdout=subprocess.PIPE):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    headers = ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
    data = [] if body is None else ["-d", json.dumps(body)]
    return subprocess.Popen(["curl", "-sSN", f"{served.url}{path}", *headers, *data, *arguments], stdout=stdout)


def said(process):
    out, _ = process.communicate(timeout=30)
    return out.decode()


def test_curl(served, expected, tmp_path):
    assert json.loads(said(curl(served)))["choices"][0]["message"]["content"] == expected
    *events, last = said(curl(served, body={**CHAT, "stream": True})).split("\n\n")[:-1]
    assert last == "data: [DONE]"
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == expected
    models = json.loads(said(curl(served, path="/v1/models", body=None)))["data"]
    assert models[0]["id"] == "tiny"
    status = "-o", "/dev/null", "-w", "%{http_code}"
    large = tmp_path / "large"
    large.write_bytes(b" " * (10 << 20))
    assert said(curl(served, *status, "-d", f"@{large}", body=None)) == "413"
    assert said(curl(served, *status, key="wrong")) == "401"
    assert said(curl(served, *status, body={**CHAT, "model": "none"})) == "404"
    with curl(served, body=ENDLESS) as endless:
        assert endless.stdout.readline().startswith(b"data: ")
        assert said(curl(served, *status, body={**CHAT, "model": "slow"})) == "429"
        endless.terminate()
