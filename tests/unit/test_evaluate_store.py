"""Answers and scores on disk: an interrupted file can be continued, one made with other settings is refused."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from mara_deploy.evaluate.store import Store, _key, cached_scores
from mara_deploy.scores.base import WeightedScore
from mara_deploy.scores.function import FunctionScore
from mara_runtime.errors import MaraError

SETTINGS = {"seed": 0, "stop": ["a"], "bundle": "0123", "limit": None}


def filled(path: Path) -> bytes:
    store = Store(path, SETTINGS)
    store.add({"one": {"text": "ä\n\u2028"}})
    store.add({"two": 0.1 + 0.2})
    return path.read_bytes()


def test_records_are_there_again_and_a_batch_is_added_as_a_whole(tmp_path):
    """Part of a batch would be computed again in another batch, and could differ in its last bits."""
    path = tmp_path / "new" / "folder" / "a.jsonl"
    before = filled(path)
    store = Store(path, dict(reversed(SETTINGS.items())))
    assert (store["one"], store["two"]) == ({"text": "ä\n\u2028"}, 0.1 + 0.2)
    with pytest.raises(TypeError):
        store.add({"three": 1.0, "four": object()})
    assert "three" not in Store(path, SETTINGS)
    assert path.read_bytes() == before


def test_a_file_cut_off_anywhere_can_be_continued(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = filled(path)
    ends = [i for i, byte in enumerate(whole, 1) if byte == ord("\n")]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        store = Store(path, SETTINGS)
        assert [key in store for key in ("one", "two")] == [length >= ends[1], length >= ends[2]]
        store.add({"two": 0.1 + 0.2})
        if length < ends[1]:
            store.add({"one": {"text": "ä\n\u2028"}})
        store = Store(path, SETTINGS)
        assert (store["one"], store["two"]) == ({"text": "ä\n\u2028"}, 0.1 + 0.2)


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "a.jsonl"
    before = filled(path)
    for settings, named in (
        ({**SETTINGS, "seed": 1}, "seed 0, now it is 1"),
        ({**SETTINGS, "stop": ["b"]}, 'stop ["a"], now it is ["b"]'),
        ({**SETTINGS, "new": True}, "new null, now it is true"),
        ({**SETTINGS, "bundle": "x" * 200}, 'bundle "0123", now it is "xxx'),
        ({key: SETTINGS[key] for key in list(SETTINGS)[1:]}, "seed 0, now it is null"),
    ):
        with pytest.raises(MaraError) as error:
            Store(path, settings)
        assert f"{path} was made with {named}" in str(error.value)
        assert len(str(error.value)) < 400 + len(str(path))
        assert path.read_bytes() == before


def test_a_file_without_records_takes_other_settings(tmp_path):
    """Such as that of a score which failed, and was mended."""
    path = tmp_path / "a.jsonl"
    Store(path, {"code": 1})
    Store(path, {"code": 2}).add({"one": 1.0})
    with pytest.raises(MaraError, match="was made with code 2, now it is 3"):
        Store(path, {"code": 3})


def test_damage_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = filled(path).decode().split("\n")
    deep = "[" * 100_000
    for number, line in (
        (1, "[]"),
        (1, "3"),
        (1, deep),
        (2, "not json"),
        (2, '{"key": "one"}'),
        (2, "null"),
        (2, deep),
    ):
        path.write_text("\n".join([*whole[: number - 1], line, *whole[number:]]), encoding="utf-8")
        with pytest.raises(MaraError, match=f"line {number}, is damaged"):
            Store(path, SETTINGS)


def test_a_changed_byte_is_damage_or_costs_the_last_line(tmp_path):
    """A line that a kill cut short is computed again; every other change is refused."""
    path = tmp_path / "a.jsonl"
    whole = filled(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if at < len(whole) - 1:
            with pytest.raises(MaraError, match=r"line \d, is damaged"):
                Store(path, SETTINGS)
        else:
            assert "two" not in Store(path, SETTINGS)


def test_a_score_that_is_no_number_is_damage(tmp_path):
    for value in ({}, "1", None, [1.0], float("nan"), 10**400):
        Store(tmp_path / "s.jsonl", {"score": "s"}).add({_key("a", "b"): value})
        combined = cached_scores([WeightedScore(FunctionScore("s", as_lengths))], tmp_path)
        with pytest.raises(MaraError, match=r"s\.jsonl, a score, is damaged"):
            combined(["a"], ["b"])
        (tmp_path / "s.jsonl").unlink()


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MaraError, match="cannot write"):
        Store(tmp_path / "file" / "a.jsonl", SETTINGS)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(MaraError, match=r"cannot write .*pipe\.jsonl: it is not a regular file"):
        Store(tmp_path / "pipe.jsonl", SETTINGS)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = Store(tmp_path / "a.jsonl", SETTINGS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(MaraError, match=r"cannot write .*a\.jsonl: File too large"):
            store.add({"one": "text" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def as_lengths(prompts, answers):
    return [10 * len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]


def test_a_value_belongs_to_a_prompt_and_an_answer_and_names_may_be_long(tmp_path):
    combined = cached_scores([WeightedScore(FunctionScore("s" * 300, as_lengths))], tmp_path)
    assert combined(["ab", "a", "a", "abc"], ["c", "bc", "c", "c"]) == [21.0, 12.0, 11.0, 31.0]


def test_a_value_belongs_to_the_columns_that_the_score_reads(tmp_path):
    calls = []

    def exact(prompts, answers, reference):
        calls.append(answers)
        return [answer == right for answer, right in zip(answers, reference, strict=True)]

    combined = cached_scores([WeightedScore(FunctionScore("exact", exact))], tmp_path)
    assert combined.columns == ("reference",)
    conversation = [{"role": "user", "content": "a"}]
    for _ in range(2):
        values = combined(["a", "a", conversation], ["4", "4", "4"], reference=["4", "four", "4"], unused=[1, 2, 3])
        assert values == [1.0, 0.0, 1.0]
    assert calls == [["4", "4", "4"]]
