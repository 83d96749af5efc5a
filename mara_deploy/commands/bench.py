"""`mara-bench`: what aligned decoding costs here, against plain decoding and against the peers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

from mara_deploy.commands.shared import Parser, guarded
from mara_runtime.bundle import Bundle
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.manifest import ENGINE_TARGETS

EPILOG = """\
Every contestant runs in a process of its own, and they take turns, in several sittings with another one started first.
The instrument: real passes of the bundle's graph, whose candidates and verdicts follow a set profile (docs:
benchmarks/README.md). Figures are medians; in brackets the quartiles. The last line of the output is one JSON object.

examples:
  mara-bench BUNDLE
  mara-bench BUNDLE --peer genai=GENAI_ENV/bin/python:MODEL_FOLDER --peer hugging-face=CHECKPOINT_FOLDER
"""
PROFILES: tuple[dict[str, Any], ...] = (
    {"accept": 0.9},
    {"accept": 0.6},
    {"accept": 0.6, "foreseen": True},
    {"accept": 0.9, "repeated": 0.5},
    {"accept": 0.9, "repeated": 0.8},
)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"align": False, "draft": 0},
    "aligned": {"draft": 0},
    "drafting": {},
    "one-by-one": {"schedule": "one-by-one", "draft": 0},
    "together": {"schedule": "together", "draft": 0},
}
STANDARD_CONTEXTS = (256, 1024, 4096)
OTHERS = {"genai": "peer_genai.py", "llama.cpp": "peer_llama.py"}
"""Peers that need an environment of their own, and what drives them there."""
MEASURES = ("memory", "steps", "prefill", "width", "profiles")
CPUS = Path("/sys/devices/system/cpu")
SITTINGS = 4
"""How often contestants of plain steps and of prefill are started anew, each time another one first: the speed of a
process moves by several percent with where its memory happens to lie, and on some machines it is who starts first that
gets the slower place."""
WARM_UP = 2
"""Rounds on a profile that are not counted: the schedule learns the agent's habits from its decisions."""


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-bench", "Measure aligned decoding of a bundle against plain decoding and against peers.", EPILOG
    )
    options.add_argument("bundle", metavar="BUNDLE", help="folder made by mara-export")
    options.add_argument("--engine", default="auto", metavar="NAME", help="as of mara-run (default auto)")
    options.add_argument("--threads", type=int, metavar="N", help="of every contestant (default: one a core)")
    options.add_argument(
        "--context",
        type=int,
        action="append",
        metavar="N",
        help="tokens before the measured ones (may be repeated; default 256, 1024 and 4096, as the capacity allows)",
    )
    options.add_argument("--tokens", type=int, default=96, metavar="N", help="decoded at a time (default 96)")
    options.add_argument("--rounds", type=int, default=9, metavar="N", help="turns of each contestant (default 9)")
    options.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=WHERE",
        help="genai=PYTHON:FOLDER, llama.cpp=PYTHON:FILE (in environments of their own) or hugging-face=FOLDER (eager, "
        "float32); may be repeated",
    )
    options.add_argument(
        "--measure",
        default=",".join(MEASURES),
        metavar="NAMES",
        help=f"what to measure, separated by commas (default {','.join(MEASURES)})",
    )
    options.add_argument(
        "--profile",
        type=int,
        action="append",
        choices=range(1, len(PROFILES) + 1),
        help="number of an instrument to measure (may be repeated; default all)",
    )
    options.add_argument("--quiet", action="store_true", help="print the JSON line alone")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _bench, argv)


