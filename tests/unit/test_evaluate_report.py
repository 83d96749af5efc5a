"""The report of an evaluation, with scripted sources and scores, and its cautions."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from types import SimpleNamespace

import pytest

from mara_deploy.evaluate.ability import trade_off
from mara_deploy.evaluate.compare import Bootstrap
from mara_deploy.evaluate.evaluate import evaluate
from mara_deploy.evaluate.report import (
    difference_curve,
    examples,
    html,
    lines,
    number,
    result,
    trade_off_lines,
    whisker,
)
from mara_deploy.prompts import Prompt
from tests.unit.scripted import FACTS, OURS, PROMPTS, SCORES, Scripted, cautions_of, compared


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects names, links and texts."""

    def __init__(self, evaluation) -> None:
        super().__init__()
        self.open, self.names, self.links, self.texts = [], set(), [], []
        self.source = html(evaluation, result(evaluation, FACTS, Bootstrap()), 2)
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "hr", "img", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_self_contained_and_escapes_answers(tmp_path):
    attack = '<script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} 5 & "quotes"'
    page = Page(compared(tmp_path, ours=(attack, *OURS[1:]), seen=[PROMPTS[1].text]))
    assert {"script", "img", "link", "iframe"} & page.names == set()
    assert page.links == []
    assert attack in page.texts
    assert not re.search(r"url\(|https?://|@import", page.source)


def test_page_terminal_and_json_have_the_same_figures(tmp_path):
    evaluation = compared(tmp_path)
    summary = result(evaluation, FACTS, Bootstrap())
    assert json.loads(json.dumps(summary, allow_nan=False))["comparisons"]["other"]["combined"]["wins"] == 2
    text = " ".join(" ".join(Page(evaluation).texts).split())
    printed = "\n".join(lines(summary))
    for shown, minus in ((text, "−"), (printed, "-")):
        assert f"{minus}14.3 %" in shown
        assert "wins 2, ties 2, losses 3" in shown
        assert all(caution in shown for caution in summary["cautions"])
    assert "9 read, 2 duplicates" in text
    assert "columns that are not read: 'id'" in text
    assert "weight −0.5" in text


def test_what_alignment_costs_is_a_table_and_a_plot(tmp_path):
    evaluation = compared(tmp_path)
    preference = result(evaluation, FACTS, Bootstrap())["comparisons"]["other"]["combined"]
    tasks = [{"sums": 0.5, "words": 40.0, "none": 0.0}, {"sums": 0.25, "words": 50.0, "none": 0.0}]
    points = [
        {"threshold": None, "preference": None, "tasks": tasks[0], "errors": {"sums": 0.1}},
        {"threshold": 1.5, "preference": preference, "tasks": tasks[1], "errors": {}},
    ]
    _, header, alone, aligned = trade_off_lines(points, "other")
    assert header.split() == ["threshold", "against", "other", "sums", "words", "none"]
    assert alone.split() == ["LLM", "alone", "–", "0.5", "±", "0.1", "40", "0"]
    assert aligned.split()[:3] == ["1.5", "-14.3", "%"]
    assert aligned.split()[-3:] == ["0.25", "50", "0"]
    plot = trade_off(points)
    assert [line["label"] for line in plot["lines"]] == ["sums", "words"], "what the LLM cannot do has no share"
    (half,), (more,) = (line["points"] for line in plot["lines"])
    assert more["y"] == plot["top"], "the greatest share, 125 %"
    assert plot["bottom"] - half["y"] == pytest.approx((plot["bottom"] - plot["top"]) / 2.5, abs=0.1)
    assert plot["bottom"] - plot["alone"] == pytest.approx((plot["bottom"] - plot["top"]) / 1.25, abs=0.1)
    assert plot["left"] < half["x"] < plot["middle"]
    page = html(evaluation, result(evaluation, {**FACTS, "trade_off": points}, Bootstrap()), 2)
    assert page.count("<circle") - html(evaluation, result(evaluation, FACTS, Bootstrap()), 2).count("<circle") == 2


def test_examples_are_the_worst_the_best_and_a_random_selection(tmp_path):
    evaluation = compared(tmp_path, seen=[PROMPTS[6].text])
    evaluation.aligned.answers[6] = replace(evaluation.aligned.answers[6], finish_reason="length")
    worst, best, rest = examples(evaluation, "other", 2)
    assert [item["prompt"] for item in worst["items"]] == ["Question 6?", "Question 5?"]
    assert [item["seen"] for item in worst["items"]] == [True, False]
    sides = [[(side["name"], side["truncated"]) for side in item["sides"]] for item in worst["items"]]
    assert sides == [[("aligned", True), ("other", False)], [("aligned", False), ("other", False)]]
    assert [item["prompt"] for item in best["items"]] == ["Question 3?", "Question 0?"]
    assert len(rest["items"]) == 2
    everything = [item["prompt"] for kind in examples(evaluation, "other", 100) for item in kind["items"]]
    assert sorted(everything) == [p.text for p in PROMPTS]
    only_ties = compared(tmp_path / "ties", ours=("a",) * 7, theirs=("a",) * 7)
    assert [len(kind["items"]) for kind in examples(only_ties, "other", 2)] == [2]


