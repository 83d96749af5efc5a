"""A server under random requests for a while: does it stay as it was?

    python benchmarks/serve_soak.py BUNDLE [--minutes 20] [--clients 12]

starts `mara-serve` and clients in threads, which ask for answers of random lengths, with the bundle's agents or none,
streamed or whole, go away in the middle, lose patience, and send what is no request. Prints the
server's memory as time goes by. Then, where a line is wrong, the exit code is 1:

answers    to fixed questions are those of the first minute, whatever went on beside them
requests   the server's counters and log lines are as many as the clients have sent; 500 is never among them
places     none is in use, and none waits
memory     of the last quarter of the time, at most 1.05 × that of the second quarter (medians)
end        exit code 0 at SIGTERM

The last line is JSON. Needs httpx.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from mara_deploy.bench.machine import machine
from mara_runtime.bundle import Bundle

CHAT = "/v1/chat/completions"
FIXED = ("How do I keep bread fresh?", "Where do I start with a squeaky door?", "Tell me how to boil an egg.")
BAD = (b"{", b'{"model": 1}', b'{"model": "none", "messages": []}', b"[" * 5000)
MOST_GROWTH = 1.05
GRACE_S = 10


class Soak:
    """Clients of one server. Each request of theirs is counted by the status that it saw, or why it saw none."""

    def __init__(self, url: str, bundle: Bundle, end: float) -> None:
        self.url, self._end = url, end
        self._model = bundle.folder.name
        agents = [agent.name for agent in bundle.manifest.agents]
        self._ways: list[dict[str, Any]] = [{"align": False}]
        if agents:
            self._ways += [{}, {"threshold": 0.5}, *({"agents": {name: 0.7}} for name in agents)]
        self.seen, self.wrong = Counter[str](), list[str]()
        self._first: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def run(self, seed: int) -> None:
        """Ask until the end."""
        rng = random.Random(seed)
        with httpx.Client(base_url=self.url) as client:
            while time.monotonic() < self._end:
                kind = rng.choices((self._fixed, self._random, self._leave, self._bad), (2, 5, 2, 1))[0]
                try:
                    outcome = kind(client, rng)
                except httpx.ReadTimeout:
                    outcome = "lost patience"
                with self._lock:
                    self.seen[outcome] += 1

    def _body(self, text: str, way: dict[str, Any], tokens: int, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        return {"model": self._model, "messages": messages, "max_tokens": tokens, "mara": way, **more}

    def _fixed(self, client: httpx.Client, rng: random.Random) -> str:
        text, way = rng.choice(FIXED), rng.choice(self._ways)
        response = client.post(CHAT, json=self._body(text, way, 24), timeout=60)
        if response.status_code == 200:
            answer = response.json()["choices"][0]["message"]["content"]
            with self._lock:
                first = self._first.setdefault((text, json.dumps(way)), answer)
                if answer != first:
                    self.wrong.append(f"answer: {text} {way} gave {first!r}, and now {answer!r}")
        return str(response.status_code)

    def _random(self, client: httpx.Client, rng: random.Random) -> str:
        text = f"How do I paint {rng.random()} fences?" * rng.randint(1, 3)
        body = self._body(text, rng.choice(self._ways), rng.choice((1, 20, 100)))
        return str(client.post(CHAT, json=body, timeout=rng.choice((0.02, 0.2, 60))).status_code)

    def _leave(self, client: httpx.Client, rng: random.Random) -> str:
        body = self._body(f"Count to {rng.random()}.", rng.choice(self._ways), 100, stream=True)
        with client.stream("POST", CHAT, json=body, timeout=60) as response:
            for _ in zip(response.iter_lines(), range(rng.choice((0, 2, 9, 10_000))), strict=False):
                pass
            return str(response.status_code)

    def _bad(self, client: httpx.Client, rng: random.Random) -> str:
        response = client.post(CHAT, content=rng.choice(BAD), headers={"Content-Type": "application/json"}, timeout=60)
        return str(response.status_code)


def resident_mib(pid: int) -> float:
    """Of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def counter(page: str, name: str) -> float:
    """The sum of a metric's values in a page of metrics."""
    return sum(float(value) for value in re.findall(rf"^{name}\{{.*\}} (\S+)$", page, re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=12)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    command = [sys.executable, "-m", "mara_deploy.commands.serve", str(args.bundle), "--port", "0", "--queue", "16"]
    with tempfile.TemporaryFile("a+") as log:  # the server goes on at the end, wherever the file is read
        server = subprocess.Popen(command, stderr=log, text=True)
        try:
            lines, soak, memory, page = watch(server, log, bundle, args)
        finally:
            server.terminate()
    ended = server.wait()
    sent = sum(soak.seen.values())
    counted = counter(page, "mara_requests_total")
    quarter = len(memory) // 4
    growth = median(memory[-quarter:]) / median(memory[quarter : 2 * quarter])
    wrong = [
        *soak.wrong,
        *[f"requests: {soak.seen['500']} had status 500"] * bool(soak.seen["500"]),
        *[f"requests: {sent} sent, {counted:.0f} counted, {lines} lines"] * (not sent == counted == lines),
        *[f"places: {counter(page, name):.0f} {name}" for name in ("mara_places_in_use", "mara_queue")
          if counter(page, name)],
        *[f"memory: {growth:.3f} × that of the second quarter"] * (growth > MOST_GROWTH),
        *[f"end: exit code {ended}"] * bool(ended),
    ]  # fmt: skip
    print(f"{sent} requests: {', '.join(f'{count} × {what}' for what, count in soak.seen.most_common())}")
    print(f"memory at the end: {memory[-1]:.0f} MiB, {growth:.3f} of the second quarter's")
    print(*wrong or ["nothing is wrong"], sep="\n")
    results = {"sent": sent, "seen": soak.seen, "memory_mib": memory, "growth": growth, "wrong": wrong}
    print(json.dumps({"machine": machine(), "bundle": bundle.folder.name, "minutes": args.minutes, **results}))
    sys.exit(bool(wrong))


def watch(
    server: subprocess.Popen[str], log: Any, bundle: Bundle, args: argparse.Namespace
) -> tuple[int, Soak, list[float], str]:
    """Let the clients ask; the log's lines about requests, the clients, the server's memory (MiB), its metrics."""

    def logged() -> str:
        log.seek(0)
        return str(log.read())

    while not (found := re.search(r"listening at (http://\S+)/v1", logged())):
        if server.poll() is not None:
            raise SystemExit(logged())
        time.sleep(0.1)
    seconds = args.minutes * 60
    soak = Soak(found[1], bundle, time.monotonic() + seconds)
    clients = [threading.Thread(target=soak.run, args=(seed,)) for seed in range(args.clients)]
    for client in clients:
        client.start()
    memory = []
    while any(client.is_alive() for client in clients):
        time.sleep(seconds / 80)
        memory.append(resident_mib(server.pid))
        if len(memory) % 8 == 0:
            print(f"{len(memory) / 80 * args.minutes:6.1f} min  {memory[-1]:6.0f} MiB", flush=True)
    deadline = time.monotonic() + GRACE_S  # what clients have left ends after the next pass
    while True:
        page = httpx.get(f"{soak.url}/metrics").text
        lines = sum(CHAT in line for line in logged().splitlines())
        if lines >= sum(soak.seen.values()) or time.monotonic() > deadline:
            return lines, soak, memory, page
        time.sleep(0.2)


if __name__ == "__main__":
    main()
