"""The main path of an evaluation, and its report, with scripted sources and scores."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from mara_deploy.evaluate.answers import Answer
from mara_deploy.evaluate.compare import Bootstrap
from mara_deploy.evaluate.evaluate import evaluate
from mara_deploy.evaluate.report import difference_curve, examples, html, lines, number, result, whisker
from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import ScoreError, WeightedScore
from mara_deploy.scores.load import FunctionScore
from mara_runtime.errors import MaraError
from mara_runtime.stats import Stats

PROMPTS = [Prompt(f"Question {i}?") for i in range(7)]
STATS = {**Stats(tokens=3, decisions=2, forced=1, smallest_margin=0.5).to_json(), "accepted_rank": {"1": 1}}


class Scripted:
    """A source with given answers; records what it is asked, and may be interrupted."""

    def __init__(self, name: str, answers: dict[str, Sequence[str]], stop_after: int | None = None) -> None:
        self.name, self.settings, self.closed = name, {"name": name}, False
        self._answers, self._left = answers, stop_after
        self.asked: list[str] = []

    def check(self, prompt: str) -> None:
        pass

    def __call__(self, prompt: str) -> list[Answer]:
        if self._left == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append(prompt)
        return [Answer(text, len(text), "stop", STATS) for text in self._answers[prompt]]

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


def test_combined_and_each_score(tmp_path):
    comparison = compared(tmp_path).comparisons["other"]
    # number - 0.5 · length, ours against theirs: 6.5 5.5 | 4.5 4.5 | 4.5 5.5 | 3.5 -3.5 | -2 -2 | 95.5 98 | 1.5 8.5
    assert (comparison.combined.wins, comparison.combined.ties, comparison.combined.losses) == (2, 2, 3)
    assert comparison.combined.rate == pytest.approx(-1 / 7)
    number, cost = comparison.each["number"], comparison.each["length"]
    assert (number.wins, number.ties, number.losses) == (2, 3, 2)
    assert (cost.wins, cost.ties, cost.losses) == (1, 5, 1)  # the shorter answer wins
    assert comparison.identical == 2
    worse = compared(tmp_path / "b", ours=("7",) * 7, theirs=("10",) * 7).comparisons["other"].each
    assert (worse["number"].losses, worse["length"].wins) == (7, 7)
    unsteady = iter(range(1000))  # identical answers tie even if the score is random
    scores = [WeightedScore(FunctionScore("unsteady", lambda prompts, answers: [next(unsteady) for _ in answers]))]
    ties = compared(tmp_path / "c", ours=("same",) * 7, theirs=("same",) * 7, scores=scores).comparisons["other"]
    assert (ties.combined.ties, ties.identical) == (7, 7)
    sizes = {name: part.wins + part.ties + part.losses for name, part in comparison.by_length.items()}
    assert sizes == {"longer": 1, "equal": 5, "shorter": 1}


def test_an_interrupted_run_continues_to_the_same_result(tmp_path):
    expected = compared(tmp_path / "whole")
    ours, theirs = scripted("aligned", *OURS, stop_after=3), scripted("other", *THEIRS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(PROMPTS, ours, [theirs], SCORES, tmp_path / "cut", quiet=True)
    assert (len(ours.asked), len(theirs.asked)) == (3, 0)

    ours, theirs = scripted("aligned", *OURS), scripted("other", *THEIRS, stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        evaluate(PROMPTS, ours, [theirs], SCORES, tmp_path / "cut", quiet=True)
    assert ours.asked == [p.text for p in PROMPTS[3:]]

    def failing(prompts, answers):
        raise RuntimeError("out of order")

    ours, theirs = scripted("aligned", *OURS), scripted("other", *THEIRS)
    broken = [SCORES[0], WeightedScore(FunctionScore("length", failing), -0.5)]
    with pytest.raises(ScoreError, match="out of order"):
        evaluate(PROMPTS, ours, [theirs], broken, tmp_path / "cut", quiet=True)
    assert (ours.asked, theirs.asked) == ([], [PROMPTS[6].text])

    assert compared(tmp_path / "cut") == expected
    for kind in ("answers", "scores"):
        for file in (tmp_path / "whole" / kind).iterdir():
            whole, cut = ((tmp_path / run / kind / file.name).read_text() for run in ("whole", "cut"))
            assert set(whole.splitlines()) == set(cut.splitlines()), file.name


def test_only_new_answers_and_scores_are_computed(tmp_path):
    """For more prompts, another baseline, another weight."""
    scored: list[tuple[str, str]] = []

    def recorded(prompts, answers):
        scored.extend(zip(prompts, answers, strict=True))
        return as_number(prompts, answers)

    score = FunctionScore("number", recorded)
    compared(tmp_path, scores=[WeightedScore(score)], prompts=PROMPTS[:3])
    ours, theirs, third = scripted("aligned", *OURS), scripted("other", *THEIRS), scripted("third", *THEIRS[::-1])
    evaluation = evaluate(PROMPTS, ours, [theirs, third], [WeightedScore(score, -5.0)], tmp_path, quiet=True)
    assert ours.asked == theirs.asked == [p.text for p in PROMPTS[3:]]
    assert len(third.asked) == 7
    assert len(scored) == len(set(scored))
    assert evaluation.aligned.combined[0] == -5.0 * 7
    assert all(source.closed for source in (ours, theirs, third))


def test_the_best_sample_competes_and_all_are_counted(tmp_path):
    theirs = [("1", "9", "9 "), ("4", "4"), *[("0",)] * 5]
    side = compared(tmp_path, theirs=theirs, scores=SCORES[:1]).baselines["other"]
    assert [answer.text for answer in side.answers[:3]] == ["9", "4", "0"]  # the first of equals
    assert side.counters["tokens"] == 3 * (3 + 2 + 5)
    assert side.text.tokens_max == 1


def test_groups_are_the_units(tmp_path):
    for first in ("a", ""):  # an empty name counts
        prompts = [Prompt(p.text, first if i < 4 else "b") for i, p in enumerate(PROMPTS)]
        by_group = compared(tmp_path, prompts=prompts, bootstrap=Bootstrap(level=0.4))
        assert by_group.comparisons["other"].combined.interval == (-1 / 7, -1 / 7)  # both groups once
        summary = result(by_group, FACTS, Bootstrap(level=0.4))
        assert (summary["bootstrap"]["unit"], summary["bootstrap"]["units"]) == ("group", 2)
        assert summary["cautions"][0].startswith("2 groups: ")


def test_prompts_of_the_training_set_are_counted_and_named(tmp_path):
    evaluation = compared(tmp_path, seen=[PROMPTS[0].text, PROMPTS[3].text])
    unseen = evaluation.comparisons["other"].unseen
    assert (unseen.wins, unseen.ties, unseen.losses) == (0, 2, 3)
    assert result(evaluation, FACTS, Bootstrap())["in_training"] == ["Question 0?", "Question 3?"]
    assert "2 of 7 prompts also occur in the training set" in cautions_of(evaluation)
    assert compared(tmp_path).comparisons["other"].unseen is None
    everything = compared(tmp_path, seen=[p.text for p in PROMPTS])
    assert everything.comparisons["other"].unseen is None
    assert "7 of 7 prompts also occur in the training set" in cautions_of(everything)


def test_a_score_that_is_not_finite_names_prompt_and_score_and_is_not_saved(tmp_path):
    def bad(prompts, answers):
        return [float("nan") if answer == "99" else 1.0 for answer in answers]

    with pytest.raises(ScoreError, match=r"s is nan for .* 'Question 5\?'"):
        compared(tmp_path, scores=[WeightedScore(FunctionScore("s", bad))])
    assert "NaN" not in (tmp_path / "scores" / "s.jsonl").read_text()
    good = [WeightedScore(FunctionScore("s", as_number))]
    assert compared(tmp_path, scores=good).baselines["other"].each["s"][5] == 99


def test_scores_of_the_same_name_have_files_of_their_own(tmp_path):
    evaluation = compared(tmp_path, scores=[WeightedScore(FunctionScore("s", f)) for f in (as_number, length)])
    assert evaluation.weights == {"s (1)": 1.0, "s (2)": 1.0}
    assert (evaluation.aligned.each["s (1)"][5], evaluation.aligned.each["s (2)"][5]) == (100, len("100 or so"))


def test_changed_settings_and_damaged_files_are_refused_before_anything_is_answered(tmp_path):
    compared(tmp_path)
    ours, theirs = scripted("aligned", *OURS), scripted("other", *THEIRS)
    theirs.settings = {"name": "other", "seed": 1}
    with pytest.raises(MaraError, match=r"other\.jsonl was made with seed null, now it is 1"):
        evaluate([*PROMPTS, Prompt("New?")], ours, [theirs], SCORES, tmp_path, quiet=True)
    assert ours.asked == []
    with pytest.raises(MaraError, match=r"length\.jsonl was made with files null, now it is \"x\""):
        compared(tmp_path, scores=[SCORES[0], replace(SCORES[1], settings={"files": "x"})])
    path = tmp_path / "answers" / "aligned.jsonl"
    path.write_text(path.read_text().replace('"finish_reason"', '"reason"'))
    with pytest.raises(MaraError, match=r"aligned\.jsonl does not contain answers"):
        compared(tmp_path)


def test_progress_is_on_stderr_and_quiet_is_quiet(tmp_path, capsys):
    compared(tmp_path, prompts=PROMPTS[:3])
    assert capsys.readouterr() == ("", "")
    compared(tmp_path, quiet=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert "aligned: 4 to answer, 3 already saved\n" in err


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────

FACTS = {
    "command": "mara-eval BUNDLE --score '<b>'",
    "score": "+1 × number -0.5 × length",
    "bundle": {"name": "polite", "model": "tiny", "agent": "a.pth", "precision": "fp32"},
    "prompts": {
        "file": "prompts.txt", "read": 9, "duplicates": 2, "refused": 0, "limit": None, "unique": 7,
        "training_file": "train.json",
    },
    "decoding": {},
    "versions": {"python": "3"},
}  # fmt: skip


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
    assert "weight −0.5" in text


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


def cautions_of(evaluation, facts=None) -> str:
    return "\n".join(result(evaluation, facts or FACTS, Bootstrap())["cautions"])


@pytest.mark.parametrize(
    ("options", "caution"),
    [
        ({"theirs": ("?",) * 7}, "100% of the answers of other contain no words"),
        ({"ours": ("a " * 9,) * 7}, "Aligned answers have 9 words on average, those of other 1"),
        ({"theirs": ("a " * 9,) * 7}, "Aligned answers have 1 words on average, those of other 9"),
        ({"ours": ("9",) * 7, "theirs": ("1",) * 7}, "All prompts have the same outcome against other"),
        ({"name": "best-of-3"}, "best-of-3 selects its answer by the same score"),
    ],
)
def test_cautions(tmp_path, options, caution):
    assert caution in cautions_of(compared(tmp_path / "a", **options))
    assert caution not in cautions_of(compared(tmp_path / "b"))


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
