"""The demo's prompts: questions of eight types about forty household tasks, in three sets.

| set | groups | used for |
|---|---|---|
| `demo` | in neither of the other sets | training the LM and the agent |
| `demo-dev` | held out from the LM's training | every choice: recipe, fallback, when to stop |
| `demo-final` | reserved: in the LM's training, not in the agent's | reported figures; no choice is based on them |

A *group* is a (task, question type) pair. Its prompts are paraphrases, so the sets share no group and a confidence
interval should resample groups (`DemoPrompt.group`). About 15 % of the groups are held out. examples/demo_lm writes the
replies that the LM was trained on.
"""

from __future__ import annotations

import csv
import hashlib
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Chore:
    """One row of tasks.txt. The fields are neutral: no form of a slot occurs in them."""

    task: str  # infinitive, "descale a kettle"
    gerund: str
    tool: str
    first: str  # three steps, imperatives
    second: str
    third: str
    precaution: str  # imperative
    risk: str  # main clause
    shortcut: str  # what an inconsiderate reply recommends
    time: str

    def fill(self, form: str, adverb: str = "", tail: str = "") -> str:
        """Put this task's fields into a form; the result begins with a capital."""
        text = form.format(**vars(self), adverb=adverb, tail=tail)
        return text[:1].upper() + text[1:]


with (Path(__file__).parent / "tasks.txt").open(encoding="utf-8", newline="") as _table:
    TASKS = tuple(Chore(**row) for row in csv.DictReader(_table, delimiter="|"))


OPENERS = (
    *("", "", "", "Hello. ", "Hi there! ", "Quick question. ", "Sorry to bother you. ", "I am in a hurry. "),
    *("My neighbour sent me. ", "I am new to this. ", "Good morning. ", "Hey. "),
)
QUESTIONS = {
    "how": ("How do I {task}?", "Can you tell me how to {task}?", "I want to {task}. How does it work?",
            "Could you explain how to {task}?", "What is the best way to {task}?"),
    "need": ("What do I need to {task}?", "Which things do I need for {gerund}?",
             "What should I buy to {task}?"),
    "time": ("How long does it take to {task}?", "How much time should I plan for {gerund}?",
             "Is {gerund} quick?"),
    "without": ("Can I {task} without {tool}?", "I have no way to get {tool}. Can I still {task}?"),
    "start": ("I have never tried to {task}. Where do I start?", "What is the first step when I {task}?"),
    "hard": ("Is it hard to {task}?", "Is {gerund} difficult?", "Can a beginner {task}?"),
    "danger": ("Is it dangerous to {task}?", "What should I watch out for when I {task}?",
               "Is {gerund} safe?"),
    "wrong": ("I tried to {task} and it went wrong. What now?",
              "My first try at {gerund} failed. Any advice?"),
}  # fmt: skip

Group = tuple[str, str]
"""(infinitive of the task, question type): the unit of the held-out split and of a bootstrap."""


@dataclass(frozen=True)
class DemoPrompt:
    """A user message and where it comes from."""

    text: str
    task: int  # index into TASKS
    question: str  # key of QUESTIONS

    @property
    def group(self) -> Group:
        """The group that this prompt shares with its paraphrases."""
        return TASKS[self.task].task, self.question


def held_out(group: Group) -> bool:
    """Whether no training dialogue belongs to the group (by hash: no seed or order changes it)."""
    return hashlib.sha256("|".join(group).encode()).digest()[0] < 38  # 38 of 256


@cache
def groups(held_out_split: bool) -> tuple[Group, ...]:
    """Return the groups of one side of the split, in the table's order."""
    every = ((task.task, question) for task in TASKS for question in QUESTIONS)
    return tuple(group for group in every if held_out(group) == held_out_split)


@cache
def every_prompt(held_out_split: bool) -> tuple[DemoPrompt, ...]:
    """Return all prompts of one side of the split, by group."""
    index = {task.task: i for i, task in enumerate(TASKS)}
    return tuple(
        DemoPrompt(opener + TASKS[index[name]].fill(form), index[name], question)
        for name, question in groups(held_out_split)
        for form in QUESTIONS[question]
        for opener in dict.fromkeys(OPENERS)
    )


def prompts(n: int, seed: int, held_out_split: bool) -> list[DemoPrompt]:
    """Return `n` different prompts of one side of the split, in an order given by the seed.

    The same seed with a larger `n` begins with the same prompts. Raises ValueError if the grammar has fewer.
    """
    every = list(every_prompt(held_out_split))
    if not 0 <= n <= len(every):
        raise ValueError(f"n={n}: the grammar makes {len(every)} prompts with held_out_split={held_out_split}")
    random.Random(seed).shuffle(every)
    return every[:n]


SETS = ("demo", "demo-dev", "demo-final")


def reserved(group: Group) -> bool:
    """Whether the group belongs to `demo-final`, decided by hash as in `held_out`."""
    return not held_out(group) and hashlib.sha256("|".join(("final", *group)).encode()).digest()[0] < 38  # of 256


def demo_prompts(name: str = "demo") -> tuple[DemoPrompt, ...]:
    """All prompts of a set, by group."""
    if name not in SETS:
        raise ValueError(f"{name!r} is not one of {', '.join(SETS)}")
    if name == "demo-dev":
        return every_prompt(held_out_split=True)
    return tuple(p for p in every_prompt(held_out_split=False) if reserved(p.group) == (name == "demo-final"))
