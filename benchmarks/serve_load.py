"""A server under load from another process: are all answers right, is it as fast as its batches, who waits how long?

    python benchmarks/serve_load.py BUNDLE [--requests 400] [--connections 16] [--tokens 48] [--rounds 3]
                                    [--peer URL MODEL]

starts `mara-serve` and asks it, streamed, over one connection and over many: questions of mixed lengths, with the
bundle's agents, their mixes and none, up to so many tokens. The same conversations are decoded in this process, one by
one and together; all take turns, and each round has other questions. Prints

answers    that are not those of one alone in this process; only close decisions may differ, in fp32 none
factor     tokens a second over many connections ÷ over one; of the batches in this process: together ÷ one by one; and
           the quotient of the two
waiting    from a request to its first text, and between pieces of text: median and 95th percentile

--peer: another server of OpenAI's interface, which runs. It is asked the same questions in the same turns, and
mara-serve also all of them without an agent. The exit code is 1 if an answer is lost, or in fp32 differs. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import queue
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from mara_deploy.bench.machine import machine
from mara_runtime import AlignedDecoder, DecodeConfig

WORDS = (3, 8, 20, 60)
"""of a question"""
STOP_S = 60


@dataclass(frozen=True)
class Question:
    """What is asked, by one way or the other."""

    text: str
    tokens: int
    mara: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]

    @property
    def config(self) -> DecodeConfig:
        return DecodeConfig(**{"max_new_tokens": self.tokens, **self.mara})


@dataclass
class Load:
    """What came of a turn."""

    seconds: float = 0.0
    tokens: int = 0
    answers: dict[int, str] = field(default_factory=dict)
    """by the question's index"""
    lost: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens a second of all together."""
        return self.tokens / self.seconds


def questions(decoder: AlignedDecoder, count: int, tokens: int, seed: int) -> list[Question]:
    """Random words of the bundle's own vocabulary."""
    rng = random.Random(seed)
    assert decoder.text_side is not None
    words = sorted(
        {found for token in decoder.text_side.tokenizer.get_vocab() if (found := token.strip("Ġ▁")).isalnum()}
    )
    ways: list[dict[str, Any]] = [{"align": False}]
    names = [agent.name for agent in decoder.bundle.manifest.agents]
    if names:
        ways += [{}, {"threshold": 0.5}, {"agents": {names[-1]: 0.7}, "fallback": "last"}]
    if len(names) > 1:
        ways.append({"agents": {names[0]: 1.0, names[1]: 0.5}})
    return [
        Question(" ".join(rng.choices(words, k=rng.choice(WORDS))), rng.randint(tokens // 4, tokens), rng.choice(ways))
        for _ in range(count)
    ]


def ask(connection: http.client.HTTPConnection, path: str, body: dict[str, Any], load: Load) -> tuple[str, int]:
    """The answer to one request, and its tokens; raises for what is no complete answer."""
    started = last = time.perf_counter()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read().decode()[:200]}")
    text, pieces, tokens, finished = "", 0, 0, False
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(str(event["error"]))
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event["choices"]:
            finished = finished or choice.get("finish_reason") is not None
            if piece := choice["delta"].get("content"):
                now = time.perf_counter()
                (load.gaps_s if pieces else load.first_s).append(now - last if pieces else now - started)
                text, pieces, last = text + piece, pieces + 1, now
    if not finished:
        raise RuntimeError("the stream ended before the answer")
    return text, tokens or pieces


def served(url: str, model: str, asked: Sequence[Question], connections: int, *, plain: bool = False) -> Load:
    """All questions over so many connections. plain: of any server, without the extension."""
    load, todo, lock = Load(), queue.SimpleQueue[tuple[int, Question]](), threading.Lock()
    for each in enumerate(asked):
        todo.put(each)
    address = urlsplit(url)

    def work() -> None:
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=600)
        while True:
            try:
                index, question = todo.get_nowait()
            except queue.Empty:
                return connection.close()
            options = {"temperature": 0} if plain else {"mara": question.mara}
            body = {"model": model, "messages": question.messages, "max_tokens": question.tokens, **options}
            own = Load()
            try:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
                text, tokens = ask(connection, f"{address.path}/chat/completions", body, own)
            except (OSError, http.client.HTTPException, RuntimeError, ValueError, LookupError) as error:
                connection.close()
                with lock:
                    load.lost.append(f"question {index}: {error!r}")
                continue
            with lock:
                load.answers[index] = text
                load.tokens += tokens
                load.first_s += own.first_s
                load.gaps_s += own.gaps_s

    started = time.perf_counter()
    workers = [threading.Thread(target=work) for _ in range(connections)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    load.seconds = time.perf_counter() - started
    assert len(load.answers) + len(load.lost) == len(asked)
    return load


def decoded(decoder: AlignedDecoder, asked: Sequence[Question], places: int, *, together: bool) -> Load:
    """All questions in this process."""
    load, started, todo = Load(), time.perf_counter(), [*enumerate(asked)]
    for part in [todo] if together else [[each] for each in todo]:
        prompts, configs = [each.messages for _, each in part], [each.config for _, each in part]
        for at, piece in decoder.generate_many(prompts, configs, places=places):
            index = part[at][0]
            if isinstance(piece, Exception):
                load.lost.append(f"question {index}: {piece}")
            elif piece.result is not None:
                load.answers[index] = piece.result.text or ""
                load.tokens += piece.result.stats.tokens
    load.seconds = time.perf_counter() - started
    return load


def start(bundle: Path, places: int) -> tuple[subprocess.Popen[str], str]:
    """A server and where it listens."""
    command = [sys.executable, "-m", "mara_deploy.commands.serve", str(bundle), "--port", "0"]
    server = subprocess.Popen([*command, "--conversations", str(places)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    said = []
    for line in server.stderr:
        said.append(line)
        if found := re.search(r"listening at (\S+)", line):
            threading.Thread(target=server.stderr.read, daemon=True).start()  # its log
            return server, found[1]
    raise SystemExit("".join(said))


def percentiles(seconds: Sequence[float]) -> list[float]:
    """Median and 95th percentile (ms); none of nothing."""
    ordered = sorted(seconds)
    return [round(ordered[int(part * (len(ordered) - 1))] * 1e3, 1) for part in (0.5, 0.95) if ordered]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--requests", type=int, default=400)
    options.add_argument("--connections", type=int, default=16)
    options.add_argument(
        "--places", type=int, default=8, help="conversations at once, of the server and in this process"
    )
    options.add_argument("--tokens", type=int, default=48, help="of the longest answer")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--peer", nargs=2, metavar=("URL", "MODEL"), help="of a server that runs, as in http://…/v1 m")
    args = options.parse_args()
    server, url = start(args.bundle, args.places)
    try:
        loads, exact = measure(url, args)
    finally:
        server.terminate()
        ended = server.wait(STOP_S)
    sys.exit(report(loads, exact, args) or bool(ended))


def measure(url: str, args: argparse.Namespace) -> tuple[dict[str, list[Load]], bool]:
    """Loads by way, one per round; whether answers have to be equal."""
    decoder, model = AlignedDecoder(args.bundle), args.bundle.resolve().name
    asked, plain = list[Question](), list[Question]()
    ways: dict[str, Callable[[], Load]] = {
        "one by one": lambda: decoded(decoder, asked, args.places, together=False),
        "together": lambda: decoded(decoder, asked, args.places, together=True),
        "one connection": lambda: served(url, model, asked, 1),
        "connections": lambda: served(url, model, asked, args.connections),
    }
    if args.peer:
        there, name = args.peer
        ways["connections, plain"] = lambda: served(url, model, plain, args.connections)
        ways["peer, one connection"] = lambda: served(there, name, plain, 1, plain=True)
        ways["peer, connections"] = lambda: served(there, name, plain, args.connections, plain=True)
    loads: dict[str, list[Load]] = {way: [] for way in ways}
    for number in range(args.rounds):
        asked[:] = questions(decoder, args.requests, args.tokens, number)
        plain[:] = [Question(each.text, each.tokens, {"align": False}) for each in asked]
        for way in [*ways][number % len(ways) :] + [*ways][: number % len(ways)]:
            loads[way].append(ways[way]())
            print(f"round {number + 1}: {way}, {loads[way][-1].speed:.1f} tokens/s", file=sys.stderr, flush=True)
    return loads, decoder.bundle.manifest.step.precision == "fp32"


def report(loads: dict[str, list[Load]], exact: bool, args: argparse.Namespace) -> bool:
    """Print the results. Returns whether something is wrong."""
    lost = [each for way in loads.values() for load in way for each in load.lost]
    compared = [
        answer == alone.answers.get(index)
        for way in ("together", "one connection", "connections")
        for alone, load in zip(loads["one by one"], loads[way], strict=True)
        for index, answer in load.answers.items()
    ]
    different = compared.count(False)
    speeds = {way: [round(load.speed, 1) for load in found] for way, found in loads.items()}

    def factor(many: str, one: str) -> float:
        return median(a / b for a, b in zip(speeds[many], speeds[one], strict=True))

    factors = factor("connections", "one connection"), factor("together", "one by one")
    waiting = {
        way: {
            "first_ms": percentiles([s for load in found for s in load.first_s]),
            "between_ms": percentiles([s for load in found for s in load.gaps_s]),
        }
        for way, found in loads.items()
        if any(load.first_s for load in found)
    }
    print(*lost[:10], sep="\n", end="\n" * bool(lost))
    print(f"answers: {len(compared)}, {different} differ from one alone; {len(lost)} lost")
    print(f"factor: {factors[0]:.2f} served, {factors[1]:.2f} in process; {factors[0] / factors[1]:.2f} of it")
    print("tokens/s, and ms to the first text and between pieces (p50, p95)")
    for way, found in speeds.items():
        times = "  ".join("".join(f"{ms:9.1f}" for ms in both) for both in waiting.get(way, {}).values())
        print(f"  {way:22}{median(found):8.1f}  {times}")
    settings = {name: getattr(args, name) for name in ("requests", "connections", "places", "tokens", "rounds")}
    results = {"speeds": speeds, "waiting": waiting, "factors": factors, "different": different, "lost": len(lost)}
    print(json.dumps({"machine": machine(), "bundle": args.bundle.name, **settings, **results}))
    return bool(lost) or (exact and different > 0)


if __name__ == "__main__":
    main()
