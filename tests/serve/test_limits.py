"""What the server refuses, and what becomes of those who leave, come too late, or come at the end."""

import asyncio
import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from mara_deploy.serve import app
from mara_deploy.serve.keys import Keys
from mara_deploy.serve.stream import EventStream
from tests.serve.servers import reciting_decoder, serving, table_decoder, user

CHAT = {"model": "tiny", "messages": user("hello"), "max_tokens": 4}
LONG = {**CHAT, "max_tokens": 150}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """With a key, and a bundle without an agent beside it."""
    folder = tmp_path_factory.mktemp("bundles")
    file = folder / "keys.txt"
    file.write_text("# two keys\nfirst\n\nsecond\n", encoding="utf-8")
    decoders = {"tiny": table_decoder(folder / "tiny"), "plain": table_decoder(folder / "plain", agents={})}
    with serving(decoders, keys=Keys.read(file), max_body_mib=1, cors=("https://example.com",)) as running:
        yield running


KEY = {"Authorization": "Bearer second"}


def changed(**fields):
    return {**CHAT, **fields}


def mara(**fields):
    return changed(mara=fields)


REFUSED = {
    "no model": ({"messages": user("hello")}, 400, "model", "missing_required_parameter"),
    "unknown model": (changed(model="big"), 404, "model", "model_not_found"),
    "unknown agent in the model's name": (changed(model="tiny:nobody"), 404, "model", "model_not_found"),
    "unknown agent": (mara(agents=["agent", "nobody"]), 400, "mara.agents", "agent_not_found"),
    "an agent twice": (mara(agents=["agent", "agent"]), 400, "mara.agents", "invalid_value"),
    "an agent's part": (mara(agents={"agent": "much"}), 400, "mara.agents", "invalid_value"),
    "two ways to name agents": ({**mara(agents="agent"), "model": "tiny:agent"}, 400, "mara.agents", "invalid_value"),
    "an agent, but plain": (mara(align=False, threshold=1), 400, "mara.threshold", "invalid_value"),
    "plain, of an agent": ({**mara(align=False), "model": "tiny:agent"}, 400, "mara.align", "invalid_value"),
    "no agent": (changed(model="plain"), 400, "mara.align", "no_agent"),
    "unknown strategy": (mara(strategy="best"), 400, "mara.strategy", "invalid_value"),
    "threshold that is text": (mara(threshold="0"), 400, "mara.threshold", "invalid_value"),
    "unknown field of mara": (mara(tresholds=1), 400, "mara.tresholds", "unknown_parameter"),
    "more candidates than the bundle has": (mara(top_k=41), 400, None, "invalid_value"),
    "template variable": (mara(template={"enable_thinking": False}), 400, None, "invalid_value"),
    "unknown field": (changed(temprature=1), 400, "temprature", "unknown_parameter"),
    "several choices": (changed(n=2), 400, "n", "unsupported_value"),
    "true is not 1": (changed(n=True), 400, "n", "unsupported_value"),
    "tools": (changed(tools=[{"type": "function"}]), 400, "tools", "unsupported_value"),
    "JSON mode": (changed(response_format={"type": "json_object"}), 400, "response_format", "unsupported_value"),
    "penalty": (changed(presence_penalty=0.5), 400, "presence_penalty", "unsupported_value"),
    "top_p": (changed(top_p=1.5), 400, "top_p", "invalid_value"),
    "temperature": (changed(temperature=3), 400, "temperature", "invalid_value"),
    "no tokens": (changed(max_tokens=0), 400, "max_tokens", "invalid_value"),
    "seed": (changed(seed=-1), 400, "seed", "invalid_value"),
    "stop texts": (changed(stop=["a"] * 5), 400, "stop", "invalid_value"),
    "stream that is text": (changed(stream="yes"), 400, "stream", "invalid_type"),
    "stream options without a stream": (changed(stream_options={}), 400, "stream_options", "invalid_value"),
    "top_logprobs alone": (changed(top_logprobs=2), 400, "top_logprobs", "invalid_value"),
    "messages that are text": (changed(messages="hello"), 400, "messages", "invalid_type"),
    "no messages": (changed(messages=[]), 400, None, "invalid_prompt"),
    "a message that is text": (changed(messages=["hello"]), 400, "messages[0]", "invalid_type"),
    "no role": (changed(messages=[{"content": "x"}]), 400, "messages[0].role", "missing_required_parameter"),
    "an image": (
        changed(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400, "messages[0].content[0].type", "unsupported_value",
    ),
    "a tool's call": (
        changed(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
        400, "messages[0].tool_calls", "unknown_parameter",
    ),
    "a prompt without room for an answer": (changed(messages=user("x" * 300)), 400, None, "invalid_prompt"),
    "half a character": (changed(messages=user("\ud800")), 400, None, "invalid_prompt"),
    "an array": ([], 400, None, "invalid_type"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "code"), REFUSED.values(), ids=REFUSED)
def test_bad_requests_are_refused_by_name(served, body, status, param, code):
    found = served.post(body, headers=KEY)
    error = found.json()["error"]
    assert (found.status_code, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert served.line(request=found.headers["x-request-id"])["status"] == status


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": ["a", "b"]}, "prompt"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "echo": True}, "echo"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "best_of": 3}, "best_of"),
        ("/v1/responses", {"model": "tiny", "input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/responses", {"model": "tiny", "input": "a", "include": ["reasoning.encrypted_content"]}, "include"),
        ("/v1/responses", {"model": "tiny", "input": "a", "text": {"format": {"type": "json_object"}}}, "text"),
        ("/v1/responses", {"model": "tiny", "input": [{"type": "function_call_output"}]}, "input[0].role"),
    ],
    ids=str,
)
def test_other_endpoints_refuse_by_name_too(served, path, body, param):
    found = served.post(body, path, headers=KEY)
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)


def test_what_is_no_json_has_the_wrong_type_or_too_many_bytes(served):
    url, headers = f"{served.url}/v1/chat/completions", {**KEY, "Content-Type": "application/json"}
    for content in (b"{", b"", b"\xff", b'{"seed": NaN}', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"):
        found = httpx.post(url, content=content, headers=headers)
        assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_json")
    found = httpx.post(url, content=json.dumps(CHAT), headers={**KEY, "Content-Type": "text/plain"})
    assert found.status_code == 415
    for size in (10 << 20, (1 << 20) + 1):
        assert httpx.post(url, content=b" " * size, headers=headers).status_code == 413
    chunks = (b" " * (1 << 16) for _ in range(160))
    assert httpx.post(url, content=chunks, headers=headers).status_code == 413
    assert httpx.get(url, headers=KEY).status_code == 405
    assert httpx.get(f"{served.url}/v1/files", headers=KEY).json()["error"]["code"] == "not_found"
    for _ in range(20):
        with contextlib.suppress(httpx.TransportError):  # or it is cut off
            assert httpx.get(f"{served.url}/health", headers={"X-Long": "x" * 1_000_000}).status_code == 400
    assert served.post(CHAT, headers=KEY).status_code == 200


def test_who_writes_too_slowly_is_told(served, monkeypatch):
    monkeypatch.setattr(app, "BODY_S", 0.1)

    def slowly():
        yield b"{"
        time.sleep(0.3)
        yield b"}"

    headers = {**KEY, "Content-Type": "application/json"}
    found = httpx.post(f"{served.url}/v1/chat/completions", content=slowly(), headers=headers)
    assert (found.status_code, found.json()["error"]["code"]) == (408, "timeout")


def test_the_document_has_every_path_and_what_is_checked(served):
    found = httpx.get(f"{served.url}/openapi.json", headers=KEY).json()
    routes = {route.path.replace(":path", "") for route in served.server.app().routes}
    assert routes >= set(found["paths"]) > set(app.ENDPOINTS)
    schema = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert (schema["required"], schema["additionalProperties"]) == (["model", "messages"], False)
    fields = schema["properties"]
    assert fields["model"]["enum"] == ["tiny", "tiny:agent", "tiny:other", "plain"]
    assert fields["max_tokens"] == {"type": ["integer", "null"], "minimum": 1}
    assert fields["mara"]["properties"]["fallback"] == {"enum": ["first", "last", None]}


def test_two_and_nothing_is_an_integer(served):
    assert served.post(changed(max_tokens=2.0), headers=KEY).json()["usage"]["completion_tokens"] == 2
    assert served.post(changed(max_tokens=2.5), headers=KEY).status_code == 400


def test_keys(served):
    for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}):
        pages = [httpx.get(f"{served.url}/{path}", headers=headers) for path in ("v1/models", "openapi.json")]
        for found in (served.post(CHAT, headers=headers), *pages):
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError), served.openai() as client:
        client.models.list()
    with served.openai(api_key="first") as client:
        assert client.chat.completions.create(**CHAT).choices
    assert httpx.get(f"{served.url}/ready").status_code == 200  # no key


