"""How to decode: one frozen dataclass, validated where it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from mara_runtime.errors import OptionError
from mara_runtime.tensors import DRAFT_ROWS

STRATEGIES = ("top1", "max_prob", "random")
ORDERS = ("ranked", "best_last", "reversed")
FALLBACKS = ("first", "last")
SCHEDULES = ("adaptive", "one-by-one", "together")
ENGINES = ("tensorrt", "tensorrt-rtx", "cuda", "cpu")
"""Engines in the order of preference: `auto` takes the first that both bundle and machine have."""


@dataclass(frozen=True)
class DecodeConfig:
    """Options of one generation. Defaults are those of the MARA paper's evaluation (arXiv 2505.19743)."""

    align: bool = True
    """False: plain decoding with the LLM alone, greedy or (with `sample`) sampled"""
    top_k: int = 40
    """candidates: at most this many; 1 … the bundle's max_candidates"""
    top_p: float = 0.95
    """candidates: nucleus applied after top_k; 0 … 1"""
    max_new_tokens: int = 512
    """tokens to emit at most, end-of-sequence included; ≥ 1"""
    strategy: str = "top1"
    """top1: first accepted; max_prob: accepted with the largest margin; random: uniform over the accepted"""
    order: str = "ranked"
    """examination order by LM rank: ranked; best_last: ranked with the best moved last; reversed"""
    fallback: str | None = None
    """emitted when all are rejected, by LM rank: first, last; None: as the agent records it"""
    threshold: float = 0.0
    """a candidate is accepted when its margin exceeds this; finite"""
    schedule: str = "adaptive"
    """how many candidates share a pass. adaptive: as many as cost least, by what width costs on this machine and what
    the agent has accepted so far; one-by-one; together: all of a position. The result does not depend on it."""
    draft: int | None = None
    """tokens guessed from repetitions and verified in the same pass, at most; 0: none; None: as many as pay, with the
    adaptive schedule, else none. The result does not depend on it."""
    sample: bool = False
    """plain decoding only: sample from the candidates instead of taking the best"""
    temperature: float = 1.0
    """plain sampling only, applied after top_k and top_p; > 0"""
    seed: int = 0
    """of `random` and of plain sampling; ≥ 0"""
    stop: tuple[str, ...] = ()
    """texts that end the answer; they are not part of its text"""

    def __post_init__(self) -> None:
        for name in ("align", "sample"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        _choice("--strategy", self.strategy, STRATEGIES)
        _choice("--order", self.order, ORDERS)
        _choice("--schedule", self.schedule, SCHEDULES)
        if self.fallback is not None:
            _choice("--fallback", self.fallback, FALLBACKS)
        _whole("--top-k", self.top_k, 1)
        _whole("--max-new-tokens", self.max_new_tokens, 1)
        _whole("--seed", self.seed, 0)
        if self.draft is not None:
            _whole("--draft", self.draft, 0)
            if self.draft > DRAFT_ROWS:
                raise OptionError(f"--draft is {self.draft}; it must be at most {DRAFT_ROWS}")
        _number("--top-p", self.top_p, "between 0 and 1", 0.0 <= _real(self.top_p) <= 1.0)
        _number("--threshold", self.threshold, "a finite number", math.isfinite(_real(self.threshold)))
        temperature = _real(self.temperature)
        _number("--temperature", self.temperature, "a finite number above 0", 0.0 < temperature < math.inf)
        if self.sample and self.align:
            raise OptionError("--sample is for plain decoding: add --no-align, or use --strategy random")
        if self.temperature != 1.0 and not self.sample:
            raise OptionError(f"--temperature is {self.temperature}, but it acts on --sample only; leave it out")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) for text in self.stop):
            raise OptionError(f"--stop is {self.stop!r}; it must be a tuple of texts")
        if "" in self.stop:
            raise OptionError("--stop is an empty text; it must have at least one character")
        for name, kind in _NUMBERS.items():  # those of NumPy and others as plain ones
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "stop": list(self.stop)}


_NUMBERS: dict[str, type[int] | type[float]] = {
    **dict.fromkeys(("top_k", "max_new_tokens", "seed", "draft"), int),
    **dict.fromkeys(("top_p", "threshold", "temperature"), float),
}


def _choice(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{flag} is {value!r}; it must be one of {', '.join(allowed)}")


def _number(flag: str, value: object, allowed: str, within: bool) -> None:
    if not within:
        raise OptionError(f"{flag} is {value!r}; it must be {allowed}")


def _real(value: object) -> float:
    """The value as a float; NaN, which no range holds, if it is no number."""
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        return math.nan


def _whole(flag: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise OptionError(f"{flag} is {value!r}; it must be a whole number of at least {least}")
