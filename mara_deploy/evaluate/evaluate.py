"""The main path of an evaluation: answers, scores, comparison.

    answers of every contestant  →  scores of every answer  →  the best of several  →  aligned against each baseline

Answers and scores are kept in the output folder as they come (`mara_deploy.evaluate.store`); a second run with the same
settings computes what is missing, and gives the same result as one that was not interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mara_deploy.evaluate.answers import Answer, Contestant, total_stats
from mara_deploy.evaluate.compare import Bootstrap, Preference, number_units, preference
from mara_deploy.evaluate.judge import Judge, remember, slug
from mara_deploy.evaluate.store import Store
from mara_deploy.evaluate.text_stats import TextStats, text_stats, words
from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import Combined
from mara_runtime.errors import MaraError

_AT_A_TIME = 16
"""Prompts whose answers are scored together: a batch for a model, and one update of the live count."""


@dataclass(frozen=True)
class Side:
    """One contestant's answers to N prompts, with their scores."""

    name: str
    answers: list[Answer]
    """(N,) those that compete"""
    combined: list[float]
    """(N,) weighted sums of the scores"""
    each: dict[str, list[float]]
    """{score: (N,) its own values}"""
    text: TextStats
    counters: dict[str, Any] | None
    """of everything decoded, samples that were not the best included; None: not a bundle's"""


@dataclass(frozen=True)
class Comparison:
    """The aligned answers against one baseline."""

    combined: Preference
    """under the combined score"""
    each: dict[str, Preference]
    """under each score alone, in the direction of its weight"""
    unseen: Preference | None
    """combined, without the prompts that also occur in the training set; None: no such set, or no prompt is left"""
    identical: int
    """prompts to which both gave the same text: ties by definition"""
    by_length: dict[str, Preference]
    """combined, on the prompts whose aligned answer is longer, shorter or equally long in words; empty ones left out"""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    prompts: Sequence[Prompt]
    aligned: Side
    baselines: dict[str, Side]
    comparisons: dict[str, Comparison]
    weights: dict[str, float]
    """{score: its weight in the combined one}"""
    seen: frozenset[str] = field(default_factory=frozenset)
    """prompts that also occur in the training set"""