def _bench(args: argparse.Namespace) -> None:
    if args.rounds < 1 or args.tokens < 2:
        raise OptionError("--rounds must be at least 1, --tokens at least 2")
    wanted = args.measure.split(",")
    if unknown := sorted(set(wanted) - set(MEASURES)):
        raise OptionError(f"--measure names {unknown[0]!r}; it must be among {', '.join(MEASURES)}")
    if args.profile and "profiles" not in wanted:
        raise OptionError("--profile needs 'profiles' among --measure")
    if args.threads is not None and args.threads < 1:
        raise OptionError(f"--threads is {args.threads}; it must be at least 1")
    args.threads = args.threads or cores()
    bundle = Bundle.open(args.bundle)
    capacity = bundle.manifest.max_context
    longest = capacity - args.tokens - 1  # leaves room for what is decoded
    if longest < 1:
        raise OptionError(f"{args.bundle} holds {capacity} tokens; --tokens {args.tokens} leaves no context")
    for context in args.context or []:
        if not 1 <= context <= longest:
            raise OptionError(
                f"--context is {context}; {args.bundle} holds {capacity} tokens, which leaves 1 to {longest}"
            )
    standard = [min(c, longest) for c in STANDARD_CONTEXTS if c <= capacity]
    contexts = sorted({*(args.context or standard or [longest])})
    bench = Bench(args, contexts)
    with ExitStack() as stack:
        bench.open(stack)
        measures: dict[str, Callable[[], Any]] = {
            "memory": bench.memory,
            "steps": bench.steps,
            "prefill": bench.prefill,
            "width": bench.width,
            "profiles": lambda: [bench.profile(number) for number in args.profile or range(1, len(PROFILES) + 1)],
        }
        results = {name: measure() for name, measure in measures.items() if name in wanted}
    document = {
        "bundle": {
            "model": bundle.manifest.model.source,
            "precision": bundle.manifest.step.precision,
            "size_bytes": sum(entry.size_bytes for entry in bundle.manifest.files.values()),
        },
        "contestants": bench.about,
        "machine": machine(),
        "threads": args.threads,
        "tokens": args.tokens,
        "rounds": args.rounds,
        **results,
    }
    print(json.dumps(document))


class Contestant:
    """A process that answers requests, see mara_deploy/bench/worker.py."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request. Raises MaraError when it fails."""
        pipe: IO[str] = self._process.stdin  # type: ignore[assignment]
        try:
            pipe.write(json.dumps({"do": do, **request}) + "\n")
            pipe.flush()
        except OSError:
            raise MaraError(f"{self.name} has ended before it was asked to {do}") from None
        return self._read()

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):  # it has ended, and what it was asked last is still in the pipe
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise MaraError(f"{self.name} did not answer; it said {line[:200]!r}") from None
        if "error" in answer:
            raise MaraError(f"{self.name}: {answer['error']}")
        return answer