def test_pages_of_other_origins_are_let_in_only_by_name(served, tmp_path):
    def allowed(running, origin):
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        found = httpx.options(f"{running.url}/v1/chat/completions", headers=asks)
        return found.headers.get("Access-Control-Allow-Origin")

    assert allowed(served, "https://example.com") == "https://example.com"
    assert allowed(served, "https://example.org") is None
    with serving({"tiny": table_decoder(tmp_path)}) as running:
        assert allowed(running, "https://example.com") is None


def test_logs_have_no_prompts_unless_they_are_wanted(served, tmp_path):
    found = served.post(changed(messages=user("secret")), headers=KEY)
    line = served.line(request=found.headers["x-request-id"])
    assert "secret" not in json.dumps(served.lines)
    assert (line["model"], line["status"], line["completion_tokens"]) == ("tiny", 200, 4)
    with serving({"tiny": table_decoder(tmp_path)}, log_prompts=True) as running:
        running.post(changed(messages=user("secret")))
        assert running.line(status=200, path="/v1/chat/completions")["prompt"] == user("secret")


@pytest.fixture
def slow(tmp_path):
    """Two places, one in the queue; an answer takes a few seconds."""
    with serving({"tiny": reciting_decoder(tmp_path, pass_s=0.02)}, conversations=2, queue=1) as running:
        yield running


