"""The aligned decode loop: token-level accept or reject beside a frozen LLM.

Source: MARA (arXiv 2505.19743); docs/method.md is the specification. At each position the LLM's next-token
distribution gives a list of candidates; each is run through the LLM after the same prefix, and the agent looks
at its last hidden state. The first accepted candidate is emitted, and its logits and KV entry carry on the
sequence, so that accepting the LLM's first choice costs what plain greedy decoding costs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mara_runtime.candidates import Candidates, sample, select
from mara_runtime.config import DecodeConfig
from mara_runtime.engine import Engine, Forward, check_finite
from mara_runtime.errors import NumericsError
from mara_runtime.stats import Stats
from mara_runtime.strategies import choose, examination_order

PREFILL_ROWS = 256
"""Rows of one prefill pass: scores and mask of a longer one grow to gigabytes."""


@dataclass(frozen=True)
class Step:
    """One emitted token and how it came about."""

    token: int
    position: int
    """of the token in the sequence, prompt included, from 0"""
    candidates: Candidates
    """by LM rank; in plain greedy decoding the best alone"""
    rank: int
    """LM rank of the token among the candidates, from 1"""
    margins: dict[int, float]
    """{LM rank: margin} of the examined candidates; empty when there was nothing to decide"""
    forced: bool
    """all candidates were rejected"""


@dataclass(frozen=True)
class _Examined:
    rank: int  # 0-based LM rank
    margin: float
    slot: int  # where its KV entry lies
    logits: NDArray[np.float32]  # (V,) of the position after it


def decode(
    engine: Engine,
    prompt: Sequence[int],
    config: DecodeConfig,
    *,
    fallback: str,
    eos_token_ids: Set[int],
    limit: int,
    stats: Stats,
) -> Iterator[Step]:
    """Emit up to `limit` tokens after `prompt`, ending with an end-of-sequence id if one is chosen.

    prompt: token ids, at least one. The caller sees to it that prompt and answer, and one spare slot a candidate,
    fit into the engine's cache. `stats` is filled as the loop goes. Raises NumericsError, naming the position.
    """
    try:
        rng = np.random.default_rng(config.seed)
        clock = _Clock()
        logits = prefill(engine, prompt, PREFILL_ROWS)
        stats.prompt_tokens = len(prompt)
        stats.prefill_ms = clock.lap_ms()
        length = len(prompt)  # tokens of the sequence whose KV entries are in slots 0 … length-1
        while True:
            step, following = _emit(engine, logits, length, config, fallback, rng, stats)
            stats.tokens += 1
            stats.decode_ms += clock.lap_ms()
            yield step
            clock.lap_ms()  # the caller's time
            if step.token in eos_token_ids or stats.tokens >= limit:
                return
            if following is None:  # the token was not run yet: there was nothing to examine
                following = _forward(engine, [step.token], [length], length, [0], stats).logits[0]
            logits = following
            length += 1
    except NumericsError:
        engine.clear()  # a NaN left in a slot would reach the next answer
        raise


def prefill(engine: Engine, prompt: Sequence[int], width: int) -> NDArray[np.float32]:
    """Fill slots 0 … len(prompt)-1, `width` rows a pass, and return the logits (V,) after the last token.

    Raises NumericsError, naming the first position that is not finite.
    """
    for start in range(0, len(prompt), width):
        chunk = prompt[start : start + width]
        positions = range(start, start + len(chunk))
        last = start + len(chunk) == len(prompt)
        out = engine.forward(chunk, positions, start, [len(chunk) - 1] if last else [])
        try:
            check_finite(out, positions, chunk)
        except NumericsError:
            if width > 1:  # a NaN reaches earlier rows of its pass: find where it comes from
                engine.clear()
                prefill(engine, prompt, width=1)
            raise
    logits: NDArray[np.float32] = out.logits[0]
    return logits


def _emit(
    engine: Engine,
    logits: NDArray[np.float32],
    length: int,
    config: DecodeConfig,
    fallback: str,
    rng: np.random.Generator,
    stats: Stats,
) -> tuple[Step, NDArray[np.float32] | None]:
    """Choose the token at position `length`; also the logits after it, if it was run, its KV entry in place."""
    if not config.align:
        greedy = not config.sample
        candidates = select(logits, 1 if greedy else config.top_k, config.top_p)
        pick = 0 if greedy else sample(candidates, config.temperature, rng)
        return Step(int(candidates.ids[pick]), length, candidates, pick + 1, {}, False), None

    candidates = select(logits, config.top_k, config.top_p)
    stats.candidate_counts[len(candidates)] += 1
    if len(candidates) == 1:
        return Step(int(candidates.ids[0]), length, candidates, 1, {}, False), None

    examined = _examine(engine, candidates, length, config, stats)
    choice = choose(config.strategy, [e.margin for e in examined], config.threshold, rng)
    if choice is None:
        pick = 0 if fallback == "first" else len(candidates) - 1
        chosen = next(e for e in examined if e.rank == pick)
    else:
        chosen = examined[choice]
        if config.strategy == "top1":
            examined = examined[: choice + 1]  # the sequential procedure stops here
    following = chosen.logits.copy()
    if chosen.slot != length:
        engine.move(chosen.slot, length)

    stats.decisions += 1
    stats.examined += len(examined)
    for e in examined:
        stats.saw_margin(abs(e.margin - config.threshold))
    if choice is None:
        stats.forced += 1
    else:
        stats.accepted_rank[chosen.rank + 1] += 1
    margins = {e.rank + 1: e.margin for e in examined}
    step = Step(int(candidates.ids[chosen.rank]), length, candidates, chosen.rank + 1, margins, choice is None)
    return step, following


def _examine(
    engine: Engine, candidates: Candidates, length: int, config: DecodeConfig, stats: Stats
) -> list[_Examined]:
    """Ask the agent about the candidates in order: all of them, or with top1 up to the pass that has an accepted one.

    Every candidate stands at position `length`, sees the prefix and itself, and has a slot of its own, so the
    entries of earlier passes stay whole until the decision is made.
    """
    order = examination_order(config.order, len(candidates))
    width = 1 if config.schedule == "one-by-one" else len(order)
    examined: list[_Examined] = []
    keep = width < len(order)  # a later pass may overwrite what an earlier one returned
    for start in range(0, len(order), width):
        ranks = order[start : start + width]
        tokens = [int(candidates.ids[r]) for r in ranks]
        slot = length + start
        out = _forward(engine, tokens, [length] * len(ranks), slot, range(len(ranks)), stats)
        margins = engine.margins(out.hidden).astype(np.float64)  # as the threshold is: they are compared exactly
        if not np.isfinite(margins).all():
            raise NumericsError(f"the agent's margin at position {length} is not finite: its weights are at fault")
        for row, rank in enumerate(ranks):
            logits = out.logits[row].copy() if keep else out.logits[row]
            examined.append(_Examined(rank, float(margins[row]), slot + row, logits))
        if config.strategy == "top1" and (margins > config.threshold).any():
            break
    return examined


def _forward(
    engine: Engine,
    tokens: Sequence[int],
    positions: Sequence[int],
    slot: int,
    rows: Sequence[int],
    stats: Stats,
) -> Forward:
    out = engine.forward(tokens, positions, slot, rows)
    stats.forwards += 1
    stats.rows += len(tokens)
    check_finite(out, positions, tokens)
    return out


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        """Milliseconds since the previous lap."""
        now = time.perf_counter()
        elapsed, self._last = (now - self._last) * 1e3, now
        return elapsed
