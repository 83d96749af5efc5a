"""Trace files: read strictly, summed up in a few lines, and made into a page that holds nothing but itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mara_deploy.commands import inspect
from mara_deploy.see.reader import read_trace
from mara_deploy.see.summary import parting, summary
from tests import traces


def test_an_answer_and_the_plain_one_beside_it(tmp_path: Path) -> None:
    aligned, plain = read_trace(traces.write(tmp_path / "t.jsonl", traces.aligned_and_plain()))
    assert aligned.kinds == {"first": 2, "changed": 1, "forced": 1, "only": 1}
    assert (plain.kinds, plain.finish_reason) == ({"plain": 2}, "length")
    assert aligned.text == "Let it <script>alert(1)</script>\né日"
    assert parting(aligned, plain) == 1
    assert "polite + 0.5 × brief" in "\n".join(summary([aligned, plain]))


def test_a_trace_that_breaks_off_is_one_without_an_end(tmp_path: Path) -> None:
    (answer,) = read_trace(traces.write(tmp_path / "t.jsonl", [traces.facts(), traces.token(["a"], [None], 1)]))
    assert answer.finish_reason is None


def bad(**changes: object) -> dict:
    return {**traces.token(["a", "b"], [1.0, None], 1), **changes}


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ([], "has no token of an answer"),
        ([traces.facts()], "has no token of an answer"),
        ([bad()], "line 1: the field answer is 0, of which there was no first line"),
        ([traces.facts(), traces.facts()], "line 2: the field answer is 0, of which there was a first line before"),
        ([traces.facts(format=2)], "line 1: the field format is 2; this release reads format 1"),
        ([traces.facts(beside=3)], "line 1: the field beside is 3, which is no answer before it"),
        ([traces.facts(prompt=[1.5])], "line 1: the field prompt is not a text"),
        ([traces.facts(), bad(rank=3)], "line 2: the field rank is 3, and there are 2 candidates"),
        ([traces.facts(), bad(rank=0)], "line 2: the field rank is 0"),
        ([traces.facts(), bad(candidates=[{"token": "a"}])], "line 2: the field candidates.0 has the token 'a'"),
    ],
)
def test_what_is_no_trace_is_refused_in_a_line(tmp_path, capsys, lines, line) -> None:
    path = traces.write(tmp_path / "t.jsonl", lines)
    assert inspect.main([str(path), "--html", str(tmp_path / "page.html")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said
    assert not (tmp_path / "page.html").exists()


def test_a_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    path, out = traces.write(tmp_path / "t.jsonl", traces.aligned_and_plain()), tmp_path / "page.html"
    assert inspect.main([str(path), "--html", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    assert "default-src &#39;none&#39;" in html
    assert not re.findall(r"(?:src|href)=(?!\"data:)\S+", html.partition("<script")[0])
    assert html.count("</script") == 2  # of the data and of the page's own
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    assert " <script>alert(1)</script>" in json.loads(data)["texts"].values()