class Bench:
    """The measurements, each printed as it is done."""

    def __init__(self, args: argparse.Namespace, contexts: list[int]) -> None:
        self._args, self._contexts = args, contexts
        threads = ["--threads", str(args.threads)]
        folder = Path(__file__).resolve().parents[1] / "bench"
        ours = [sys.executable, "-m", "mara_deploy.bench.worker", args.bundle, "--engine", args.engine]
        self._commands = {"mara": ours if args.engine in ENGINE_TARGETS else [*ours, *threads]}
        for peer in args.peer:
            name, _, where = peer.partition("=")
            python, colon, model = where.partition(":")
            if name in OTHERS and colon:
                command = [python, str(folder / OTHERS[name]), model]
            elif name == "hugging-face" and where:
                command = [sys.executable, "-m", "mara_deploy.bench.peer_hf", where]
            else:
                raise OptionError(
                    f"--peer is {peer!r}; it must be genai=PYTHON:FOLDER, llama.cpp=PYTHON:FILE or hugging-face=FOLDER"
                )
            self._commands[name] = [*command, *threads]
        self._open: dict[str, Contestant] = {}
        self._stack: ExitStack
        self.about: dict[str, Any] = {}

    def open(self, stack: ExitStack) -> None:
        """Start every contestant."""
        self._stack = stack
        for name in self._commands:
            self._open[name] = self._start(name, stack)
            self.about[name] = {k: v for k, v in self._open[name].about.items() if k != "ready"}

    def memory(self) -> dict[str, int]:
        """Peak of a fresh process that takes the shortest context and decodes, by contestant."""
        peaks = {}
        for name in self._commands:
            with ExitStack() as stack:
                fresh = self._start(name, stack)
                fresh.ask("decode", context=self._contexts[0], tokens=self._args.tokens)
                peaks[name] = int(fresh.ask("memory")["peak_bytes"])
        self._say(f"\npeak memory, {self._contexts[0]} tokens of prompt and {self._args.tokens} decoded")
        for name, peak in peaks.items():
            self._say(f"  {name:<14}{peak / 1e6:9.0f} MB   {self._ratio(peaks['mara'] / peak, name)}")
        return peaks

    def steps(self) -> dict[str, dict[str, Any]]:
        """Milliseconds of a plain greedy step at every context."""
        self._say("\nplain greedy step, ms")
        found: dict[str, dict[str, Any]] = {}
        for context in self._contexts:

            def step(contestant: Contestant, context: int = context) -> float:
                tokens = self._args.tokens if contestant.name != "hugging-face" else 4
                return float(median(contestant.ask("decode", context=context, tokens=tokens)["ms"]))

            eager = context == self._contexts[0]
            found[str(context)] = self._in_turns(step, f"  {context:>5} tokens ", eager=eager)
        return found

    def prefill(self) -> dict[str, dict[str, Any]]:
        """Milliseconds to the first token of a prompt."""
        length = min(1024, self._contexts[-1])
        self._say(f"\nprefill of {length} tokens, ms")
        return {
            str(length): self._in_turns(
                lambda contestant: float(contestant.ask("prefill", tokens=length)["ms"]), "  ", most=5, eager=False
            )
        }

    def width(self) -> dict[str, Any]:
        """The cost of rows."""
        curve = self._open["mara"].ask("width")
        self._say("\na pass by its rows, ms (without the LM head)")
        self._say("  context " + "".join(f"{width:>8}" for width in curve["widths"]))
        for context, row in zip(curve["contexts"], curve["body_ms"], strict=True):
            self._say(f"  {context:>7} " + "".join(f"{ms:8.1f}" for ms in row))
        heads = ", ".join(f"{n}: {ms:.1f}" for n, ms in zip(curve["heads"], curve["head_ms"], strict=True))
        self._say(f"  LM head by rows: {heads}")
        return curve

    def profile(self, number: int) -> dict[str, Any]:
        """Plain against aligned on an instrument, and against the peers' plain, in turns; ratios are of tokens/s."""
        profile = PROFILES[number - 1]
        ways = {way: dict(options) for way, options in WAYS.items() if way != "drafting" or "repeated" in profile}
        measured: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        peers: dict[str, list[float]] = {name: [] for name in self._open if name in OTHERS}
        serial: list[dict[str, Any]] = []
        context, tokens = self._contexts[0], self._args.tokens
        sitting = -(-self._args.rounds // SITTINGS)
        for turn in range(WARM_UP + self._args.rounds):
            if peers and turn >= WARM_UP and (turn - WARM_UP) % sitting == 0:
                self._start_anew(list(peers), turn)  # of peers alone: ours would have to learn anew
                for name in peers:
                    self._plain_ms(name)
            seeded = {**profile, "seed": turn}
            replies = self._open["mara"].ask("profile", profile=seeded, context=context, tokens=tokens, ways=ways)
            if turn < WARM_UP:
                continue
            for way in ways:
                measured[way].append(replies[way])
            for name, times in peers.items():
                time.sleep(0.05)  # threads of the one before still spin
                times.append(self._plain_ms(name))
            if "hugging-face" in self._open and "repeated" not in profile and len(serial) < 3:
                few = min(tokens, 12)
                answer = self._open["hugging-face"].ask("serial", profile=seeded, context=context, tokens=few)
                serial.append({"ms": answer["ms"] / few})

        from mara_deploy.bench.profile import Profile

        plain = measured["plain"]
        continued = sum(a["continued"] for a in plain) / len(plain)
        self._say(f"\ninstrument {number}: {Profile(**profile)}; {continued:.0%} of its tokens continue what was there")
        found: dict[str, Any] = {"profile": profile, "continued": continued, "ways": {}}
        for way, answers in measured.items():
            ratios = [p["ms"] / a["ms"] for p, a in zip(plain, answers, strict=True)]
            expected = sum(p["expected_ms"] for p in plain) / sum(a["expected_ms"] for a in answers)
            stats: list[dict[str, Any]] = [a["stats"] for a in answers]
            emitted = sum(s["tokens"] for s in stats)
            values: dict[str, Any] = {
                # the first token of an answer comes with its prompt
                "tokens_per_second": (emitted - len(answers)) / sum(a["ms"] for a in answers) * 1e3,
                "ratio": spread(ratios),
                "expected_ratio": expected,
                "passes_per_token": sum(s["forwards"] for s in stats) / emitted,
                "rows_per_token": sum(s["rows"] for s in stats) / emitted,
                "drafted": sum(s["drafted"] for s in stats),
                "confirmed": sum(s["confirmed"] for s in stats),
                "host_share": 1 - sum(a["engine_ms"] for a in answers) / sum(a["ms"] for a in answers),
                "host_ms_per_pass": sum(a["ms"] - a["engine_ms"] for a in answers) / sum(s["forwards"] for s in stats),
            }
            found["ways"][way] = values
            self._say(
                f"  {way:<12}{values['tokens_per_second']:7.1f} tokens/s   × {_bracketed(values['ratio'])} of plain"
                f"   (by the curve × {expected:.2f})   {values['passes_per_token']:.2f} passes, "
                f"{values['rows_per_token']:.2f} rows a token   host {values['host_share']:.1%}"
            )
        for name, times in peers.items():
            rate = (tokens - 1) * len(times) / sum(times) * 1e3
            to_it = {
                way: spread([ms / a["ms"] for ms, a in zip(times, answers, strict=True)])
                for way, answers in measured.items()
            }
            found.setdefault("peers", {})[name] = {"tokens_per_second": rate, "mara_to_its_plain": to_it}
            told = (f"{way} is × {_bracketed(to_it[way])}" for way in ("plain", "aligned", "drafting") if way in ways)
            self._say(f"  {name}, plain: {rate:.1f} tokens/s; of it {', '.join(told)}")
        if serial:
            ours = [a["ms"] / (tokens - 1) for a in measured["aligned"]]
            gain = median(s["ms"] for s in serial) / median(ours)
            found["hugging_face_serial_ms"] = median(s["ms"] for s in serial)
            found["gain_over_hugging_face_serial"] = gain
            self._say(
                f"  Hugging Face, one candidate a pass: {1e3 / found['hugging_face_serial_ms']:.1f} tokens/s; "
                f"aligned is × {gain:.1f}"
            )
        return found

    def _plain_ms(self, name: str) -> float:
        """Time that a peer takes to as many plain tokens as an answer on an instrument has after its first."""
        answer = self._open[name].ask("decode", context=self._contexts[0], tokens=self._args.tokens - 1)
        return float(sum(answer["ms"]))

    def _in_turns(
        self, measure: Callable[[Contestant], float], label: str, most: int | None = None, eager: bool = True
    ) -> dict[str, Any]:
        """Median and quartiles by contestant; eager: Hugging Face takes part, which takes minutes for long contexts."""
        rounds = min(self._args.rounds, most or self._args.rounds)
        values: dict[str, list[float]] = {name: [] for name in self._open if eager or name != "hugging-face"}
        sittings = min(SITTINGS, rounds)
        for sitting in range(sittings):
            if sitting:
                self._start_anew([name for name in values if name != "hugging-face"], sitting)
            for turn in range(rounds // sittings + (sitting < rounds % sittings) + 1):
                for name in values:
                    if name == "hugging-face" and (sitting or turn > 2):
                        continue
                    value = measure(self._open[name])
                    if turn:  # the first fills caches and makes bindings
                        values[name].append(value)
                    time.sleep(0.05)  # threads of the one before still spin
        found: dict[str, Any] = {name: {"ms": spread(v)} for name, v in values.items()}
        for name in found:
            count = len(values[name])
            ratios = [a / b for a, b in zip(values["mara"][:count], values[name], strict=True)]
            found[name]["mara_to_it"] = spread(ratios)
            self._say(
                f"{label}{name:<14}{_bracketed(found[name]['ms'])}"
                + ("" if name == "mara" else f"   mara is × {_bracketed(found[name]['mara_to_it'])} of it")
            )
        return found

    def _ratio(self, value: float, name: str) -> str:
        return "" if name == "mara" else f"mara is × {value:.2f} of it"

    def _start_anew(self, names: list[str], first: int) -> None:
        """End these contestants and start them again, another one first."""
        for name in names:
            self._open[name].close()
        for name in names[first % len(names) :] + names[: first % len(names)]:
            self._open[name] = self._start(name, self._stack)

    def _start(self, name: str, stack: ExitStack) -> Contestant:
        try:
            contestant = Contestant(name, self._commands[name])
        except OSError as error:
            raise OptionError(f"--peer {name}: cannot run {self._commands[name][0]}: {error.strerror}") from None
        stack.callback(contestant.close)
        return contestant

    def _say(self, line: str) -> None:
        if not self._args.quiet:
            print(line, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high, "count": len(values)}


def _bracketed(value: dict[str, float]) -> str:
    return f"{value['median']:.3g} [{value['low']:.3g}–{value['high']:.3g}]"


def cores() -> int:
    """Physical cores that this process may use; logical ones where the system does not tell."""
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    try:
        return len({(CPUS / f"cpu{n}/topology/thread_siblings_list").read_text(encoding="ascii") for n in logical})
    except OSError:
        return len(logical)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    packages: dict[str, str | None] = {}
    for name in ("mara-deploy", "onnxruntime", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory[0] / 2**20, 1) if memory else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": packages,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main())
