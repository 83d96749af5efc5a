"""What a reader should know before trusting the rates of an evaluation, one sentence each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mara_deploy.evaluate.evaluate import Evaluation, ScoredAnswers

_MIN_UNITS = 20
"""Bootstrap intervals over fewer units are markedly too narrow."""
_TRUNCATED, _EMPTY, _REPEATED, _FORCED, _LENGTH_RATIO = 0.1, 0.05, 0.5, 0.5, 0.2
"""Shares of truncated, empty and repeated answers and of decisions in which all candidates are rejected, and the
relative difference in length, from which a caution is given."""


def cautions(evaluation: Evaluation, units: int, unit: str, decoding: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One sentence each. units: number of units ("prompt" or "group"); decoding: {source: its settings}."""
    yield from _few_units(evaluation, units, unit)
    if evaluation.seen:
        seen, total = len(evaluation.seen), len(evaluation.prompts)
        rest = "there are none left to compare" if seen == total else "the report also gives the rates without them"
        yield f"{seen} of {total} prompts also occur in the training set; {rest}."
    sides = (evaluation.aligned, *evaluation.baselines.values())
    yield from _nothing_compared(sides)
    for side in sides:
        if side.text.cut_off >= _TRUNCATED:
            remedy = _truncation(side, decoding.get(side.name, {}).get("max_new_tokens"))
            yield f"{side.text.cut_off:.0%} of the answers of {side.name} are truncated: {remedy}."
        if side.text.empty >= _EMPTY:
            yield f"{side.text.empty:.0%} of the answers of {side.name} contain no words."
        if side.text.same_as_another >= _REPEATED:
            yield f"{side.text.same_as_another:.0%} of the answers of {side.name} equal its answer to another prompt."
    ours = evaluation.aligned.text.words_mean
    for name, side in evaluation.baselines.items():
        theirs = side.text.words_mean
        if abs(ours - theirs) > _LENGTH_RATIO * max(theirs, 1.0):
            yield (
                f"Aligned answers have {ours:.0f} words on average, those of {name} {theirs:.0f}: see the rates by "
                "length, as scores often favour long or short answers."
            )
        ours_asked, theirs_asked = (_asked(decoding.get(one, {})) for one in (evaluation.aligned.name, name))
        if ours_asked != theirs_asked:
            yield (
                f"{evaluation.aligned.name} is asked {ours_asked}, {name} {theirs_asked}: the two sides are asked "
                "differently."
            )
        outcome = evaluation.comparisons[name].combined
        if evaluation.comparisons[name].identical == len(evaluation.prompts):
            yield f"Every answer is the same as that of {name}."
        elif [outcome.wins, outcome.ties, outcome.losses].count(0) == 2:
            yield f"All prompts have the same outcome against {name}: the bootstrap cannot estimate the spread."
        if name.startswith("best-of-"):
            yield f"{name} selects its answer by the same score that compares it."


def _asked(settings: Mapping[str, Any]) -> str:
    """How a side with these settings is asked."""
    if settings.get("raw"):
        return "with plain text, without a chat template"
    variables = settings.get("template")
    return "through its chat template" + (f" with {json.dumps(variables)}" if variables else "")


def _nothing_compared(sides: Sequence[ScoredAnswers]) -> Iterator[str]:
    """Cautions about scores and agents that make no difference."""
    for name in sides[0].each:
        values = {value for side in sides for value in side.each[name]}
        if len(values) == 1:
            yield f"The score {name} is {values.pop():.4g} for every answer of every side: it compares nothing."
    counters = sides[0].counters or {}
    if counters.get("decisions") == 0:
        yield "Nothing was decided, as every position had one candidate: raise --top-p or --top-k."
    elif counters and (forced := counters["forced"] / counters["decisions"]) >= _FORCED:
        yield f"All candidates were rejected in {forced:.0%} of the decisions: the fallback chose the token."
    elif counters and not any(int(rank) > 1 for rank in counters["accepted_rank"]) and not counters["forced"]:
        yield "The LLM's best candidate was accepted in every decision: alignment changed nothing."


def _few_units(evaluation: Evaluation, units: int, unit: str) -> Iterator[str]:
    if units < _MIN_UNITS:
        yield f"{counted(units, unit)}: intervals over fewer than {_MIN_UNITS} are too narrow, or missing."
        return
    for name, comparison in evaluation.comparisons.items():
        parts = {**comparison.by_length, "unseen": comparison.unseen}
        few = [f"{key}: {counted(p.units, unit)}" for key, p in parts.items() if p and p.units < _MIN_UNITS]
        if few:
            yield (
                f"Subsets of the prompts against {name} ({'; '.join(few)}): intervals over fewer than {_MIN_UNITS} are "
                "too narrow, or missing."
            )


def _truncation(side: ScoredAnswers, limit: int | None) -> str:
    """How to let the answers finish. limit: their --max-new-tokens; None: unknown."""
    truncated = [answer.tokens for answer in side.answers if answer.finish_reason == "length"]
    full = sum(tokens < limit for tokens in truncated) if limit is not None else 0  # the context ended first
    if not full:
        return "raise --max-new-tokens"
    context = (
        "the context length of the checkpoint: use shorter prompts"
        if side.counters is None
        else "the context length of the bundle: export it with a larger --max-context, or use shorter prompts"
    )
    if full == len(truncated):
        return f"by {context}"
    return f"{len(truncated) - full} by --max-new-tokens, {full} by {context}"


def counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