def evaluate(
    prompts: Sequence[Prompt],
    aligned: Contestant,
    baselines: Sequence[Contestant],
    judges: Sequence[Judge],
    out: Path,
    *,
    seen: Sequence[str] = (),
    bootstrap: Bootstrap | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Let the contestants answer N ≥ 1 different prompts, and compare the aligned side with each baseline.

    seen: texts of prompts that the agent was trained on; out: folder that keeps answers and scores.
    Raises MaraError where a contestant or a score fails, or `out` holds what was made under other settings.
    """
    bootstrap = bootstrap or Bootstrap()
    contestants = [aligned, *baselines]
    with ExitStack() as stack:
        stores = [
            stack.enter_context(Store(out / "answers" / f"{slug(c.name)}.jsonl", c.settings)) for c in contestants
        ]
        score, score_stores = remember(judges, out / "scores")
        for store in score_stores:
            stack.enter_context(store)
        answers = [_collect(c, prompts, store, quiet) for c, store in zip(contestants, stores, strict=True)]
        ours, *theirs = _judge([c.name for c in contestants], prompts, answers, score, quiet)
    signs = dict(zip(score.names, score.weights, strict=True))
    units = number_units([prompt.group for prompt in prompts])
    return Evaluation(
        prompts=prompts,
        aligned=ours,
        baselines={side.name: side for side in theirs},
        comparisons={side.name: _compare(prompts, ours, side, signs, units, seen, bootstrap) for side in theirs},
        weights=signs,
        seen=frozenset(seen),
    )


def _collect(contestant: Contestant, prompts: Sequence[Prompt], store: Store, quiet: bool) -> list[list[Answer]]:
    """(N, samples) answers of a contestant: those kept, and those still to be made."""
    missing = [prompt.text for prompt in prompts if prompt.text not in store]
    kept = len(prompts) - len(missing)
    if not quiet:
        sys.stderr.write(f"{contestant.name}: {len(missing)} to answer" + f", {kept} kept" * (kept > 0) + "\n")
    tokens = 0
    with tqdm(missing, unit="answer", leave=False, disable=True if quiet else None, ncols=88) as bar:
        for text in bar:
            answers = contestant(text)
            store.keep({text: [answer.to_json() for answer in answers]})
            tokens += sum(answer.tokens for answer in answers)
            bar.set_postfix_str(f"{tokens} tokens")
    contestant.close()
    try:
        return [[Answer(**values) for values in store[prompt.text]] for prompt in prompts]
    except TypeError:
        raise MaraError(
            f"{store.path} does not hold answers: remove the file, and the answers are made again"
        ) from None


def _judge(
    names: Sequence[str], prompts: Sequence[Prompt], answers: Sequence[list[list[Answer]]], score: Combined, quiet: bool
) -> list[Side]:
    """Score everything, a few prompts at a time, and let each contestant's best answer compete."""
    hidden = True if quiet else None  # None: shown on a terminal
    tallies = [_Tally(score.names) for _ in names]
    with tqdm(total=len(prompts), unit="prompt", desc="scores", leave=False, disable=hidden, ncols=88) as bar:
        for start in range(0, len(prompts), _AT_A_TIME):
            part = slice(start, start + _AT_A_TIME)
            for tally, of in zip(tallies, answers, strict=True):
                tally.add(prompts[part], of[part], score)
            bar.update(len(prompts[part]))
            ours, *theirs = (tally.combined for tally in tallies)
            bar.set_postfix_str(", ".join(f"{n} {_count(ours, c)}" for n, c in zip(names[1:], theirs, strict=True)))
    return [tally.side(name, of) for name, tally, of in zip(names, tallies, answers, strict=True)]


class _Tally:
    """The best answers of one contestant so far."""

    def __init__(self, scores: Sequence[str]) -> None:
        self.answers: list[Answer] = []
        self.combined: list[float] = []
        self.each: dict[str, list[float]] = {name: [] for name in scores}

    def add(self, prompts: Sequence[Prompt], samples: Sequence[list[Answer]], score: Combined) -> None:
        """Score the answers to some prompts in one go; of equally good ones the first competes."""
        asked = [prompt.text for prompt, those in zip(prompts, samples, strict=True) for _ in those]
        given = [answer for those in samples for answer in those]
        scored = score.detail(asked, [answer.text for answer in given])
        start = 0
        for those in samples:
            best = max(range(start, start + len(those)), key=scored.combined.__getitem__)
            self.answers.append(given[best])
            self.combined.append(scored.combined[best])
            for name, values in scored.each.items():
                self.each[name].append(values[best])
            start += len(those)

    def side(self, name: str, samples: Sequence[list[Answer]]) -> Side:
        """All prompts are in. samples: every answer of the contestant."""
        of = self.answers
        text = text_stats([a.text for a in of], [a.tokens for a in of], [a.finish_reason for a in of])
        stats = [answer.stats for those in samples for answer in those if answer.stats is not None]
        return Side(name, of, self.combined, self.each, text, total_stats(stats) if stats else None)


def _count(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Wins-ties-losses so far."""
    signs = np.sign(np.subtract(ours, theirs))
    return "-".join(str(int((signs == sign).sum())) for sign in (1, 0, -1))


def _compare(
    prompts: Sequence[Prompt],
    ours: Side,
    theirs: Side,
    weights: dict[str, float],
    units: NDArray[np.int64],
    seen: Sequence[str],
    bootstrap: Bootstrap,
) -> Comparison:
    def on(chosen: Sequence[int]) -> Preference | None:
        if not len(chosen):
            return None
        a, b = ([side.combined[i] for i in chosen] for side in (ours, theirs))
        return preference(a, b, number_units([str(units[i]) for i in chosen]), bootstrap)

    known = set(seen)
    pairs = list(zip(ours.answers, theirs.answers, strict=True))
    longer = np.sign([len(words(a.text)) - len(words(b.text)) for a, b in pairs])
    by_length = {
        name: on(np.flatnonzero(longer == sign).tolist())
        for name, sign in (("longer", 1), ("equal", 0), ("shorter", -1))
    }
    return Comparison(
        combined=preference(ours.combined, theirs.combined, units, bootstrap),
        each={
            name: preference(ours.each[name], theirs.each[name], units, bootstrap, sign=weight)
            for name, weight in weights.items()
        },
        unseen=on([i for i, prompt in enumerate(prompts) if prompt.text not in known]) if known else None,
        identical=sum(a.text == b.text for a, b in pairs),
        by_length={name: found for name, found in by_length.items() if found is not None},
    )
