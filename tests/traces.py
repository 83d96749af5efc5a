"""Lines of traces, made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

PROBABILITIES = (0.5, 0.3, 0.2)


def facts(answer: int = 0, align: bool = True, beside: int | None = None, **more: Any) -> dict[str, Any]:
    """The first line of an answer."""
    config = {
        "align": align,
        "agents": {"polite": 1.0, "brief": 0.5},
        "threshold": 0.0,
        "strategy": "top1",
        "order": "ranked",
        "fallback": "first",
    }
    prompt = [{"role": "user", "content": "Why <b>bold</b>?"}]
    about = {"bundle": "tiny", "model": "tiny", "beside": beside, "prompt": prompt, "config": config}
    return {"answer": answer, "format": 1, **about, **more}


def token(texts: list[str], margins: list[float | None], rank: int, answer: int = 0, **more: Any) -> dict[str, Any]:
    """A line about a token; of the mix, the first agent has two thirds."""
    candidates = [
        {
            "rank": i + 1,
            "token": 100 + sum(map(ord, text)),
            "text": text,
            "probability": p,
            "log_probability": math.log(p),
            "margin": margin,
            "margins": None if margin is None else {"polite": margin * 2 / 3, "brief": margin * 2 / 3},
        }
        for i, (text, margin, p) in enumerate(zip(texts, margins, PROBABILITIES, strict=False))
    ]
    chosen = candidates[rank - 1]
    line = {"answer": answer, "piece": chosen["text"], "position": 7, "token": chosen["token"], "text": chosen["text"]}
    return {**line, "rank": rank, "forced": False, "drafted": False, "candidates": candidates, **more}


def aligned_and_plain() -> list[dict[str, Any]]:
    """An answer of every kind of token, with texts that are hard to show, and the plain one beside it."""
    return [
        facts(),
        facts(1, align=False, beside=0),
        token(["Let", "No"], [2.5, None], 1),
        token(["Let"], [None], 1, 1),
        token([" us", " me", " it"], [-1.0, -0.5, 3.0], 3),
        token([" us"], [None], 1, 1),
        token([" <script>alert(1)</script>", "&amp;"], [-1.0, -2.0], 1, forced=True),
        token(["\n", " "], [0.5, None], 1, drafted=True),
        token(["é日"], [None], 1),
        {"answer": 0, "text": None, "finish_reason": "stop", "stats": {}},
        {"answer": 1, "text": None, "finish_reason": "length", "stats": {}},
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Write a trace file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
