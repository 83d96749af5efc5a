"""A server on a free port, in a thread of its own, of decoders over tables."""

from __future__ import annotations

import json
import random
import re
import string
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from mara_deploy.commands.serve import _bound
from mara_deploy.serve import http
from mara_deploy.serve.app import Server
from mara_deploy.serve.keys import Keys
from mara_deploy.serve.settings import ServeSettings
from mara_deploy.serve.worker import Worker
from mara_runtime import AlignedDecoder, Generation
from tests.unit import helpers
from tests.unit.decoders import VOCAB, make_decoder, reciting

TABLE = helpers.hash_table(5, VOCAB, 256, 4.0, memory=2)
CONTEXT = 200


@dataclass
class Running:
    """A server that runs, and what it has logged."""

    server: Server
    url: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    defects: list[Exception] = field(default_factory=list)

    def openai(self, **options: Any) -> OpenAI:
        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

    def post(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return httpx.post(f"{self.url}{path}", content=json.dumps(body), timeout=30, headers=headers, **options)

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        page = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))

    def until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "in vain"
            time.sleep(0.005)

    def line(self, **facts: Any) -> dict[str, Any]:
        """The line that has these facts; it is written after the response has ended."""
        self.until(lambda: any(facts.items() <= line.items() for line in self.lines))
        return next(line for line in self.lines if facts.items() <= line.items())


class serving:
    """See `serving`."""

    def __init__(self, decoders: Mapping[str, AlignedDecoder], keys: Keys | None = None, **settings: Any) -> None:
        options = ServeSettings(**{"conversations": 4, **settings})
        self._listener = _bound("127.0.0.1", 0)
        lines: list[dict[str, Any]] = []
        defects: list[Exception] = []
        workers = [Worker(name, decoder, options, defects.append) for name, decoder in decoders.items()]
        server = Server(workers, options, lines.append, keys)
        self.running = Running(server, f"http://127.0.0.1:{self._listener.getsockname()[1]}", lines, defects)
        self._thread = threading.Thread(target=http.serve, args=(server, self._listener))

    def __enter__(self) -> Running:
        self._thread.start()
        self.running.until(self._answers)
        return self.running

    def __exit__(self, *_: object) -> None:
        self.running.server.drain()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.running.url}/health").status_code == 200
        except httpx.TransportError:
            return False


def table_decoder(folder: Path, lookup: helpers.Lookup = TABLE, pass_s: float = 0.0, **options: Any) -> AlignedDecoder:
    """A decoder with the agents "agent" and "other", each of whose passes takes some time."""
    judges = None if "agents" in options else helpers.AGENTS
    decoder, engine = make_decoder(folder, lookup, judges, max_context=CONTEXT, **options)
    run = engine.run_together
    engine.calls = Endless()

    def slowly(works: Any) -> Any:
        time.sleep(pass_s)
        return run(works)

    engine.run_together = slowly  # type: ignore[method-assign]
    return decoder


class Endless(list[Any]):
    """Forgets what it is given: a server may run any number of passes."""

    def append(self, _: Any) -> None:
        pass


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def same(expected: Generation, text: str | None, finish_reason: str, usage: Any = None) -> None:
    assert (text, finish_reason) == (expected.text, expected.finish_reason)
    if usage is not None:
        assert (usage.prompt_tokens, usage.completion_tokens) == (expected.stats.prompt_tokens, expected.stats.tokens)


def texts(chunks: Sequence[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def reciting_decoder(folder: Path, **options: Any) -> AlignedDecoder:
    """A decoder whose answers end at their limit alone, and cannot be drafted."""
    text = "".join(random.Random(0).choices(string.ascii_letters, k=CONTEXT + 1))
    return table_decoder(folder, reciting(text), **options)