def test_beyond_the_queue_the_status_is_429(slow):
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(slow.post, LONG) for _ in range(3)]
        slow.until(lambda: (slow.metric("mara_places_in_use"), slow.metric("mara_queue")) == (2, 1))
        found = slow.post(CHAT)
        assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
        assert int(found.headers["Retry-After"]) >= 1
        with slow.openai() as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**CHAT)
        assert [each.result().status_code for each in asked] == [200] * 3
    assert slow.post(CHAT).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_leaves_a_free_place_within_a_pass(slow, stream):
    with slow.openai() as client:
        if stream:
            with client.chat.completions.create(**LONG, stream=True) as chunks:
                next(iter(chunks))
                assert slow.metric("mara_places_in_use") == 1
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.2).chat.completions.create(**LONG)
    left = time.monotonic()
    slow.until(lambda: slow.metric("mara_places_in_use") == 0)
    assert time.monotonic() - left < 2  # the answer would have taken three seconds
    assert slow.line(finish="client_gone")["status"] == (200 if stream else 499)


def test_who_goes_away_while_waiting_leaves_the_queue(slow):
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(slow.post, LONG) for _ in range(2)]
        slow.until(lambda: slow.metric("mara_places_in_use") == 2)
        with slow.openai(timeout=0.2) as client, pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**CHAT, stream=True)
        slow.until(lambda: slow.metric("mara_queue") == 0)
        assert [each.result().status_code for each in asked] == [200, 200]


def test_an_answer_that_takes_too_long_is_ended(tmp_path):
    with serving({"tiny": reciting_decoder(tmp_path, pass_s=0.02)}, timeout_s=0.4, conversations=1) as running:
        with running.openai() as client:
            stream = client.chat.completions.create(**LONG, stream=True)
            waiting = threading.Thread(target=lambda: found.append(running.post(LONG)))
            found = []
            waiting.start()
            with pytest.raises(openai.APIError, match="too long"):
                list(stream)
            waiting.join()
        assert (found[0].status_code, found[0].json()["error"]["code"]) == (504, "timeout")
        assert running.line(finish="timeout")["status"] == 200  # the stream
        with running.openai() as client:
            last = list(client.responses.create(model="tiny", input="hello", stream=True))[-1]
        assert (last.type, last.code) == ("error", "timeout")
        running.until(lambda: running.metric("mara_places_in_use") == 0)


def test_at_the_end_answers_are_completed_and_others_refused(slow):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(slow.post, LONG)
        slow.until(lambda: slow.metric("mara_places_in_use") == 1)
        slow.server.drain()
        assert httpx.get(f"{slow.url}/ready").status_code == 503
        refused = slow.post(CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert (running.result().status_code, slow.line(finish="length")["completion_tokens"]) == (200, 150)


def test_at_the_end_of_the_grace_answers_are_ended(tmp_path):
    decoder = reciting_decoder(tmp_path, pass_s=0.02)
    with serving({"tiny": decoder}, grace_s=0.2) as running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.post, LONG)
        running.until(lambda: running.metric("mara_places_in_use") == 1)
        running.server.drain()
        assert asked.result().status_code == 504


def test_a_defect_ends_the_answers_in_the_making_and_the_server_goes_on(tmp_path):
    decoder = table_decoder(tmp_path)
    run = decoder.engine.run_together

    def run_together(works):
        if any(list(work.tokens) == [67, 5] for _, work in works):
            raise RuntimeError("a defect")
        return run(works)

    decoder.engine.run_together = run_together
    with serving({"tiny": decoder}) as running:
        bad = {**CHAT, "prompt": [67, 5]}
        del bad["messages"]
        found = running.post(bad, "/v1/completions")
        assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")
        assert "defect" not in found.text
        assert [str(defect) for defect in running.defects] == ["a defect"]
        assert running.post(CHAT).status_code == 200
        assert running.metric("mara_places_in_use") == 0


def test_a_reader_that_stands_still_is_cut_off():
    closed = []

    async def content():
        while True:
            yield b"data"

    async def never(*_):
        await asyncio.sleep(60)

    asyncio.run(EventStream(content(), lambda: closed.append(True), most_s=0.05)({"type": "http"}, never, never))
    assert closed == [True]
