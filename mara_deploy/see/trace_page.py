"""The page of a trace: every token, how it was chosen, and what the alternatives were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mara_deploy.see.page import page
from mara_deploy.see.reader import TracedAnswer
from mara_deploy.see.summary import prompt_text

FILES = ("tokens.css", "trace.css", "tokens.js", "trace.js")


def trace_page(answers: Sequence[TracedAnswer], name: str) -> str:
    """The page as HTML. name: of the trace."""
    facts = answers[0].facts
    values = {"name": name, "bundle": facts["bundle"], "model": facts["model"]}
    return page("trace.html.jinja", FILES, values, data=packed(answers)).html


def packed(answers: Sequence[TracedAnswer]) -> dict[str, Any]:
    """Answers as trace.js unpacks them: texts of tokens once, candidates as arrays.

    A candidate is [token, probability, margin, [margin of each agent]], without what it lacks at the end. Probabilities
    are the LLM's own, over its whole vocabulary, as those of plain decoding's one candidate tell nothing otherwise.
    """
    texts: dict[int, str] = {}
    return {
        "answers": [
            {
                "number": answer.facts["answer"],
                "beside": answer.facts["beside"],
                "title": prompt_text(answer),
                "prompt": _messages(answer.facts["prompt"]),
                "aligned": answer.aligned,
                "agents": answer.agents,
                **{name: answer.facts["config"][name] for name in ("threshold", "strategy", "order", "fallback")},
                "finish_reason": answer.finish_reason,
                "tokens": [_token(token, texts) for token in answer.tokens],
            }
            for answer in answers
        ],
        "texts": texts,
    }


def _token(token: dict[str, Any], texts: dict[int, str]) -> list[Any]:
    candidates = []
    for each in token["candidates"]:
        texts[each["token"]] = each["text"]
        margins = each.get("margins")
        candidate = [each["token"], float(f"{math.exp(min(each['log_probability'], 0.0)):.4g}"), each["margin"]]
        candidate += [] if margins is None else [[*margins.values()]]
        candidates.append(candidate if each["margin"] is not None else candidate[:2])
    flags = token["forced"] + 2 * token["drafted"]
    return [token["position"], token["piece"], token["rank"], flags, candidates]


def _messages(prompt: Any) -> list[dict[str, str]]:
    """A prompt as a list of messages."""
    if isinstance(prompt, str):
        return [{"role": "prompt", "content": prompt}]
    if prompt and isinstance(prompt[0], int):
        return [{"role": "token ids", "content": ", ".join(map(str, prompt))}]
    return [{"role": each["role"], "content": each["content"]} for each in prompt]
