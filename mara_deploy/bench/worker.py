"""A bundle under measurement, in a process of its own: two engines in one process would wait on each other's threads.

Reads JSON lines on standard input and answers each with one on standard output, as every contestant does:

    {"do": "decode", "context": C, "tokens": N}     {"ms": [a step each]}, plain greedy
    {"do": "prefill", "tokens": N}                  {"ms": time}
    {"do": "memory"}                                {"peak_bytes": n, "current_bytes": n}

and, of a bundle alone: `width` (the cost of rows), `profile` (plain against aligned on the instrument).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mara_deploy.bench.profile import Instrument, Profile, Script
from mara_runtime.bundle import Bundle
from mara_runtime.calibrate import measure
from mara_runtime.config import DecodeConfig
from mara_runtime.decode import Noise, Session, Step, decode
from mara_runtime.drafts import NGrams
from mara_runtime.engine import Engine, open_engine
from mara_runtime.errors import MaraError
from mara_runtime.schedule import Acceptance, Adaptive, Cost, Fixed, Schedule
from mara_runtime.stats import Stats
from mara_runtime.tensors import top_tokens

PLAIN = DecodeConfig(align=False, draft=0, schedule="one-by-one")


class Subject:
    """An open bundle."""

    def __init__(self, folder: str, engine: str, threads: int | None) -> None:
        self._bundle = Bundle.open(folder, verify=False)
        self._engine, _ = open_engine(self._bundle, engine, threads)
        self._held: list[int] = []
        self._cost: Cost | None = None
        self._learned: dict[str, tuple[Acceptance, NGrams]] = {}

    @property
    def capacity(self) -> int:
        """Tokens of prompt and answer, at most."""
        return self._bundle.manifest.max_context

    def describe(self) -> dict[str, Any]:
        """What is measured."""
        return {"name": "mara-deploy", **self._engine.describe()}

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """Steps of plain greedy decoding after `context` tokens."""
        session = Session(self._engine, Fixed(1), held=self._held)
        times = [time.perf_counter() for _ in _steps(session, self._prompt(context), PLAIN, tokens + 1, Stats())]
        return {"ms": [(b - a) * 1e3 for a, b in pairwise(times)]}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Time to the first token of a prompt that nothing is held of."""
        self._held.clear()
        session = Session(self._engine, Fixed(1), held=self._held)
        started = time.perf_counter()
        next(_steps(session, self._prompt(tokens), PLAIN, 1, Stats()))
        return {"ms": (time.perf_counter() - started) * 1e3}

    def width(self) -> dict[str, Any]:
        """The cost of rows on this machine."""
        self._cost = measure(self._engine, self._bundle.manifest.max_candidates)
        self._held.clear()
        cost = self._cost
        return {
            "contexts": cost.contexts,
            "widths": cost.widths,
            "body_ms": cost.body_ms,
            "heads": cost.heads,
            "head_ms": cost.head_ms,
        }

    def profile(
        self, profile: dict[str, Any], context: int, tokens: int, ways: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """The same script decoded in several ways in turn; {way: {ms, expected_ms, stats, continued}}."""
        if self._cost is None:
            self.width()
        assert self._cost is not None
        cost = self._cost
        what = Profile(**profile)
        manifest = self._bundle.manifest
        vocab_size = manifest.model.shape.vocab_size
        top = top_tokens(manifest.max_candidates, vocab_size)
        script = Script(what, context + tokens + 1, vocab_size, top)
        answers = {}
        for way, options in ways.items():
            config = DecodeConfig(**options)
            key = f"{profile | {'seed': 0}} {way}"
            acceptance, drafts = self._learned.setdefault(key, (Acceptance(), NGrams()))
            recorder = Recorder(Instrument(self._engine, script))
            session = Session(
                recorder,
                _schedule(config, cost, acceptance),
                None if config.draft == 0 else drafts,
                Noise.of(manifest.noise),
                self._held,
            )
            stats = Stats()
            prompt = script.prompt(context)
            emitted = [step.token for step in _steps(session, prompt, config, tokens, stats)]
            answers[way] = {
                "ms": stats.decode_ms,
                "engine_ms": stats.engine_ms,
                "expected_ms": recorder.expected_ms(cost, context, stats.forwards),
                "continued": continued_share(prompt, emitted),
                "stats": stats.to_json(),
            }
        return answers

    def memory(self) -> dict[str, Any]:
        """Of this process, since its start."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak, current = (int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmHWM", "VmRSS"))  # type: ignore[index]
        return {"peak_bytes": peak * 1024, "current_bytes": current * 1024}

    def _prompt(self, length: int) -> list[int]:
        vocab_size = self._bundle.manifest.model.shape.vocab_size
        tokens: list[int] = np.random.default_rng(length).integers(0, vocab_size, length).tolist()
        return tokens


class Recorder:
    """An engine that notes the size of every pass. See `Engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._passes: list[tuple[int, int]] = []

    def run(self, work: Any) -> Any:
        """See `Engine.run`."""
        out = self._engine.run(work)
        self._passes.append((len(work.tokens), len(out.rows)))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def heads(self) -> list[int]:
        """Rows through the LM head, a pass each."""
        return [heads for _, heads in self._passes]

    def expected_ms(self, cost: Cost, context: int, forwards: int) -> float:
        """What the last so many passes, those after the prompt, should have cost by the measured curve."""
        rows, heads = cost.rows_ms(context), cost.heads_ms()
        return float(sum(rows[r] + heads[h] for r, h in self._passes[len(self._passes) - forwards :]))


def _steps(session: Session, prompt: list[int], config: DecodeConfig, tokens: int, stats: Stats) -> Iterator[Step]:
    return decode(session, prompt, config, fallback="first", eos_token_ids=frozenset(), limit=tokens, stats=stats)


def _schedule(config: DecodeConfig, cost: Cost, acceptance: Acceptance) -> Schedule:
    if config.schedule == "adaptive" and config.align:
        return Adaptive(cost, acceptance)
    return Fixed(None if config.schedule == "together" else 1)


def continued_share(prompt: list[int], tokens: list[int]) -> float:
    """Share of the tokens that follow the two before them as they did the last time those occurred."""
    after: dict[tuple[int, int], int] = {}
    hits = 0
    text = [*prompt, *tokens]
    for i in range(2, len(text)):
        pair = (text[i - 2], text[i - 1])
        hits += i >= len(prompt) and after.get(pair) == text[i]
        after[pair] = text[i]
    return hits / max(1, len(tokens))


def serve(subject: Any, about: dict[str, Any]) -> None:
    """Answer requests until the input ends."""

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), flush=True)

    answer({**about, "ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., dict[str, Any]] = getattr(subject, request.pop("do"))
        try:
            answer(method(**request))
        except Exception as error:  # whatever happens in a contestant is reported, not raised
            answer({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    try:
        subject = Subject(args.bundle, args.engine, args.threads)
    except MaraError as error:
        print(json.dumps({"error": str(error)}))
        return
    serve(subject, {**subject.describe(), "versions": {"python": platform.python_version()}})


if __name__ == "__main__":
    main()
