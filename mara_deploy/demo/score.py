"""The demo's score: considerate minus inconsiderate sentences, by two lists of words anybody can read.

    score = relevance · completeness · mean of v over the sentences      (the factors apply to a positive mean only)

v is +1 for a sentence with considerate wording only, -1 with inconsiderate wording only, 0 with both or neither. It is
meant to be hard to game: wording stacked in one sentence counts once, and one inconsiderate word cancels it; a longer
answer gains nothing; a sentence said twice, or one without an end, is -1; fewer than `MIN_SENTENCES` sentences
divide by that number all the same; an answer that shares no word of substance with the question loses half.
The lists were written with the corpus, but the score knows nothing of its grammar: whether an answer is one that the
grammar could have made is an independent check (`examples.demo_lm.corpus.known`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

CONSIDERATE = (
    *("thank", "good question", "lovely", "glad", "gladly", "happy", "right to ask", "together", "carefully"),
    *("slowly", "gently", "patiently", "take your time", "twice to be sure", "please check", "neatly", "calm"),
    *("calmly", "if you like", "please", "safe", "safer", "enjoy", "here if you need", "time you need", "do well"),
    *("any time", "warmly", "worth", "take a moment", "patience", "patient", "no need to rush", "gentle", "suits you"),
    *("kind", "careful", "wise", "sorry to hear", "happens to all", "mend"),
)
INCONSIDERATE = (
    *("not this again", "silly", "boring", "tired of", "too busy", "slow", "everybody knows", "look it up"),
    *("quickly", "roughly", "somehow", "blindly", "hurry", "fuss", "any way you like", "without thinking"),
    *("or do not", "please yourself", "so what", "fine to", "cry about", "nobody will notice", "do not bother"),
    *("do not come back", "you will need it", "done with you", "take it or leave", "fail", "somebody else"),
    *("go and buy", "what else", "brains", "dawdling", "twice that", "cut some corners", "who cares", "whine"),
    *("whining", "a child can", "even find", "stupid", "your own problem", "not surprised", "clumsy"),
    *("your own fault", "yourself next"),
)
MIN_SENTENCES = 3
_QUESTION_WORDS = (
    "how do i a an the to is it can you tell me what need for should which things without no way get still and went "
    "wrong now my first try at failed any advice could explain best have never tried where start step when hard "
    "difficult beginner dangerous watch out safe quick long does take much time plan buy want work"
)
_NO_SUBSTANCE = frozenset(_QUESTION_WORDS.split())


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(re.escape(word) for word in longest_first) + r")\b")


_CONSIDERATE, _INCONSIDERATE = _pattern(CONSIDERATE), _pattern(INCONSIDERATE)


def sentences(text: str) -> list[str]:
    """Split a reply into sentences; what follows the last `.`, `!` or `?` counts as one too."""
    return [s.strip() for s in re.findall(r"[^.!?]+[.!?]?", text) if s.strip()]


def value(sentence: str) -> int:
    """+1, 0 or -1: considerate wording only; both or neither; inconsiderate wording only."""
    low = sentence.lower()
    return bool(_CONSIDERATE.search(low)) - bool(_INCONSIDERATE.search(low))


def score(prompt: str, answer: str) -> float:
    """The score of one answer, in [-1, 1]; an empty one has -1."""
    said = sentences(answer)
    if not said:
        return -1.0
    seen: set[str] = set()
    total = 0
    for sentence in (s.lower() for s in said):
        sound = sentence[-1] in ".!?" and sentence not in seen
        total += value(sentence) if sound else -1
        seen.add(sentence)
    mean = total / len(said)
    if mean <= 0:
        return mean
    mean *= min(1.0, len(said) / MIN_SENTENCES)
    return mean if (_words(prompt) - _NO_SUBSTANCE) & _words(answer) else mean / 2


def considerate(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
    """`score` of each pair, of the last message of a conversation: the callable that `--score demo` names."""
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [score(text, answer) for text, answer in zip(texts, answers, strict=True)]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))
