"""How long answers are and how much they repeat: ways to game a score.

Measures: seq-rep-n of Welleck et al. (arXiv 1908.04319) and distinct-n of Li et al. (arXiv 1510.03055), over words,
here runs of letters and digits, which say little of languages that write without spaces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any


@dataclass(frozen=True)
class TextStats:
    """Length and repetition of one contestant's answers."""

    tokens_mean: float
    """of its own tokenizer, end-of-sequence included"""
    tokens_median: float
    tokens_max: int
    words_mean: float
    cut_off: float
    """share of answers ended by max_new_tokens or the context's capacity; 0 … 1"""
    empty: float
    """share of answers without a word; 0 … 1"""
    repeated_4grams: float | None
    """seq-rep-4: of an answer's word 4-grams, the share that occurred in it before; mean over answers of four words or
    more; 0 … 1, None if there are none"""
    distinct_2: float | None
    """distinct-2: share of different ones among the word bigrams of all answers; 0 … 1, low where answers are alike;
    None if there are none"""
    same_as_another: float
    """share of answers that are word for word another prompt's answer too; 0 … 1"""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case."""
    return re.findall(r"\w+", text.lower())


def text_stats(texts: Sequence[str], tokens: Sequence[int], finish_reasons: Sequence[str]) -> TextStats:
    """Figures of N ≥ 1 answers."""
    each = [words(text) for text in texts]
    repeated = [1 - len(set(grams)) / len(grams) for grams in (_ngrams(w, 4) for w in each) if grams]
    times = Counter(texts)
    bigrams = [gram for w in each for gram in _ngrams(w, 2)]
    return TextStats(
        tokens_mean=fmean(tokens),
        tokens_median=float(median(tokens)),
        tokens_max=max(tokens),
        words_mean=fmean(map(len, each)),
        cut_off=fmean(reason == "length" for reason in finish_reasons),
        empty=fmean(not w for w in each),
        repeated_4grams=fmean(repeated) if repeated else None,
        distinct_2=len(set(bigrams)) / len(bigrams) if bigrams else None,
        same_as_another=fmean(times[text] > 1 for text in texts),
    )


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
