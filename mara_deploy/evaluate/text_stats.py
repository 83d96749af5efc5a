"""Length and repetition of answers, the usual ways to game a score.

Metrics: seq-rep-n (Welleck et al., arXiv 1908.04319) and distinct-n (Li et al., arXiv 1510.03055) over words. Words are
runs of letters and digits, so the figures mean little for languages written without spaces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median


@dataclass(frozen=True)
class TextStats:
    """Length and repetition of one source's answers."""

    tokens_mean: float
    """by its own tokenizer, including end-of-sequence"""
    tokens_median: float
    tokens_max: int
    words_mean: float
    cut_off: float
    """share of answers truncated by max_new_tokens or the context length; 0 … 1"""
    empty: float
    """share of answers without words; 0 … 1"""
    repeated_4grams: float | None
    """seq-rep-4: share of an answer's word 4-grams that repeat an earlier one, mean over answers of four words or more;
    0 … 1, None if there are none"""
    distinct_2: float | None
    """distinct-2: unique word bigrams as a share of all word bigrams of all answers; 0 … 1, low for similar answers,
    None if there are none"""
    same_as_another: float
    """share of answers identical to the answer to another prompt; 0 … 1"""


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case."""
    return re.findall(r"\w+", text.lower())


def text_stats(texts: Sequence[str], tokens: Sequence[int], finish_reasons: Sequence[str]) -> TextStats:
    """Statistics of N ≥ 1 answers."""
    each = [words(text) for text in texts]
    repeated = [1 - len(set(grams)) / len(grams) for grams in (_ngrams(w, 4) for w in each) if grams]
    occurrences = Counter(texts)
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
        same_as_another=fmean(occurrences[text] > 1 for text in texts),
    )


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
