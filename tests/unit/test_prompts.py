"""Prompt files: the formats that are read, and one-line errors for the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mara_deploy.prompts import Prompt, overlap, read_prompts, subset
from mara_runtime.errors import PromptError


def written(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


NORM = {"id": 1, "topic": "Social Sciences", "subtopic": "Cultural Studies", "instruction": "What is a norm?"}


def texts(path: Path) -> list[str]:
    return [prompt.text for prompt in read_prompts(path).prompts]


def test_sets_like_the_papers_and_their_groups(tmp_path):
    """Entries of SafeRLHF, UltraFeedback, BeaverTails, HarmfulQA and HH-RLHF differ in what else they hold."""
    order = {"instruction": "Options:\n(A) 144 m2\n\n\nSolve it."}
    tax = {"category": "child_abuse", "category_id": 1, "instruction": "What is a tax?"}
    float_ = {"instruction": "How do I float on my back?", "source": "helpful-base"}
    path = written(tmp_path / "test.json", [order, tax, NORM, float_, tax])
    found = read_prompts(path)
    assert found.prompts == tuple(Prompt(entry["instruction"]) for entry in (order, tax, NORM, float_))
    assert (found.name, found.duplicates, found.prompts[0].group) == ("test.json", 1, None)
    with pytest.raises(PromptError, match=r"entry 1 has no key 'topic' .*; it has 'instruction'"):
        read_prompts(path, "topic")

    path = written(tmp_path / "b.json", [NORM, {**NORM, "instruction": "?", "topic": "Art"}])
    assert [prompt.group for prompt in read_prompts(path, "topic").prompts] == ["Social Sciences", "Art"]
    entries = [{"prompt": "a", "group": "x"}, {"prompt": "b", "group": ["kettle", "how"]}, {"prompt": "c", "group": 3}]
    found = read_prompts(written(tmp_path / "a.json", entries))
    assert [prompt.group for prompt in found.prompts] == ["x", '["kettle", "how"]', "3"]
    with pytest.raises(PromptError, match=r"line 1 is a string; --group-by topic"):
        read_prompts(written(tmp_path / "a.txt", "One?"), "topic")


@pytest.mark.parametrize("name", ["prompts", "a.txt", "a.TXT", "a.md", "a.rst", "a.lst", ".prompts"])
def test_text_files_have_a_prompt_per_line(tmp_path, name):
    path = written(tmp_path / name, "\ufeffHow?\r\n\n  Why?  \nHow?\n{not json}\nHow   ?")
    assert texts(path) == ["How?", "Why?", "{not json}", "How   ?"]
    assert read_prompts(path).duplicates == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.NDJSON"])
def test_json_lines(tmp_path, name):
    lines = [
        '{"prompt": "One?"}',
        "",
        '{"question": "Two\\u2028?"}',
        '"Three?"',
        '{"prompt": "4?", "question": "-"}',
    ]
    assert texts(written(tmp_path / name, "\n".join(lines) + "\n")) == ["One?", "Two\u2028?", "Three?", "4?"]


def test_prompts_that_differ_in_white_space_are_duplicates(tmp_path):
    path = written(tmp_path / "a.json", ["One  two\nthree?", " One two three? ", "One two three"])
    assert texts(path) == ["One  two\nthree?", "One two three"]


def test_overlap_of_two_sets(tmp_path):
    ours = read_prompts(written(tmp_path / "a.txt", "One?\nTwo?\nThree?")).prompts
    others = read_prompts(written(tmp_path / "b.json", [{"instruction": "Three?"}, {"instruction": " One?\n"}])).prompts
    assert overlap(ours, others) == ["One?", "Three?"]
    assert overlap(others, ours[1:2]) == []


def test_a_larger_subset_includes_a_smaller_one():
    prompts = [Prompt(f"Question {i}?") for i in range(20)]
    small, large = subset(prompts, 3), subset(prompts, 9)
    assert (len(small), len(large)) == (3, 9)
    assert [prompt for prompt in large if prompt in small] == small  # in file order
    assert small != prompts[:3]
    assert subset(prompts, None) == subset(prompts, 100) == prompts


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.txt", "\n  \n", "has no prompts"),
        ("a.json", "[]", "has no prompts"),
        ("a.json", "", "is not valid JSON"),
        ("a.json", '[{"instruction": "a"}', "is not valid JSON"),
        ("a.json", "[" * 100_000, "is not valid JSON"),
        ("a.json", {"instruction": "a"}, "is a JSON object; expected a list"),
        ("a.json", ["a", ""], "entry 2 is blank"),
        ("a.json", ["a", {"instruction": " \n"}], "entry 2 is blank"),
        ("a.json", ["a", 3], "entry 2 is a number; expected"),
        ("a.json", [{"instruction": None}], "entry 1 is a null; expected"),
        (
            "a.json",
            [{"chosen": "x", "rejected": "y"}],
            "entry 1 has none of the keys 'instruction', 'prompt', 'question'; it has 'chosen'",
        ),
        (
            "a.jsonl",
            '{"prompt": "a"}\n\n{"prompt" "b"}',
            "line 3 is not valid JSON: Expecting ':' delimiter at column 11",
        ),
        ("a.jsonl", '{"prompt": "a", "group": 1}\n{"prompt": "b"}', "line 2 has no 'group'"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "group": 1}', "line 2 has a 'group'"),
        ("a.txt", b"\xff\xfe\x00", "it is not UTF-8 text"),
        ("a.json", '["a\\ud800"]', "entry 1 is not valid Unicode"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, line):
    path = written(tmp_path / name, content)
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    assert line in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.csv", ".csv"),
        ("a.TSV", ".tsv"),
        ("a.parquet", ".parquet"),
        ("a.jsonl.gz", ".gz"),
        ("a.json5", ".json5"),
        ("prompts.v2", ".v2"),
    ],
)
def test_other_formats_are_refused(tmp_path, name, suffix):
    path = written(tmp_path / name, "prompt,source\nOne?,us\n")
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"the prompt file {path} has the suffix '{suffix}'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["none.txt", ".", "nul\0.txt"])
def test_a_file_that_is_not_there(tmp_path, path):
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path / path)
