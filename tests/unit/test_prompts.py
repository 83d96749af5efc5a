"""Prompt files: the formats that are read, and one-line errors for the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mara_deploy.prompts import Prompt, find_prompts, overlap, read_prompts, subset
from mara_runtime.errors import PromptError


def written(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


NORM = {"id": 1, "topic": "Social Sciences", "subtopic": "Cultural Studies", "instruction": "What is a norm?"}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def asked(path: Path) -> list[object]:
    return [prompt.asked for prompt in read_prompts(path).prompts]


def test_sets_like_the_papers_and_their_groups(tmp_path):
    """Entries of SafeRLHF, UltraFeedback, BeaverTails, HarmfulQA and HH-RLHF differ in what else they hold."""
    order = {"instruction": "Options:\n(A) 144 m2\n\n\nSolve it."}
    tax = {"category": "child_abuse", "category_id": 1, "instruction": "What is a tax?"}
    float_ = {"instruction": "How do I float on my back?", "source": "helpful-base"}
    path = written(tmp_path / "test.json", [order, tax, NORM, float_, tax])
    found = read_prompts(path)
    assert found.prompts == tuple(Prompt(entry["instruction"]) for entry in (order, tax, NORM, float_))
    assert (found.name, found.duplicates, found.prompts[0].group) == ("test.json", 1, None)
    unread = "'category', 'category_id', 'id', 'topic', 'subtopic', 'source'"
    assert found.remarks == (f"test.json has columns that are not read: {unread}",)
    with pytest.raises(PromptError, match=r"entry 1 has no key 'topic' .*; it has 'instruction'"):
        read_prompts(path, "topic")

    path = written(tmp_path / "b.json", [NORM, {**NORM, "instruction": "?", "topic": "Art"}])
    assert [prompt.group for prompt in read_prompts(path, "topic").prompts] == ["Social Sciences", "Art"]
    entries = [{"prompt": "a", "group": "x"}, {"prompt": "b", "group": ["kettle", "how"]}, {"prompt": "c", "group": 3}]
    found = read_prompts(written(tmp_path / "a.json", entries))
    assert [prompt.group for prompt in found.prompts] == ["x", '["kettle", "how"]', "3"]
    with pytest.raises(PromptError, match=r"line 1 is a string, not an object with the column 'topic'"):
        read_prompts(written(tmp_path / "a.txt", "One?"), "topic")


@pytest.mark.parametrize("name", ["prompts", "a.txt", "a.TXT", "a.md", "a.rst", "a.lst", ".prompts"])
def test_text_files_have_a_prompt_per_line(tmp_path, name):
    path = written(tmp_path / name, "\ufeffHow?\r\n\n  Why?  \nHow?\n{not json}\nHow   ?\t")
    assert asked(path) == ["How?", "  Why?  ", "{not json}", "How   ?\t"]
    assert (read_prompts(path).duplicates, read_prompts(path).remarks) == (1, ())


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.NDJSON"])
def test_json_lines(tmp_path, name):
    lines = [
        '{"prompt": "One?"}',
        "",
        '{"question": "Two\\u2028?"}',
        '"Three?"',
        '{"prompt": "4?", "question": "4?", "messages": null}',
    ]
    path = written(tmp_path / name, "\ufeff" + "\r\n".join(lines) + "\r\n")
    assert asked(path) == ["One?", "Two\u2028?", "Three?", "4?"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (" How?\n", " How?\n"),
        ({"instruction": "Translate:", "input": "Hund\n", "output": "dog"}, "Translate:\nHund\n"),
        ({"instruction": "Why?", "input": "", "system": None, "history": []}, "Why?"),
        ({"question": "Why?", "system": "Be brief. "}, [system("Be brief. "), user("Why?")]),
        (
            {"prompt": "Why?", "history": [["Hi", "Hello"], ["How?", "So."]], "system": "S"},
            [system("S"), user("Hi"), assistant("Hello"), user("How?"), assistant("So."), user("Why?")],
        ),
        ({"prompt": "Why?", "history": [user("Hi"), assistant("")]}, [user("Hi"), assistant(""), user("Why?")]),
        ({"messages": [user("Why?")]}, [user("Why?")]),
        ({"prompt": [system("S"), user(" Why? ")]}, [system("S"), user(" Why? ")]),
        ({"messages": [user("a"), assistant("b"), user("c")], "system": "S"}, [system("S"), user("a"), assistant("b"),
         user("c")]),
        ([{"role": "tool", "content": "3", "name": "sum"}], [{"role": "tool", "content": "3", "name": "sum"}]),
    ],
)  # fmt: skip
def test_what_an_entry_asks_is_what_the_decoder_takes(tmp_path, entry, expected):
    """A text or a conversation, with nothing added, removed or changed; and so again from what a run keeps of it."""
    (prompt,) = read_prompts(written(tmp_path / "a.json", [entry])).prompts
    assert prompt == Prompt(expected)
    assert read_prompts(written(tmp_path / "b.json", [prompt.to_json()])).prompts == (prompt,)


def test_columns_for_the_scores_keep_prompts_apart(tmp_path):
    """Without them rows of one prompt are asked once, and the remarks say in what they differ."""
    rows = [{"question": "2 + 2?", "answer": answer, "id": i} for i, answer in enumerate(("4", "four", "4"))]
    path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    found = read_prompts(path, columns=["answer"])
    assert found.prompts == tuple(Prompt("2 + 2?", columns={"answer": answer}) for answer in ("4", "four"))
    repeated = "a.jsonl repeats 1 prompt with another 'id': only the first of each is asked"
    assert found.remarks == ("a.jsonl has columns that are not read: 'id'", repeated)
    kept = written(tmp_path / "b.json", [prompt.to_json() for prompt in found.prompts])
    assert read_prompts(kept, columns=["answer"]).prompts == found.prompts
    found = read_prompts(path)
    assert (found.prompts, found.duplicates) == ((Prompt("2 + 2?"),), 2)
    assert found.remarks[1] == "a.jsonl repeats 2 prompts with another 'answer', 'id': only the first of each is asked"
    for columns, named in ((["reference"], "line 1 has no column 'reference'"), (["input"], "'input', which is part")):
        with pytest.raises(PromptError, match=named):
            read_prompts(path, columns=columns)
    with pytest.raises(PromptError, match="reads the column 'answer', and the prompts of demo have no columns"):
        find_prompts("demo", columns=["answer"])


def test_prompts_that_differ_in_white_space_are_different_questions(tmp_path):
    every = ["One  two\nthree?", " One two three? ", "One two three?"]
    assert asked(written(tmp_path / "a.json", [*every, every[1]])) == every


def test_overlap_of_two_sets(tmp_path):
    ours = read_prompts(written(tmp_path / "a.txt", "One?\nTwo?\nThree?")).prompts
    others = read_prompts(written(tmp_path / "b.json", [{"instruction": "Three?"}, {"instruction": " One?\n"}])).prompts
    assert overlap(ours, others) == ["One?", "Three?"]  # for a caution, whatever the white space
    assert overlap(others, ours[1:2]) == []


def test_a_larger_subset_includes_a_smaller_one():
    prompts = [Prompt(f"Question {i}?") for i in range(20)]
    small, large = subset(prompts, 3), subset(prompts, 9)
    assert (len(small), len(large)) == (3, 9)
    assert [prompt for prompt in large if prompt in small] == small  # in file order
    assert small != prompts[:3]
    assert subset(prompts, None) == subset(prompts, 100) == prompts
    twice = [Prompt("a", columns={"answer": i}) for i in range(3)]
    assert subset(twice, 2) == twice[:2]


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
        ("a.json", ["a", {}], "entry 2 has none of the keys"),
        ("a.json", ["a", []], "entry 2 has no messages"),
        ("a.json", ["a", ["b"]], "message 1 is not an object with the texts 'role' and 'content'"),
        ("a.json", [{"messages": "How?", "prompt": "Why?"}], "a prompt under 'prompt' and another under 'messages'"),
        ("a.json", [{"conversations": [{"from": "human", "value": "Why?"}]}], "it has 'conversations'"),
        ("a.json", [{"messages": [{"role": "user", "content": None}]}], "message 1 is not an object"),
        ("a.json", [{"messages": [user("Why?"), user(" ")]}], "is blank in its last message"),
        ("a.json", [{"messages": [user("Why?"), assistant("So.")]}], "ends with a message of the assistant"),
        ("a.json", [{"messages": [system("S"), user("Why?")], "system": "T"}], "under 'system' and another"),
        ("a.json", [{"messages": [user("Why?")], "input": "x"}], "has messages and an 'input'"),
        ("a.json", [{"prompt": "Why?", "system": 3}], "entry 1, 'system' is a number"),
        ("a.json", [{"prompt": "Why?", "input": ["x"]}], "entry 1, 'input' is a list"),
        ("a.json", [{"prompt": "Why?", "input": 0}], "entry 1, 'input' is a number"),
        ("a.json", [{"prompt": "Why?", "history": "Hi"}], "entry 1, 'history' has a string instead of messages"),
        ("a.json", [{"prompt": "Why?", "history": [["Hi"]]}], "entry 1, 'history' is not a list of messages, nor"),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]', "'prompt' is given twice"),
        ("a.jsonl", '{"prompt": "a", "x": NaN}', "NaN is not a JSON number"),
        ("a.json", '[{"prompt": "a", "group": "\\ud800"}]', "half of a surrogate pair"),
        ("a.json", [{"instruction": None}], "entry 1 is a null; expected"),
        (
            "a.json",
            [{"chosen": "x", "rejected": "y"}],
            "entry 1 has none of the keys 'instruction', 'prompt', 'question', 'messages'; it has 'chosen', 'rejected'",
        ),
        (
            "a.jsonl",
            '{"prompt": "a"}\n\n{"prompt" "b"}',
            "line 3 is not valid JSON: Expecting ':' delimiter at column 11",
        ),
        ("a.jsonl", '{"prompt": "a", "group": 1}\n{"prompt": "b"}', "line 2 has no 'group'"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "group": 1}', "line 2 has a 'group'"),
        ("a.txt", b"\xff\xfe\x00", "it is not UTF-8 text"),
        ("a.json", '["a\\ud800"]', "half of a surrogate pair"),
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
