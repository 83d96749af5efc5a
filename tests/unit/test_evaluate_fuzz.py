"""Prompt files, scores' values and stores made at random: an answer or one line of ours, soon. A case is its number."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mara_deploy.evaluate.store import Store
from mara_deploy.prompts import PROMPT_KEYS, read_prompts
from mara_deploy.scores.base import ScoreError, checked_values
from mara_runtime.errors import MaraError, PromptError

CASES = pytest.mark.parametrize("cases", [range(300), pytest.param(range(300, 10_300), marks=pytest.mark.long)])
TEXTS = ["How?", " Why? \n", "", " ", "\ufeff", "\u2028", "\x00", "\ud800", "a" * 999, "{}", "null", '"', "é😀", "\r"]


def outcome(call: Callable[[], Any], refusal: type[MaraError]) -> tuple[Any, str | None]:
    """What a call returns, or the line of its refusal; within ten seconds."""

    def late(*_: object) -> None:
        raise AssertionError("this takes more than ten seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 10)
    try:
        return call(), None
    except refusal as error:
        line = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "\n" not in line
    return None, line


def any_of(rng: random.Random, *makers: Callable[[], Any]) -> Any:
    return rng.choice(makers)()


# ── prompt files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def value(rng: random.Random, depth: int = 3) -> Any:
    scalars = (None, True, 0, -1, 1.5, 10**30, math.nan, math.inf, *TEXTS)
    if not depth or rng.random() < 0.6:
        return rng.choice(scalars)
    if rng.random() < 0.5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def message(rng: random.Random) -> Any:
    roles = ("user", "user", "assistant", "system", "tool", 3)
    return any_of(rng, *[lambda: {"role": rng.choice(roles), "content": rng.choice(TEXTS)}] * 9, lambda: value(rng))


def messages(rng: random.Random) -> Any:
    return [message(rng) for _ in range(rng.randrange(5))]


def entry(rng: random.Random) -> Any:
    made: dict[str, Any] = {}
    for key, chance in (*((key, 0.4) for key in PROMPT_KEYS), ("answer", 0.6), ("group", 0.2), ("id", 0.3)):
        if rng.random() < chance:
            made[key] = any_of(rng, lambda: rng.choice(TEXTS), lambda: messages(rng), lambda: value(rng))
    for key in ("system", "history", "input"):
        if rng.random() < 0.2:
            made[key] = any_of(
                rng,
                lambda: rng.choice(TEXTS),
                lambda: messages(rng),
                lambda: [rng.sample(TEXTS, 2)],
                lambda: value(rng),
            )
    return any_of(rng, *[lambda: made] * 6, lambda: rng.choice(TEXTS), lambda: messages(rng), lambda: value(rng))


def prompt_file(rng: random.Random) -> tuple[str, bytes]:
    """Suffix and content."""
    suffix = rng.choice((".json", ".json", ".jsonl", ".txt", "", ".csv"))
    entries = [entry(rng) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
    if suffix == ".json" and rng.random() < 0.9:
        text = json.dumps(any_of(rng, *[lambda: entries] * 9, lambda: value(rng)), indent=rng.choice((None, 1)))
    else:
        text = rng.choice(("\n", "\r\n", "\n\n")).join(json.dumps(each) for each in entries)
    data = bytearray(rng.choice(("", "", "\ufeff")).encode() + text.encode() + rng.choice((b"", b"\n")))
    if rng.random() < 0.2:
        damage(rng, data)
    return suffix, bytes(data)


def damage(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randrange(3)] = rng.choice((b"", b"\xff", b'"', b"[", b"}", b"\n", b"0", b"[" * 2000))


@CASES
def test_prompt_files(tmp_path: Path, cases: range) -> None:
    """What is read reads the same again; a good part of the files is."""
    good = 0
    for case in cases:
        rng = random.Random(case)
        suffix, data = prompt_file(rng)
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(data)
        columns, group = rng.choice(((), (), ("answer",))), rng.choice((None, None, None, "id"))
        found, refusal = outcome(partial(read_prompts, path, group, columns), PromptError)
        if refusal is not None:
            continue
        good += 1
        again = tmp_path / "again.json"
        again.write_text(json.dumps([prompt.to_json() for prompt in found.prompts]))
        back = read_prompts(again, columns=columns)
        assert [(p.asked, p.columns) for p in back.prompts] == [(p.asked, p.columns) for p in found.prompts], case
        assert all(prompt.text.strip() for prompt in found.prompts), case
    assert good > len(cases) / 10


# ── what scores return ───────────────────────────────────────────────────────────────────────────────────────────────


class Odd:
    """A class of others, whose methods may do anything."""

    def __init__(self, rng: random.Random) -> None:
        actions = (ValueError("no\nway"), RuntimeError(), SystemExit(0), OverflowError("big"), "text", None, 3, 1.5)
        self._action = rng.choice(actions)

    def _act(self, *_: object) -> Any:
        if isinstance(self._action, BaseException):
            raise self._action
        return self._action

    __float__ = __iter__ = __len__ = __getitem__ = __repr__ = __index__ = _act


def returned(rng: random.Random, answers: int) -> Any:
    def number() -> Any:
        numbers = (
            0,
            1.5,
            True,
            math.nan,
            -math.inf,
            10**400,
            1j,
            np.float32(2),
            np.int8(1),
            np.array([3.0]),
            np.array(4.0),
        )
        return any_of(rng, *[lambda: rng.choice(numbers[:3])] * 5, lambda: rng.choice(numbers), lambda: value(rng, 2),
                      lambda: Odd(rng))  # fmt: skip

    length = rng.choice((answers, answers, answers, answers, 0, answers + 1, 50))
    numbers = [number() for _ in range(length)]
    return any_of(
        rng, *[lambda: numbers] * 4, lambda: tuple(numbers), lambda: (number() for _ in range(length)), number,
        lambda: np.arange(length), lambda: np.ones((length, rng.choice((1, 2)))), lambda: map(float, numbers),
        lambda: value(rng), count, lambda: Odd(rng), lambda: dict(enumerate(numbers)), lambda: "1" * length,
    )  # fmt: skip


@CASES
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_scores_values(cases: range) -> None:
    good = 0
    for case in cases:
        rng = random.Random(case)
        answers = rng.choice((1, 1, 2, 4))
        given = returned(rng, answers)
        values, refusal = outcome(
            partial(checked_values, "s", lambda *_, v=given: v, "p" * answers, "a" * answers), ScoreError
        )
        if refusal is not None:
            assert refusal.startswith("the score s "), case
            continue
        good += 1
        assert len(values) == answers, case
        assert all(type(each) is float and math.isfinite(each) for each in values), case
    assert good > len(cases) / 10


# ── stores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@CASES
def test_stores(tmp_path: Path, cases: range) -> None:
    """A damaged file is refused, or holds fewer of the records that were written."""
    path, records = tmp_path / "s.jsonl", {f"key {i}": {"text": "é\n" * i} for i in range(4)}
    Store(path, {"seed": 0}).add(records)
    whole = path.read_bytes()
    for case in cases:
        rng, data = random.Random(case), bytearray(whole)
        damage(rng, data)
        path.write_bytes(data)
        store, refusal = outcome(partial(Store, path, {"seed": 0}), MaraError)
        if refusal is None:
            assert all(store[key] == record for key, record in records.items() if key in store), case
        else:
            assert str(path) in refusal, case
