"""A trace in a few lines for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mara_deploy.scores.base import shorten
from mara_deploy.see.reader import TracedAnswer

_NAMES = {
    "first": "accepted at rank 1",
    "changed": "changed",
    "forced": "forced",
    "only": "without a choice",
    "drawn": "drawn below rank 1",
    "plain": "plain",
}
_LONGEST_RUN = 32


def summary(answers: Sequence[TracedAnswer]) -> list[str]:
    """Each answer in some lines: what decoded it, its tokens by kind, accepted ranks, where it left the plain one."""
    lines = []
    for answer in answers:
        number: int = answer.facts["answer"]
        beside = next((other for other in answers if other.facts["beside"] == number), None)
        lines += [f"answer {number + 1}: {_escaped(shorten(prompt_text(answer)))}", *_answer(answer, beside)]
    return lines


def prompt_text(answer: TracedAnswer) -> str:
    """The prompt's last message, or what it was."""
    prompt: Any = answer.facts["prompt"]
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1]["content"])
    return f"{len(prompt)} token ids"


def accepted_ranks(answer: TracedAnswer) -> Counter[int]:
    """{LM rank: decisions in which the candidate of this rank was accepted}."""
    return Counter(token["rank"] for token in answer.tokens if answer.kind(token) in ("first", "changed"))


def parting(answer: TracedAnswer, plain: TracedAnswer) -> int | None:
    """Index of the first token that differs from plain decoding's; None: none does."""
    ours, theirs = ([token["token"] for token in each.tokens] for each in (answer, plain))
    if ours == theirs:
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def _answer(answer: TracedAnswer, plain: TracedAnswer | None) -> list[str]:
    config = answer.facts["config"]
    kinds = answer.kinds
    drafted = sum(token["drafted"] for token in answer.tokens)
    counts = [f"{kinds[kind]} {_NAMES[kind]}" for kind in _NAMES if kinds[kind]]
    parts = ", ".join(counts + [f"{drafted} of all drafted"] * bool(drafted))
    end = "breaks off" if answer.finish_reason is None else f"ended by {answer.finish_reason}"
    lines = [f"  {len(answer.tokens)} tokens, {end}: {parts}"]
    if answer.aligned:
        mix = " + ".join(name if part == 1 else f"{part:g} × {name}" for name, part in answer.agents.items())
        lines.insert(
            0,
            f"  agent {mix}, threshold {config['threshold']:g}, strategy {config['strategy']}, fallback "
            f"{config['fallback']}",
        )
        ranks = ", ".join(f"{count} at rank {rank}" for rank, count in sorted(accepted_ranks(answer).items()))
        lines.append(f"  accepted {ranks or 'none'}; all rejected {kinds['forced']}")
    else:
        beside = answer.facts["beside"]
        lines.insert(0, "  the LLM alone" + ("" if beside is None else f", beside answer {beside + 1}"))
    if plain is not None:
        at = parting(answer, plain)
        if at is None:
            lines.append("  the same tokens as plain decoding")
        else:
            ours, theirs = (_run(each, at) for each in (answer, plain))
            lines.append(f"  leaves plain decoding at token {at + 1}: {ours} instead of {theirs}")
    return lines


def _run(answer: TracedAnswer, start: int) -> str:
    """The text from a token on, quoted."""
    text = "".join(token["piece"] for token in answer.tokens[start : start + _LONGEST_RUN])
    return f'"{_escaped(shorten(text, _LONGEST_RUN))}"' if text else "the end"


def _escaped(text: str) -> str:
    """A text whose control characters, which a terminal would obey, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
