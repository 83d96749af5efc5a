"""The main path of an evaluation: answers, scores, comparison.

    answers of every source  →  scores of every answer  →  the best sample per prompt  →  aligned against each baseline

Answers and scores are saved in the output folder as they come (`mara_deploy.evaluate.store`); running the same settings
again computes only what is missing, with the same result as an uninterrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mara_deploy.evaluate.answers import Answer, AnswerSource, total_stats
from mara_deploy.evaluate.compare import Bootstrap, Preference, preference, unit_numbers
from mara_deploy.evaluate.store import Store, cached_scores, file_name
from mara_deploy.evaluate.text_stats import TextStats, text_stats, words
from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import Combined, WeightedScore
from mara_runtime.errors import MaraError

_PROMPTS_PER_STEP = 16
"""Prompts whose answers are scored together: a batch for a model, and one update of the live counts."""


@dataclass(frozen=True)
class ScoredAnswers:
    """One source's answers to N prompts, with their scores."""

    name: str
    answers: list[Answer]
    """(N,) the best sample of each prompt"""
    combined: list[float]
    """(N,) combined scores"""
    each: dict[str, list[float]]
    """{score: (N,) its own values}"""
    text: TextStats
    counters: dict[str, Any] | None
    """decoding counters over all samples; None: not decoded by a bundle"""


