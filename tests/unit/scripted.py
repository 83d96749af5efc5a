"""An evaluation of scripted sources by scripted scores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mara_deploy.evaluate.answers import Answer
from mara_deploy.evaluate.compare import Bootstrap
from mara_deploy.evaluate.evaluate import evaluate
from mara_deploy.evaluate.report import result
from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import WeightedScore
from mara_deploy.scores.function import FunctionScore
from mara_runtime.stats import Stats

PROMPTS = [Prompt(f"Question {i}?") for i in range(7)]
STATS = {**Stats(tokens=3, decisions=3, forced=1, smallest_margin=0.5).to_json(), "accepted_rank": {"2": 2}}


class Scripted:
    """A source with given answers; records what it is asked, and may be interrupted."""

    def __init__(self, name: str, answers: dict[str, Sequence[str]], stop_after: int | None = None) -> None:
        self.name, self.settings, self.closed = name, {"name": name}, False
        self._answers, self._left = answers, stop_after
        self.asked: list[str] = []

    def check(self, prompt: str) -> None:
        pass

    def __call__(self, prompts: Sequence[str]) -> Iterator[tuple[int, list[Answer]]]:
        for index, prompt in enumerate(prompts):
            if self._left == len(self.asked):
                raise KeyboardInterrupt
            self.asked.append(prompt)
            yield index, [Answer(text, len(text), "stop", STATS) for text in self._answers[prompt]]

    def close(self) -> None:
        self.closed = True


def scripted(name: str, *texts: str | Sequence[str], **options: int) -> Scripted:
    answers = {p.text: [text] if isinstance(text, str) else text for p, text in zip(PROMPTS, texts, strict=False)}
    return Scripted(name, answers, **options)


def as_number(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [float(re.sub(r"\D", "", answer) or 0) for answer in answers]


def length(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [len(answer) for answer in answers]


SCORES = [WeightedScore(FunctionScore("number", as_number), 1.0), WeightedScore(FunctionScore("length", length), -0.5)]
OURS = ("7", "5", "5", "4", "same", "100 or so", "2")
THEIRS = ("6", "5", "6", "4 in many words", "same", "99", "9")


def compared(out, ours=OURS, theirs=THEIRS, scores=SCORES, prompts=PROMPTS, name="other", quiet=True, **options):
    sources = scripted("aligned", *ours), [scripted(name, *theirs)]
    return evaluate(prompts, *sources, scores, out, quiet=quiet, **options)


FACTS = {
    "command": "mara-eval BUNDLE --score '<b>'",
    "score": "+1 × number -0.5 × length",
    "bundle": {
        "name": "polite", "model": "tiny", "precision": "fp32",
        "agents": [{"name": "a", "part": 1.0, "source": "a.pth"}],
    },
    "prompts": {
        "file": "prompts.txt", "read": 9, "duplicates": 2, "refused": 0, "limit": None, "unique": 7,
        "remarks": ["prompts.txt has columns that are not read: 'id'"], "training_file": "train.json",
    },
    "decoding": {},
    "versions": {"python": "3"},
}  # fmt: skip


def cautions_of(evaluation, facts=None) -> str:
    return "\n".join(result(evaluation, facts or FACTS, Bootstrap())["cautions"])
