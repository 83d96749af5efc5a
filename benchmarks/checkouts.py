"""Two checkouts against each other, turn by turn: what a change does to the speed of decoding.

    python benchmarks/checkouts.py OLD_PYTHON OLD_BUNDLE NEW_PYTHON NEW_BUNDLE [--rounds 9] [--sittings 3]
                                   [--ways plain,aligned,drafting]

OLD_PYTHON and NEW_PYTHON are the interpreters of two environments, each with its checkout installed. Both workers take
turns; the one that begins alternates. Each sitting restarts them, as the placement of a process's memory changes its
speed. Prints medians and quartiles of new ÷ old, turn by turn, for greedy steps and for each way of decoding under
synthetic acceptance, the host's share and the largest sizes in memory; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from contextlib import ExitStack
from typing import Any

from mara_deploy.bench.machine import machine
from mara_deploy.bench.measure import PROFILES, WAYS, spread

PAUSE_S = 0.3


class Worker:
    """A bundle, opened by one checkout."""

    def __init__(self, python: str, bundle: str, threads: int) -> None:
        # -P: the current folder may be a checkout, too
        command = [python, "-P", "-m", "mara_deploy.bench.worker", bundle, "--engine", "cpu", "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise SystemExit(f"{self._process.args}: {answer['error']}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old_python", "old_bundle", "new_python", "new_bundle"):
        parser.add_argument(name)
    parser.add_argument("--rounds", type=int, default=9, help="in each sitting")
    parser.add_argument("--sittings", type=int, default=3)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=[*WAYS], metavar="WAY[,WAY…]")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    times: dict[str, dict[str, list[float]]] = {}
    host: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, list[float]] = {"old": [], "new": []}

    def turn(number: int, workers: dict[str, Worker], counted: bool) -> None:
        for side in ("old", "new") if number % 2 else ("new", "old"):
            time.sleep(PAUSE_S)
            steps = workers[side].ask("decode", context=args.context, tokens=args.tokens)["ms"]
            measured = {"greedy steps": (sum(steps), None)}
            for index, profile in enumerate(PROFILES, 1):
                ways = {way: WAYS[way] for way in args.ways if way != "drafting" or "repeated" in profile}
                request = {"profile": {**profile, "seed": number}, "context": args.context, "tokens": args.tokens}
                for way, answer in workers[side].ask("profile", **request, ways=ways).items():
                    share = (answer["ms"] - answer["engine_ms"]) / answer["ms"]
                    measured[f"profile {index}, {way}"] = (answer["ms"], share)
            for name, (ms, share) in measured.items():
                if counted:
                    times.setdefault(name, {}).setdefault(side, []).append(ms)
                    if share is not None:
                        host.setdefault(name, {}).setdefault(side, []).append(share)

    about = {}
    for sitting in range(args.sittings):
        with ExitStack() as stack:
            workers = {}
            for side in ("old", "new") if sitting % 2 else ("new", "old"):
                python, bundle = getattr(args, f"{side}_python"), getattr(args, f"{side}_bundle")
                workers[side] = Worker(python, bundle, args.threads)
                stack.callback(workers[side].close)
                workers[side].ask("width")
                about[side] = workers[side].about
            for number in range(args.rounds + 2):  # two turns to learn from
                turn(number, workers, counted=number >= 2)
            for side, worker in workers.items():
                peaks[side].append(worker.ask("memory")["peak_bytes"])

    results = {}
    print(
        f"new ÷ old, {args.sittings} × {args.rounds} rounds of {args.tokens} tokens at {args.context}: "
        "median [quartiles]; host old → new"
    )
    for name, sides in times.items():
        ratio = spread([new / old for old, new in zip(sides["old"], sides["new"], strict=True)])
        shares = {side: spread(values)["median"] for side, values in host.get(name, {}).items()}
        of_host = f"   host {shares['old']:.2%} → {shares['new']:.2%}" if shares else ""
        print(f"  {name:<24}{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]{of_host}")
        results[name] = {"ratio": ratio, "ms": {side: spread(values) for side, values in sides.items()}, "host": shares}
    peak = spread([new / old for old, new in zip(peaks["old"], peaks["new"], strict=True)])
    print(f"  {'peak memory':<24}{peak['median']:.3f} [{peak['low']:.3f}, {peak['high']:.3f}]")
    results["peak memory"] = {"ratio": peak, "bytes": peaks}
    print(json.dumps({"machine": machine(), "workers": about, "results": results}))


if __name__ == "__main__":
    main()