@dataclass(frozen=True)
class Comparison:
    """The aligned answers against one baseline."""

    combined: Preference
    """by the combined score"""
    each: dict[str, Preference]
    """by each score alone, in the direction of its weight"""
    unseen: Preference | None
    """combined, without prompts of the training set; None: no training set was given, or no prompt is left"""
    identical: int
    """prompts with the same text on both sides: ties by definition"""
    by_length: dict[str, Preference]
    """combined, over the prompts whose aligned answer has more, fewer or equally many words; empty ones omitted"""


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`."""

    prompts: Sequence[Prompt]
    aligned: ScoredAnswers
    baselines: dict[str, ScoredAnswers]
    comparisons: dict[str, Comparison]
    weights: dict[str, float]
    """{score: its weight in the combined score}"""
    seen: frozenset[str] = field(default_factory=frozenset)
    """prompts that also occur in the training set"""


def evaluate(
    prompts: Sequence[Prompt],
    aligned: AnswerSource,
    baselines: Sequence[AnswerSource],
    scores: Sequence[WeightedScore],
    out: Path,
    *,
    seen: Sequence[str] = (),
    bootstrap: Bootstrap | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Have every source answer N ≥ 1 unique prompts, and compare the aligned answers with each baseline's.

    seen: texts of prompts that the agent was trained on; out: folder for answers and scores.
    Raises MaraError if a source or a score fails, or `out` was made with other settings.
    """
    bootstrap = bootstrap or Bootstrap()
    sources = [aligned, *baselines]
    with ExitStack() as stack:
        stores = [
            stack.enter_context(Store(out / "answers" / f"{file_name(source.name)}.jsonl", source.settings))
            for source in sources
        ]
        score, score_files = cached_scores(scores, out / "scores")
        stack.enter_context(score_files)
        samples = [_answer(source, prompts, store, quiet) for source, store in zip(sources, stores, strict=True)]
        ours, *theirs = _score([source.name for source in sources], prompts, samples, score, quiet)
    weights = dict(zip(score.names, score.weights, strict=True))
    units = unit_numbers([prompt.group for prompt in prompts])
    return Evaluation(
        prompts=prompts,
        aligned=ours,
        baselines={side.name: side for side in theirs},
        comparisons={side.name: _compare(prompts, ours, side, weights, units, seen, bootstrap) for side in theirs},
        weights=weights,
        seen=frozenset(seen),
    )


def _answer(source: AnswerSource, prompts: Sequence[Prompt], store: Store, quiet: bool) -> list[list[Answer]]:
    """(N, samples) answers of a source: those in the store, and new ones."""
    missing = [prompt.text for prompt in prompts if prompt.text not in store]
    saved = len(prompts) - len(missing)
    if not quiet:
        sys.stderr.write(f"{source.name}: {len(missing)} to answer" + f", {saved} already saved" * (saved > 0) + "\n")
    tokens = 0
    with tqdm(missing, unit="answer", leave=False, disable=True if quiet else None, ncols=88) as bar:
        for text in bar:
            answers = source(text)
            store.add({text: [answer.to_json() for answer in answers]})
            tokens += sum(answer.tokens for answer in answers)
            bar.set_postfix_str(f"{tokens} tokens")
    source.close()
    try:
        return [[Answer(**values) for values in store[prompt.text]] for prompt in prompts]
    except TypeError:
        raise MaraError(f"{store.path} does not contain answers: delete the file to compute them again") from None


class _BestSample(NamedTuple):
    """The sample that competes for one prompt, with its scores."""

    answer: Answer
    combined: float
    each: dict[str, float]


def _score(
    names: Sequence[str], prompts: Sequence[Prompt], samples: Sequence[list[list[Answer]]], score: Combined, quiet: bool
) -> list[ScoredAnswers]:
    """Score all samples of every source, a few prompts at a time, and keep the best sample of each prompt."""
    hidden = True if quiet else None  # None: shown on a terminal
    best: list[list[_BestSample]] = [[] for _ in names]
    with tqdm(total=len(prompts), unit="prompt", desc="scores", leave=False, disable=hidden, ncols=88) as bar:
        for start in range(0, len(prompts), _PROMPTS_PER_STEP):
            part = slice(start, start + _PROMPTS_PER_STEP)
            for of_source, answers in zip(best, samples, strict=True):
                of_source += _best_samples(prompts[part], answers[part], score)
            bar.update(len(prompts[part]))
            ours, *theirs = ([sample.combined for sample in of_source] for of_source in best)
            counts = (f"{name} {_outcomes(ours, other)}" for name, other in zip(names[1:], theirs, strict=True))
            bar.set_postfix_str(", ".join(counts))
    return [
        _summarise(name, score.names, of_source, answers)
        for name, of_source, answers in zip(names, best, samples, strict=True)
    ]


def _best_samples(prompts: Sequence[Prompt], samples: Sequence[list[Answer]], score: Combined) -> Iterator[_BestSample]:
    """Score all samples of some prompts at once; the first of equally good ones is the best."""
    flat = [(prompt.text, answer) for prompt, answers in zip(prompts, samples, strict=True) for answer in answers]
    values = score.detail([text for text, _ in flat], [answer.text for _, answer in flat])
    start = 0
    for answers in samples:
        best = max(range(start, start + len(answers)), key=values.combined.__getitem__)
        each = {name: of_score[best] for name, of_score in values.each.items()}
        yield _BestSample(flat[best][1], values.combined[best], each)
        start += len(answers)


def _summarise(
    name: str, scores: Sequence[str], best: Sequence[_BestSample], samples: Sequence[list[Answer]]
) -> ScoredAnswers:
    answers = [sample.answer for sample in best]
    stats = [answer.stats for of_prompt in samples for answer in of_prompt if answer.stats is not None]
    return ScoredAnswers(
        name,
        answers,
        combined=[sample.combined for sample in best],
        each={score: [sample.each[score] for sample in best] for score in scores},
        text=text_stats([a.text for a in answers], [a.tokens for a in answers], [a.finish_reason for a in answers]),
        counters=total_stats(stats) if stats else None,
    )


def _outcomes(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """wins-ties-losses so far."""
    signs = np.sign(np.subtract(ours, theirs))
    return "-".join(str(int((signs == sign).sum())) for sign in (1, 0, -1))


def _compare(
    prompts: Sequence[Prompt],
    ours: ScoredAnswers,
    theirs: ScoredAnswers,
    weights: dict[str, float],
    units: NDArray[np.int64],
    seen: Sequence[str],
    bootstrap: Bootstrap,
) -> Comparison:
    def over(part: Sequence[int]) -> Preference | None:
        """Preference over some of the prompts; None if there are none."""
        if not len(part):
            return None
        a, b = ([side.combined[i] for i in part] for side in (ours, theirs))
        return preference(a, b, unit_numbers([str(units[i]) for i in part]), bootstrap)

    known = set(seen)
    pairs = list(zip(ours.answers, theirs.answers, strict=True))
    longer = np.sign([len(words(a.text)) - len(words(b.text)) for a, b in pairs])
    by_length = {
        name: over(np.flatnonzero(longer == sign).tolist())
        for name, sign in (("longer", 1), ("equal", 0), ("shorter", -1))
    }
    return Comparison(
        combined=preference(ours.combined, theirs.combined, units, bootstrap),
        each={
            name: preference(ours.each[name], theirs.each[name], units, bootstrap, sign=weight)
            for name, weight in weights.items()
        },
        unseen=over([i for i, prompt in enumerate(prompts) if prompt.text not in known]) if known else None,
        identical=sum(a.text == b.text for a, b in pairs),
        by_length={name: part for name, part in by_length.items() if part is not None},
    )
