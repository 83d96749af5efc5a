"""The main path of an evaluation: answers, scores, comparison.

    answers of every source  →  scores of every answer  →  the best sample per prompt  →  aligned against each baseline

Answers and scores are saved in the output folder as they come (`mara_deploy.evaluate.store`); running the same settings
again computes only what is missing, with the same result as an uninterrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mara_deploy.evaluate.answers import Answer, AnswerSource, total_stats
from mara_deploy.evaluate.compare import Bootstrap, Preference, preference, unit_numbers
from mara_deploy.evaluate.store import Store, cached_scores, file_name
from mara_deploy.evaluate.text_stats import TextStats, text_stats, words
from mara_deploy.prompts import Prompt, key_of
from mara_deploy.scores.base import Combined, WeightedScore, shown

_PROMPTS_PER_STEP = 16
"""Prompts whose answers are scored together, and then kept or computed again as a whole."""


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
    seen: frozenset[str]
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
    stores = [Store(out / "answers" / f"{file_name(source.name)}.jsonl", source.settings) for source in sources]
    score = cached_scores(scores, out / "scores")
    samples = [_answer(source, prompts, store, quiet) for source, store in zip(sources, stores, strict=True)]
    ours, *theirs = (
        _score(source.name, prompts, each, score, quiet) for source, each in zip(sources, samples, strict=True)
    )
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
    every = {key_of(prompt.asked): prompt.asked for prompt in prompts}  # columns are the scores' concern
    missing = [key for key in every if key not in store]
    saved = len(every) - len(missing)
    if not quiet:
        sys.stderr.write(f"{source.name}: {len(missing)} to answer" + f", {saved} already saved" * (saved > 0) + "\n")
    tokens = 0
    finished = source([every[key] for key in missing]) if missing else ()
    with _progress(finished, quiet, total=len(missing), unit="answer") as bar:
        for index, answers in bar:
            store.add({missing[index]: [asdict(answer) for answer in answers]})
            tokens += sum(answer.tokens for answer in answers)
            bar.set_postfix_str(f"{tokens} tokens")
    source.close()
    kept = {}
    for key in every:
        try:
            kept[key] = [Answer(**values) for values in store[key]]
        except TypeError:
            kept[key] = []
        if not kept[key]:
            raise store.damaged(f"the answer to {shown(key)}")
    return [kept[key_of(prompt.asked)] for prompt in prompts]


def _score(
    name: str, prompts: Sequence[Prompt], samples: Sequence[list[Answer]], score: Combined, quiet: bool
) -> ScoredAnswers:
    """Score all samples of a source, those of a few prompts at a time, and keep the best sample of each prompt."""
    chosen: list[Answer] = []
    combined: list[float] = []
    each: dict[str, list[float]] = {name: [] for name in score.names}
    with _progress(range(0, len(prompts), _PROMPTS_PER_STEP), quiet, unit="batch", desc=f"scores of {name}") as bar:
        for first in bar:
            part = slice(first, first + _PROMPTS_PER_STEP)
            pairs = [(p, answer) for p, answers in zip(prompts[part], samples[part], strict=True) for answer in answers]
            columns = {name: [prompt.columns[name] for prompt, _ in pairs] for name in score.columns}
            values = score.detail([prompt.asked for prompt, _ in pairs], [a.text for _, a in pairs], **columns)
            start = 0
            for answers in samples[part]:  # the first of equally good ones is the best
                best = max(range(start, start + len(answers)), key=values.combined.__getitem__)
                start += len(answers)
                chosen.append(pairs[best][1])
                combined.append(values.combined[best])
                for score_name, of_score in values.each.items():
                    each[score_name].append(of_score[best])
            bar.set_postfix_str(f"mean {fmean(combined):.3g}")
    text = text_stats([a.text for a in chosen], [a.tokens for a in chosen], [a.finish_reason for a in chosen])
    stats = [answer.stats for answers in samples for answer in answers if answer.stats is not None]
    return ScoredAnswers(name, chosen, combined, each, text, total_stats(stats) if stats else None)


def _progress(steps: Iterable[Any], quiet: bool, **options: Any) -> tqdm[Any]:
    """A progress bar over the steps, on a terminal only."""
    return tqdm(steps, leave=False, disable=True if quiet else None, ncols=88, **options)


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