@pytest.mark.parametrize(
    ("options", "caution"),
    [
        ({"theirs": ("?",) * 7}, "100% of the answers of other contain no words"),
        ({"ours": ("a " * 9,) * 7}, "Aligned answers have 9 words on average, those of other 1"),
        ({"theirs": ("a " * 9,) * 7}, "Aligned answers have 1 words on average, those of other 9"),
        ({"ours": ("9",) * 7, "theirs": ("1",) * 7}, "All prompts have the same outcome against other"),
        ({"name": "best-of-3"}, "best-of-3 selects its answer by the same score"),
        ({"theirs": OURS}, "Every answer is the same as that of other."),
        ({"theirs": ("?",) * 7}, "100% of the answers of other equal its answer to another prompt."),
        ({"ours": ("1", "2") * 4, "theirs": ("3", "4") * 4}, "The score length is 1 for every answer of every side"),
    ],
)
def test_cautions(tmp_path, options, caution):
    assert caution in cautions_of(compared(tmp_path / "a", **options))
    assert caution not in cautions_of(compared(tmp_path / "b"))


@pytest.mark.parametrize(
    ("counters", "caution"),
    [
        ({"decisions": 0, "forced": 0, "accepted_rank": {}}, "Nothing was decided, as every position had one"),
        (
            {"decisions": 9, "forced": 0, "accepted_rank": {"1": 9}},
            "The LLM's best candidate was accepted in every",
        ),
        ({"decisions": 8, "forced": 4, "accepted_rank": {"1": 4}}, "were rejected in 50% of the decisions"),
        ({"decisions": 9, "forced": 4, "accepted_rank": {"1": 5}}, None),
        ({"decisions": 9, "forced": 0, "accepted_rank": {"1": 8, "2": 1}}, None),
        (None, None),
    ],
)
def test_cautions_about_the_agent(tmp_path, counters, caution):
    evaluation = compared(tmp_path)
    evaluation = replace(evaluation, aligned=replace(evaluation.aligned, counters=counters))
    found = cautions_of(evaluation)
    assert caution in found if caution else "The agent" not in found


def test_sides_that_are_asked_differently_are_a_caution(tmp_path):
    said = {
        "with plain text, without a chat template": {"raw": True, "template": {}},
        "through its chat template": {"raw": False, "template": {}},
        'through its chat template with {"brief": true}': {"raw": False, "template": {"brief": True}},
    }
    evaluation = compared(tmp_path)
    for (ours, one), (theirs, other) in product(said.items(), repeat=2):
        found = cautions_of(evaluation, {**FACTS, "decoding": {"aligned": one, "other": other}})
        caution = f"aligned is asked {ours}, other {theirs}: the two sides are asked differently."
        assert (caution in found) == ("asked differently" in found) == (one != other)


def test_subsets_of_few_prompts_are_a_caution(tmp_path):
    prompts = [Prompt(f"Question {i}?") for i in range(45)]
    ours = {p.text: ["one two" if i < 40 else "one"] for i, p in enumerate(prompts)}
    sides = Scripted("aligned", ours), [Scripted("other", {p.text: ["one"] for p in prompts})]
    evaluation = evaluate(prompts, *sides, SCORES, tmp_path, seen=[p.text for p in prompts[:30]], quiet=True)
    assert "against other (equal: 5 prompts; unseen: 15 prompts)" in cautions_of(evaluation).splitlines()[0]


@pytest.mark.parametrize(
    ("tokens", "counters", "remedy"),
    [
        ((9, 9), {}, "raise --max-new-tokens."),
        ((9, 8), {}, "1 by --max-new-tokens, 1 by the context length of the bundle: "),
        ((8, 3), {}, "by the context length of the bundle: export it with a larger --max-context"),
        ((8, 3), None, "by the context length of the checkpoint: "),
    ],
)
def test_the_caution_about_truncated_answers_gives_the_remedy(tmp_path, tokens, counters, remedy):
    evaluation = compared(tmp_path)
    side = evaluation.baselines["other"]
    cut = [replace(answer, tokens=n, finish_reason="length") for answer, n in zip(side.answers, tokens, strict=False)]
    answers = [*cut, *(replace(answer, tokens=2) for answer in side.answers[2:])]
    facts = {**FACTS, "decoding": {"aligned": {"max_new_tokens": 9}, "other": {"max_new_tokens": 9}}}
    for share, given in ((2 / 7, True), (0.1, True), (0.09, False)):
        text = replace(side.text, cut_off=share)
        evaluation.baselines["other"] = replace(side, answers=answers, counters=counters, text=text)
        caution = f"{share:.0%} of the answers of other are truncated: {remedy}"
        assert (caution in cautions_of(evaluation, facts)) == given


def test_drawings_and_figures_by_hand():
    ours, theirs = SimpleNamespace(combined=[1.0, 0.0, 0.0]), SimpleNamespace(combined=[0.0, 2.0, 0.0])
    curve = difference_curve(ours, theirs, width=300.0, height=100.0)  # of -2, 0 and 1
    level = "0.0,50.0 100.0,50.0 100.0,50.0 200.0,50.0"
    assert curve["win"] == f"0,50.0 {level} 200.0,25.0 300.0,25.0 300.0,50.0"
    level = "100.0,50.0 200.0,50.0 200.0,50.0 300.0,50.0"
    assert curve["loss"] == f"0,50.0 0.0,100.0 100.0,100.0 {level} 300.0,50.0"
    assert (curve["min"], curve["max"]) == (-2.0, 1.0)
    assert whisker({"rate": 0.0, "interval": (-1.0, 0.5)}) == {"low": 6.0, "at": 90.0, "high": 132.0}
    assert whisker({"rate": 1.0, "interval": None}) == {"low": 174.0, "at": 174.0, "high": 174.0}
    values = [number(value) for value in (1234.567, 0.000123456, 1234567, None)]  # four digits
    assert values == ["1235", "0.0001235", "1,234,567", "–"]
