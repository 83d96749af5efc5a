"""Sessions of the decode loop over a table, made by hand or at random: schedules and drafts that spare nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES, DecodeConfig
from mara_runtime.decode import Request, Session, decode
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import Fixed, PassContext, PassPlan, Schedule
from mara_runtime.schedule.cost import Cost
from mara_runtime.schedule.drafts import NO_DRAFT, Draft, DraftSource, NGrams
from mara_runtime.stats import Stats, Step
from mara_runtime.tensors import DRAFT_ROWS
from tests.table_engine import TableEngine
from tests.unit import helpers

ONE_BY_ONE, TOGETHER = Fixed(1), Fixed(None)
NAMED: dict[str, Callable[[], Schedule]] = {
    "adaptive": lambda: Adaptive(helpers.COST),
    "one-by-one": lambda: ONE_BY_ONE,
    "together": lambda: TOGETHER,
}


class Chat:
    """An engine and what outlives its answers."""

    def __init__(self, engine: TableEngine, schedule: Schedule = ONE_BY_ONE, drafts: DraftSource | None = None) -> None:
        self.engine, self.session = engine, Session(engine.cache, schedule, drafts)
        if isinstance(drafts, Guesser):
            drafts.chat = self

    @property
    def cached(self) -> list[int]:
        return self.engine.cache.tokens

    def decode(
        self,
        prompt: Sequence[int],
        config: DecodeConfig,
        stats: Stats,
        fallback: str = "first",
        eos: set[int] | None = None,
        limit: int | None = None,
    ) -> Iterator[Step]:
        if config.agents:
            self.engine.use([*config.agents])
        request = Request(prompt, config, fallback, eos or set(), limit or config.max_new_tokens)
        return decode(self.engine, self.session, request, stats)


def run(
    chat: TableEngine | Chat,
    prompt: Sequence[int],
    config: DecodeConfig,
    *,
    schedule: Schedule = ONE_BY_ONE,
    drafts: DraftSource | None = None,
    **request: Any,
) -> tuple[list[Step], Stats]:
    stats = Stats()
    chat = chat if isinstance(chat, Chat) else Chat(chat, schedule, drafts)
    return list(chat.decode(prompt, config, stats, **request)), stats


# ── schedules and drafts that spare nothing ──────────────────────────────────────────────────────────────────────────


class Scripted:
    """Plans as written, whatever it costs: (candidates, drafted tokens) of one pass after the other."""

    def __init__(self, plans: Sequence[tuple[int, int]]) -> None:
        self._plans = plans
        self._turn = 0

    def plan(self, context: PassContext) -> PassPlan:
        candidates, drafted = self._plans[self._turn % len(self._plans)]
        self._turn += 1
        left = len(context.probabilities) - len(context.margins)
        return PassPlan(min(candidates, left), min(drafted, len(context.draft.tokens)))

    def update(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """Nothing."""


class Watched:
    """Another schedule; checks that it is asked what the protocol promises."""

    def __init__(self, inner: Schedule) -> None:
        self.inner = inner
        self.chat: Chat
        self.config: DecodeConfig
        self.fallback: str
        self.drafted = 0
        self.examined = (-1, 0)
        """position, and how many of its candidates were examined"""
        self.learned: list[tuple[list[float], list[float]]] = []
        """(probabilities, margins) of every decision"""

    def begin(self, chat: Chat, config: DecodeConfig, fallback: str) -> None:
        self.chat, self.config, self.fallback = chat, config, fallback
        self.drafted, self.examined = 0, (-1, 0)
        self.learned = []

    def plan(self, context: PassContext) -> PassPlan:
        count, seen, config = len(context.probabilities), len(context.margins), self.config
        assert context.length == len(self.chat.cached)
        assert count != 1
        if count:
            assert context.probabilities.sum() == pytest.approx(1.0)
            assert seen < count
            if config.order == "ranked":
                assert (np.diff(context.probabilities) <= 0).all()
            assert context.exhaustive == (config.strategy != "top1")
            assert context.exhaustive or all(margin <= config.threshold for margin in context.margins)
            position, examined = self.examined
            assert seen == examined if position == context.length else seen <= 1  # one may have been drafted
            first = {"ranked": 0, "best_last": 1, "reversed": count - 1}[config.order]
            again = first == {"first": 0, "last": count - 1}[self.fallback]
            assert context.rerun_fallback == (again and config.strategy != "random")
        assert (
            len(context.draft.tokens)
            == len(context.draft.chances)
            <= (DRAFT_ROWS if config.draft is None else config.draft)
        )
        assert context.draft == NO_DRAFT or not seen
        plan = self.inner.plan(context)
        assert min(1, count) <= plan.candidates <= count - seen
        assert 0 <= plan.drafted <= len(context.draft.tokens)
        self.drafted += plan.drafted
        self.examined = (context.length, seen + plan.candidates)
        return plan

    def update(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        assert threshold == self.config.threshold
        self.learned.append((probabilities.tolist(), [float(margin) for margin in margins]))
        self.inner.update(probabilities, margins, threshold)


class Guesser:
    """A draft source that records its calls. guess: takes the index in the text of the first token to guess."""

    def __init__(self, guess: Callable[[int], Sequence[int]]) -> None:
        self.guess = guess
        self.text: list[int] = []
        self.choices: list[bool] = []
        self.asked: list[tuple[int, int, int]] = []
        """(tokens heard so far, `following`, `most`) of each draft"""
        self.chat: Chat | None = None

    def begin(self, tokens: Sequence[int]) -> None:
        self.text, self.choices = [int(token) for token in tokens], []

    def extend(self, token: int, first_choice: bool) -> None:
        self.text.append(token)
        self.choices.append(first_choice)

    def draft(self, following: int, most: int) -> Draft:
        assert self.chat is not None
        assert 0 <= most <= DRAFT_ROWS
        self.asked.append((len(self.text), following, most))
        tokens = tuple(self.guess(len(self.chat.cached) + 1))[:most]
        return Draft(tokens, (0.75,) * len(tokens))


# ── any table, any option ────────────────────────────────────────────────────────────────────────────────────────────

VOCAB = 9
MOST_PROMPT = 30
ALONE = {helpers.AGENT: 1.0}
MIXES = ALONE, ALONE, {helpers.AGENT: 1.0, "other": -0.5}, {"other": 1.0, helpers.AGENT: 0.0}
CASES = 250 * settings.default.max_examples // 100
"""Sessions of a part: more of them with `--hypothesis-profile=search`."""


@dataclass(frozen=True)
class Draw:
    """Draws whatever a case is made of, from `random` or from hypothesis: a whole number between two, both included."""

    whole: Callable[[int, int], int]

    def one(self, *options: Any) -> Any:
        return options[self.whole(0, len(options) - 1)]

    def some(self, least: int, most: int, item: Callable[[], Any]) -> list[Any]:
        return [item() for _ in range(self.whole(least, most))]

    def token(self) -> int:
        return self.whole(0, VOCAB - 1)


@dataclass(frozen=True)
class Guessing:
    """How to guess. `text` below is what the sequential procedure makes of the prompt."""

    kind: str
    """none; ngrams; random: whatever `material` says; truth: the text; fickle: the text, every third token another"""
    material: list[list[int]]

    def source(self) -> DraftSource | None:
        if self.kind == "none":
            return None
        return NGrams() if self.kind == "ngrams" else Guesser(lambda index: ())

    def guess(self, text: list[int]) -> Callable[[int], Sequence[int]]:
        if self.kind == "random":
            return lambda index: self.material[index % len(self.material)]
        wrong = 3 if self.kind == "fickle" else len(text) + 1
        changed = [(token + (index % wrong == wrong - 1)) % VOCAB for index, token in enumerate(text)]
        return lambda index: changed[index:]


@dataclass(frozen=True)
class Turn:
    """One prompt of a session, and how its answer is made."""

    prompt: str
    """what it has to do with what went before"""
    drawn: list[int]
    shared: int
    config: DecodeConfig
    fallback: str
    eos: set[int]
    prefill_rows: int
    taken: int | None
    """the answer is left after so many tokens; None: it is not"""

    def prompt_after(self, before: list[int], cached_before: list[int]) -> list[int]:
        return {
            "new": self.drawn,
            "shared": before[: self.shared] + self.drawn,
            "same": before,
            "shorter": before[: self.shared],
            "cached": cached_before,
            "part of the cached": cached_before[: self.shared],
            "cached and more": cached_before + self.drawn,
        }[self.prompt][:MOST_PROMPT] or self.drawn


def a_table(draw: Draw) -> helpers.Lookup:
    return helpers.hash_table(
        seed=draw.whole(0, 2**32),
        vocab_size=VOCAB,
        levels=draw.one(3, 8, 256),
        peak=draw.one(0.0, 2.0, 6.0, 6.0, 16.0, 40.0),
        memory=draw.one(None, None, None, 1, 2, 3),
    )


def a_config(draw: Draw, kind: str) -> DecodeConfig:
    """kind: any; verified: aligned as drafts need it; greedy; sampled."""
    options: dict[str, Any] = {
        "top_k": draw.whole(1, VOCAB + 2),
        "top_p": draw.one(0.0, 0.5, 0.8, 0.95, 0.95, 0.999, 1.0, 1.0),
        "max_new_tokens": draw.one(1, 2, 3, 5, 8, 12, 12, 24),
        "draft": draw.one(None, None, None, 0, draw.whole(1, DRAFT_ROWS)),
        "seed": draw.whole(0, 1000),
    }
    if kind in ("any", "verified"):
        options["agents"] = draw.one(*MIXES)
        options["threshold"] = draw.one(-2.5, -0.75, -0.5, 0.0, 0.0, 0.25, 0.7, 1.0, 9.0)
    if kind == "any":
        options |= {"strategy": draw.one(*STRATEGIES), "order": draw.one(*ORDERS)}
    if kind == "sampled":
        options |= {"sample": True, "temperature": draw.one(0.3, 1.0, 3.0)}
    return DecodeConfig(align=kind in ("any", "verified"), **options)


def a_turn(draw: Draw, first: bool) -> Turn:
    kinds = ("new", "shared", "same", "shorter", "cached", "part of the cached", "cached and more", "cached and more")
    return Turn(
        prompt="new" if first else draw.one(*kinds),
        drawn=draw.some(1, 11, draw.token),
        shared=draw.whole(0, 20),
        config=a_config(draw, draw.one("any", "any", "verified", "verified", "verified", "greedy", "sampled")),
        fallback=draw.one(*FALLBACKS),
        eos=set(draw.some(0, draw.one(0, 0, 1, 2), draw.token)),
        prefill_rows=draw.whole(1, 6),
        taken=draw.one(None, None, draw.whole(0, 8)),
    )


def some_cost(row: float, more: float, head: float) -> Cost:
    """Milliseconds of a row, of every row more, of a row through the head."""
    return Cost((1, 128), (1, 2, 8), ((row, row + more, row + 7 * more), (2 * row,) * 3), (1, 4), (head, 4 * head))


def a_schedule(draw: Draw) -> Schedule:
    kind = draw.one("fixed", "fixed", "adaptive", "scripted", "scripted")
    if kind == "fixed":
        return Fixed(draw.one(None, 1, 1, 2, 3, 4), draw.one(0, 0, 3, draw.whole(1, DRAFT_ROWS)))
    if kind == "adaptive":
        return Adaptive(some_cost(*(draw.one(0.0, 0.1, 0.5, 1.0, 4.0) for _ in range(3))))
    return Scripted(draw.some(1, 7, lambda: (draw.whole(1, VOCAB + 1), draw.whole(0, DRAFT_ROWS))))


def a_guessing(draw: Draw) -> Guessing:
    return Guessing(
        draw.one("none", "ngrams", "random", "truth", "truth", "fickle"),
        draw.some(1, 4, lambda: draw.some(0, DRAFT_ROWS + 1, draw.token)),
    )


# ── a table written by hand: candidates 2, 3, 4 after the prompt, then 5 and 6, then 7 alone ──────────────────────────

PROMPT = [1]
FIRST = {2: 3.0, 3: 2.0, 4: 1.0}
SECOND = {5: 1.0, 6: 0.5}
WIDE: dict[str, Any] = {"top_k": 8, "top_p": 1.0}
ACCEPT = {(2,): 1.0, (2, 5): 1.0}
"""Margins that give 2 5 7 7 7 …"""


def hand(margins: dict[tuple[int, ...], float]) -> helpers.Lookup:
    """Margins by what follows the prompt."""
    logits = {(1,): FIRST, (1, 2): SECOND, (1, 3): SECOND, (1, 4): SECOND}
    return helpers.scripted(logits, {(1, *after): margin for after, margin in margins.items()})
