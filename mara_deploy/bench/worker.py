"""A bundle as a contestant, see protocol.py.

Further requests: `width` (the cost of rows) and `profile` (ways to decode, in turns, with synthetic acceptance).
`together` takes a profile and a way to decode besides.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

from mara_deploy.bench.protocol import command_line, random_tokens, serve
from mara_deploy.bench.synthetic import Profile, Script, SyntheticEngine
from mara_deploy.commands.process import limit_memory
from mara_runtime.batch import Batcher
from mara_runtime.bundle import Bundle
from mara_runtime.config import DecodeConfig
from mara_runtime.decode import Request, Session, decode
from mara_runtime.engines import open_engine
from mara_runtime.engines.base import Engine
from mara_runtime.errors import MaraError
from mara_runtime.passes import SHARED_PREFILL_ROWS
from mara_runtime.schedule.acceptance import Acceptance
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import Fixed, Schedule
from mara_runtime.schedule.calibrate import measure
from mara_runtime.schedule.cost import Cost
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.stats import Stats, Step
from mara_runtime.tensors import top_tokens

PLAIN = DecodeConfig(align=False, draft=0, schedule="one-by-one")


class Subject:
    """An open bundle."""

    def __init__(self, folder: str, engine: str, threads: int | None) -> None:
        self.bundle = Bundle.open(folder, verify=False)
        self.engine, _ = open_engine(self.bundle, engine, threads)
        self._agents = {agent.name: 1.0 for agent in self.bundle.manifest.agents[:1]}
        self.engine.use(tuple(self._agents))
        self._noise = self.bundle.manifest.mixed_noise(self._agents)
        self._learned: dict[str, tuple[Acceptance, NGrams]] = {}

    @property
    def capacity(self) -> int:
        """Maximum number of tokens, prompt and answer."""
        return self.bundle.manifest.max_context

    def describe(self) -> dict[str, Any]:
        """Engine and versions, and how many conversations it holds at once."""
        versions = {"python": platform.python_version()}
        return {**self.engine.describe(), "versions": versions, "conversations": self.engine.places.most}

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """Plain greedy steps of the decode loop."""
        times = [time.perf_counter() for _ in self._plain(context, tokens + 1)]
        return {"ms": [(b - a) * 1e3 for a, b in pairwise(times)]}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """The decode loop up to its first token."""
        self.engine.cache.tokens.clear()
        steps = self._plain(tokens, 1)
        started = time.perf_counter()
        next(steps)
        return {"ms": (time.perf_counter() - started) * 1e3}

    def width(self) -> dict[str, Any]:
        """The cost of rows on this machine."""
        return asdict(self._cost)

    @cached_property
    def _cost(self) -> Cost:
        return measure(self.engine, self.bundle.manifest.max_candidates)

    def profile(
        self, profile: dict[str, Any], context: int, tokens: int, ways: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Decode the same script in several ways in turn; {way: {ms, engine_ms, expected_ms, stats, continued}}."""
        script = self._script(profile, context + tokens + 1)
        answers = {}
        for way, options in ways.items():
            config = DecodeConfig(**options)
            acceptance, drafts = self._learned_in(profile, way)
            engine = SyntheticEngine(self.engine, [script])
            schedule = _schedule(config, self._cost, acceptance)
            session = Session(engine.cache, schedule, None if config.draft == 0 else drafts, self._noise)
            stats = Stats()
            prompt = script.prompt(context)
            emitted = [step.token for step in _steps(engine, session, prompt, config, tokens, stats)]
            answers[way] = {
                "ms": stats.decode_ms,
                "engine_ms": stats.engine_ms,
                "expected_ms": engine.expected_ms(self._cost, context, stats.forwards),
                "continued": continued_share(prompt, emitted),
                "stats": stats.to_json(),
            }
        return answers

    def together(
        self, conversations: int, context: int, tokens: int, profile: dict[str, Any], way: str, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Decode texts of a profile at once, a seed each, while all of them are there; see protocol.py."""
        limit = min(3 * tokens + 2 * context // SHARED_PREFILL_ROWS * conversations, self.capacity - context)
        scripts = [
            self._script({**profile, "seed": 1000 * profile["seed"] + place}, context + limit + 1)
            for place in range(conversations)
        ]
        config = DecodeConfig(**options)
        if config.align:
            config = replace(config, agents=self._agents)
        engine = SyntheticEngine(self.engine, scripts)
        schedule = _schedule(config, self._cost, self._learned_in(profile, f"{conversations} {way}")[0])
        with engine.places.lock:
            engine.places.open(conversations)
            batcher = Batcher(engine, partial(self._session, engine, schedule), share=False)
            texts = [
                batcher.submit(Request(script.prompt(context), config, "first", frozenset(), limit))
                for script in scripts
            ]
            while not all(text.stats.tokens or text.done for text in texts):
                batcher.step()
            before, started = sum(text.stats.tokens for text in texts), time.perf_counter()
            emitted = 0
            while emitted < tokens * conversations and not any(text.done for text in texts):
                batcher.step()
                emitted = sum(text.stats.tokens for text in texts) - before
            ms = (time.perf_counter() - started) * 1e3
            for text in texts:
                batcher.cancel(text)
        if error := next((text.error for text in texts if text.error is not None), None):
            raise error
        if not emitted:
            raise MaraError(
                f"{conversations} conversations of {context} tokens: the bundle has no room for what the first decodes "
                "until the last begins; take a smaller --context"
            )
        return {"tokens": emitted, "ms": ms}

    def _session(self, engine: Engine, schedule: Schedule, place: int, request: Request) -> Session:
        return Session(engine.places[place], schedule, noise=self._noise, place=place)

    def _script(self, profile: dict[str, Any], positions: int) -> Script:
        manifest = self.bundle.manifest
        vocab_size = manifest.model.shape.vocab_size
        return Script(Profile(**profile), positions, vocab_size, top_tokens(manifest.max_candidates, vocab_size))

    def _learned_in(self, profile: dict[str, Any], way: str) -> tuple[Acceptance, NGrams]:
        """What outlives an answer on a profile, for each way to decode."""
        return self._learned.setdefault(f"{profile | {'seed': 0}} {way}", (Acceptance(), NGrams()))

    def _plain(self, context: int, tokens: int) -> Iterator[Step]:
        """Greedy steps after a random prompt of `context` tokens."""
        prompt = random_tokens(context, self.bundle.manifest.model.shape.vocab_size)
        return _steps(self.engine, Session(self.engine.cache, Fixed(1)), prompt, PLAIN, tokens, Stats())


def _steps(
    engine: Engine, session: Session, prompt: list[int], config: DecodeConfig, tokens: int, stats: Stats
) -> Iterator[Step]:
    return decode(engine, session, Request(prompt, config, "first", frozenset(), tokens), stats)


def _schedule(config: DecodeConfig, cost: Cost, acceptance: Acceptance) -> Schedule:
    if config.schedule == "adaptive" and config.align:
        return Adaptive(cost, acceptance)
    return Fixed(None if config.schedule == "together" else 1)


def continued_share(prompt: list[int], tokens: list[int]) -> float:
    """Share of tokens that follow the two before them as they did the last time those two occurred."""
    after: dict[tuple[int, int], int] = {}
    hits = 0
    text = [*prompt, *tokens]
    for i in range(2, len(text)):
        pair = (text[i - 2], text[i - 1])
        hits += i >= len(prompt) and after.get(pair) == text[i]
        after[pair] = text[i]
    return hits / max(1, len(tokens))


def main() -> None:
    """Entry point of the process."""
    parser = command_line()
    parser.add_argument("--engine", default="auto")
    args = parser.parse_args()
    limit_memory(args.engine, args.threads)
    serve(lambda: Subject(args.model, args.engine, args.threads), plain_errors=(MaraError,))


if __name__ == "__main__":
    main()
