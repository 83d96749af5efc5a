"""Trace files, read strictly: a page is made of them, and they may come from anywhere."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mara_deploy.trace import FORMAT
from mara_runtime.errors import MaraError
from mara_runtime.json_reader import JsonReader, load_object, shortened

KINDS = ("first", "changed", "forced", "only", "drawn", "plain")
"""How a token was chosen: the LLM's first choice, accepted; another one, accepted; the fallback, as all were rejected;
the only candidate. In plain decoding: drawn, of another rank than the first; else plain.
"""
_REMEDY = "write it again with mara-run --trace"


@dataclass
class TracedAnswer:
    """An answer of a trace."""

    facts: dict[str, Any]
    """its first line"""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    """its lines about tokens"""
    finish_reason: str | None = None
    """None: the trace breaks off"""

    @property
    def aligned(self) -> bool:
        """Whether agents judged."""
        return bool(self.facts["config"]["align"])

    @property
    def agents(self) -> dict[str, float]:
        """Those that judged, and how much the margin of each counts."""
        return dict(self.facts["config"]["agents"] or {}) if self.aligned else {}

    @property
    def text(self) -> str:
        """What was answered."""
        return "".join(token["piece"] for token in self.tokens)

    @property
    def kinds(self) -> Counter[str]:
        """{kind: tokens of it}."""
        return Counter(self.kind(token) for token in self.tokens)

    def kind(self, token: dict[str, Any]) -> str:
        """One of KINDS."""
        if not self.aligned:
            return "plain" if token["rank"] == 1 else "drawn"
        if token["forced"]:
            return "forced"
        if all(candidate["margin"] is None for candidate in token["candidates"]):
            return "only"
        return "first" if token["rank"] == 1 else "changed"


def read_trace(path: Path) -> list[TracedAnswer]:
    """The answers of a trace file, in order. Raises MaraError that names the line."""
    answers: dict[int, TracedAnswer] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                _take(_Line(f"{path}, line {number}", line), answers)
    except OSError as error:
        raise MaraError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MaraError(f"{path} is not UTF-8 text: {error}; {_REMEDY}") from None
    if not any(answer.tokens for answer in answers.values()):
        raise MaraError(f"{path} has no token of an answer; {_REMEDY}")
    return [answer for answer in answers.values() if answer.tokens]


class _Line(JsonReader):
    """A line of a trace."""

    def __init__(self, where: str, line: str) -> None:
        try:
            root = load_object(line)
        except ValueError as error:
            raise MaraError(f"{where} is not JSON: {error}; {_REMEDY}") from None
        if not isinstance(root, dict):
            raise MaraError(f"{where} is {shortened(root)}, not a JSON object; {_REMEDY}")
        super().__init__(where, root, _REMEDY)
        self.root: dict[str, Any] = root


def _take(line: _Line, answers: dict[int, TracedAnswer]) -> None:
    number = line.count("answer", least=0)
    if "format" in line.root:
        if line.get("format", int) != FORMAT:
            raise line.wrong("format", f"is {shortened(line.root['format'])}; this release reads format {FORMAT}")
        if number in answers:
            raise line.wrong("answer", f"is {number}, of which there was a first line before")
        answers[number] = TracedAnswer(_facts(line, answers))
        return
    if number not in answers:
        raise line.wrong("answer", f"is {number}, of which there was no first line")
    answer = answers[number]
    if "finish_reason" in line.root:
        answer.finish_reason = line.text("finish_reason")
    else:
        answer.tokens.append(_token(line, list(answer.agents)))


def _facts(line: _Line, answers: dict[int, TracedAnswer]) -> dict[str, Any]:
    for name in ("bundle", "model", "config.strategy", "config.order"):
        line.text(name)
    line.get("config.align", bool)
    line.get("config.fallback", str, type(None))
    if not math.isfinite(line.get("config.threshold", int, float)):
        raise line.wrong("config.threshold", "is not finite")
    agents = line.get("config.agents", dict, type(None)) or {}
    if not all(_is_number(part) for part in agents.values()):
        raise line.wrong("config.agents", "has a part that is not a number")
    beside = line.get("beside", int, type(None))
    if beside is not None and beside not in answers:
        raise line.wrong("beside", f"is {shortened(beside)}, which is no answer before it")
    prompt = line.get("prompt", str, list)
    if isinstance(prompt, list) and not all(_is_message(each) or type(each) is int for each in prompt):
        raise line.wrong("prompt", "is not a text, a list of messages, or a list of token ids")
    return line.root


def _token(line: _Line, agents: list[str]) -> dict[str, Any]:
    """A line about a token; texts that it lacks, without a tokenizer, become token ids in brackets."""
    token = line.root
    line.count("position", least=0)
    line.count("token", least=0)
    line.get("piece", str)
    for name in ("forced", "drafted"):
        line.get(name, bool)
    candidates = line.get("candidates", list)
    named = "text" in token
    for index, each in enumerate(candidates):
        if problem := _problem(each, named, agents):
            raise line.wrong(f"candidates.{index}", problem)
        if not named:
            each["text"] = f"[{each['token']}]"
    if not 1 <= line.count("rank") <= len(candidates):
        raise line.wrong("rank", f"is {token['rank']}, and there are {len(candidates)} candidates")
    if not named:
        token["piece"] = token["text"] = f"[{token['token']}]"
    line.get("text", str)
    return token


def _problem(candidate: Any, named: bool, agents: list[str]) -> str | None:
    """What is wrong with a candidate."""
    if not isinstance(candidate, dict):
        return f"is {shortened(candidate)}, not a JSON object"
    for name, fits in (
        ("token", type(candidate.get("token")) is int),
        ("text", not named or isinstance(candidate.get("text"), str)),
        ("log_probability", _is_number(candidate.get("log_probability"))),
        ("margin", candidate.get("margin", 0) is None or _is_number(candidate.get("margin"))),
    ):
        if not fits:
            return f"has the {name} {shortened(candidate.get(name))}"
    each = candidate.get("margins")
    if each is not None and not (isinstance(each, dict) and [*each] == agents and all(map(_is_number, each.values()))):
        return f"has the margins {shortened(each)}, and the agents are {', '.join(agents) or 'none'}"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))
